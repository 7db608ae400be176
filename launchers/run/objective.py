"""What a network of a run is trained by: its loss, and its learning rates."""

from collections.abc import Callable

import torch
from torch import nn

from launchers.run.building import build_network
from launchers.run.network import Job, Network
from launchers.run.worker import Context
from sbf_dist.distill.features import FeatureLoss, feature_loss
from sbf_dist.distill.task import DistillationTask
from sbf_dist.distill_recipe import Weight
from sbf_dist.errors import UserError
from sbf_dist.train.schedule import cosine, followed_by, schedule


def task_for(here: Context, network: Network, student: nn.Module) -> DistillationTask:
    """Return a network of a run, `student`, with the loss that the recipe gives it."""
    job = network.job
    assert job is not None
    smoothing, distill = job.training.label_smoothing, job.distill
    if distill is None:
        return DistillationTask(student, label_smoothing=smoothing)
    features: FeatureLoss | None = None
    feature_weight: Weight = 0.0
    if distill.features is not None:
        features = _feature_loss(here, network, student, distill.features.layers)
        feature_weight = distill.features.weight
    return DistillationTask(
        student,
        label_weight=distill.label_weight,
        label_smoothing=smoothing,
        teacher_weight=distill.teacher_weight,
        consistency=distill.consistency,
        features=features,
        feature_weight=feature_weight,
    )


def _feature_loss(
    here: Context, network: Network, student: nn.Module, layers: list[str]
) -> FeatureLoss:
    compressed = here.networks.compressed
    with torch.random.fork_rng(devices=[]):  # weights are drawn, and thrown away
        teacher = build_network(compressed, here.num_classes, None).to(here.device)
    return feature_loss(student, teacher, layers, network.input_shape).to(here.device)


def learning_rates(job: Job, steps: int, warmup: int) -> Callable[[int], float]:
    """Return the learning rate of each step of a training of so many.

    UserError: the labels alone at the end leave no steps after the warm-up.
    """
    settings = job.training
    lr = settings.optimizer.lr
    first = steps if job.distill is None else job.distill.steps_with_teachers(steps)
    if warmup >= first:
        raise UserError(
            f"distill.labels_last leaves {first} of {steps} steps before, which must be more than "
            f"the {warmup} of the warm-up"
        )
    rates = schedule(
        settings.schedule,
        lr=lr,
        steps=first,
        warmup=warmup,
        milestones=settings.milestones,
        factor=settings.factor,
    )
    if job.distill is None or job.distill.labels_last is None:
        return rates
    last = job.distill.labels_last.lr * lr
    return followed_by(rates, lambda step: cosine(step, lr=last, steps=steps - first), at=first)
