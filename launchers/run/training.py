"""Trainings of a run, on every rank: composed, gone on with from a checkpoint, and done."""

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from launchers.estimate.teachers import Choice
from launchers.run import locks, outcome
from launchers.run.batches import (
    steps_per_epoch,
    targets,
    training_batches,
    training_images,
    with_progress,
)
from launchers.run.building import build_network
from launchers.run.network import Job, Network
from launchers.run.objective import learning_rates, task_for
from launchers.run.teaching import choice_for
from launchers.run.worker import Batch, Context, validation
from pipelines.agreement import check_workers_agree
from sbf_dist import tracking
from sbf_dist.compression.cost import count
from sbf_dist.compression.plan import Plan
from sbf_dist.distill.task import DistillationTask
from sbf_dist.train import checkpoint
from sbf_dist.train.engine import build_engine
from sbf_dist.train.evaluate import Accuracy, accuracy, synchronise_batchnorm
from sbf_dist.train.freezing import freeze
from sbf_dist.train.loop import Every, LogRecord, fit
from sbf_dist.train.manifest import read_manifest
from sbf_dist.train.profiling import profiled
from sbf_dist.train.resharding import whole_state
from sbf_dist.train.utilisation import TRAINING_PASSES, peak_macs_per_s
from sbf_dist.training_recipe import Training
from sbf_dist.weights import save_weights

if TYPE_CHECKING:  # of Ray, which the driver imports later than this module
    from launchers.on_ray.saving import Saving

_MADE = ("weights", "trainings")  # parts of a run's folder
# Ends of keys that may be others than when a checkpoint was made.
_FREE = tuple(f".{name}" for name in (*locks.LENGTHS, *locks.PASSES, *locks.WITHOUT_EFFECT))


def train_networks(config: dict[str, Any]) -> dict[str, Any]:
    """Train the networks of a stage or a round one after another, from the latest checkpoint.

    The answer maps each network that was trained to its validation accuracy and the step that it
    was resumed from.
    """
    from launchers.on_ray import ray_train
    from launchers.on_ray.kept_logs import STACKS
    from launchers.on_ray.saving import Saving
    from launchers.on_ray.stopping import Stopping
    from launchers.on_ray.stored_checkpoints import shelf_at

    here = Context.of(config)
    wanted = here.networks.trained_in(config["group"])
    check_workers_agree(here.index, here.device)
    results: dict[str, Any] = {}
    journals = here.folder.root / config["journals"]
    with _measured(here, journals):
        for number, network in enumerate(wanted, 1):
            if _is_trained(here, network):
                continue
            title = f"{network.name} ({number} of {len(wanted)})"
            shelf = shelf_at(
                config["checkpoints"],
                network.name,
                here.recipe.checkpoints.keep_last,
                before=partial(here.folder.publish, config["journals"]),
                keep_best=here.recipe.checkpoints.keep_best,
                mlflow_run=config["mlflow_run"],
            )
            stacks = here.folder.logs / f"{network.name}-rank-{here.rank}{STACKS}"
            stopping = Stopping(ray_train.listening(), here.recipe.workers.hang_timeout, stacks)
            with Saving(shelf, stopping) as saving:
                results[network.name] = _train(here, network, saving, title, journals)
            if here.rank == 0:
                outcome.keep(network, results[network.name])
                here.folder.publish(config["journals"], *_MADE)
            dist.barrier()
    return results


def _is_trained(here: Context, network: Network) -> bool:
    """Whether a training is done, as rank 0 sees it: other machines may not know of it yet."""
    done = torch.tensor([int(outcome.is_trained(network))], device=here.device)
    dist.broadcast(done, 0)
    if done.item() and here.rank == 0:
        here.folder.publish(*_MADE)  # it may have been killed before it did
    return bool(done.item())


@contextmanager
def _measured(here: Context, journals: Path) -> Iterator[None]:
    """One worker of every node logs how busy the node is."""
    from launchers.on_ray import ray_train

    where = ray_train.place()
    if where.local_rank != 0:
        yield
        return
    with here.mirrored(journals), tracking.measured_node(journals, where.node_rank):
        yield


def _train(
    here: Context, network: Network, saving: "Saving", title: str, journals: Path
) -> dict[str, Any]:
    """Compose and run one training: student, task, engine, loaders, loop."""
    from launchers.on_ray import ray_train

    job = network.job
    assert job is not None
    torch.manual_seed(job.seed)
    settings = job.training
    choice = choice_for(here, network)
    engine = _engine(here, network, job)
    engine.reads = _reads(here, network)
    index = training_images(here, network)
    annotate = targets(here, network, choice, engine.module.features)
    steps, warmup = settings.lengths(steps_per_epoch(here, network, index))
    batches = training_batches(here, network, index, steps)
    depends_on = digests(here, network)
    start = 0
    if saving.resume is not None:
        expected = saved_digests(here, network, saving.resume)
        restored = checkpoint.load(engine, saving.resume, digests=expected)
        batches.load_state_dict(restored.loader_state)
        start = restored.step
    tracker = tracking.attach(str(journals)) if here.rank == 0 else None
    used = _shares_of_peak(here, network, job, choice) if here.rank == 0 else (0.0, 0.0)
    title = ", ".join((title, *_details(settings, choice)))

    def on_log(record: LogRecord) -> None:
        ray_train.progress({"title": title, **dataclasses.asdict(record)})
        if tracker is not None:
            logged = _logged(record, here, used[_is_on_labels_alone(job, record.step, steps)])
            named = {f"{network.name}/{k}": v for k, v in logged.items()}
            tracker.log_metrics(named, record.step)

    at_the_end: list[Accuracy] = []

    def on_checkpoint(step: int) -> None:
        top1 = None
        if here.recipe.checkpoints.keep_best and not saving.ending:
            so_far = _scores_so_far(here, network, engine)
            top1 = so_far.top1
            if step == steps:
                at_the_end.append(so_far)
            elif tracker is not None:
                tracker.log_metrics(_scores(network.name, so_far), step)
        state = batches.state_dict()
        saving.save(engine, step=step, loader_state=state, digests=depends_on, top1=top1)

    fit(
        engine,
        _watched(here, network, engine, _scheduled(job, batches, engine, start, steps), start),
        steps=steps,
        start_step=start,
        lr_at=learning_rates(job, steps, warmup),
        log=Every(settings.log_every, on_log),
        checkpoint=saving.every(settings.checkpoint_every, on_checkpoint),
        annotate=annotate,
    )
    batches.close()
    scores = _finished(here, network, engine, at_the_end[0] if at_the_end else None)
    if tracker is not None:
        tracker.log_metrics(_scores(network.name, scores), steps)
        tracker.flush()
    dist.barrier()
    taught = {} if choice is None else {"targets": choice.targets, "because": choice.reason}
    measured = {"top1": scores.top1, "loss": scores.loss}
    return {**measured, "steps": steps, "from_step": start, **taught}


def _details(settings: Training, choice: Choice | None) -> list[str]:
    """What stands beside a training's name while it runs."""
    teachers = [] if choice is None else [f"{choice.targets} teachers"]
    # Beside the steps that they are.
    return teachers + ([] if settings.epochs is None else [settings.length])


def _finished(here: Context, network: Network, engine: Any, known: Accuracy | None) -> Accuracy:
    """Save the weights of a training that is done; its scores, unless they are `known`."""
    synchronise_batchnorm(engine.module)
    if engine.average is not None:
        engine.average.synchronise()
    trained = _trained(here, network, engine, averaged=engine.average is not None)
    scores = known or accuracy(trained, validation(here, network.view), here.device)
    if here.rank == 0:
        save_weights(trained, network.weights)
    return scores


def _is_on_labels_alone(job: Job, step: int, steps: int) -> bool:
    """Whether a step is one of the last, of `steps`, in which a student has no teachers."""
    return job.distill is not None and step > job.distill.steps_with_teachers(steps)


def _shares_of_peak(
    here: Context, network: Network, job: Job, choice: Choice | None
) -> tuple[float, float]:
    """What share of a device's arithmetic one image a second and worker takes.

    With teachers and all views, and in the last steps, on labels alone.
    """
    beside: tuple[Network, ...] = ()
    if choice is not None and choice.targets == "live":
        beside = here.networks.teachers
    elif job.distill is not None and job.distill.features is not None:
        beside = (here.networks.compressed,)
    views = 2 if job.distill is not None and job.distill.consistency is not None else 1
    with torch.random.fork_rng(devices=[]):  # weights are drawn, and thrown away
        own, *others = (
            count(build_network(one, here.num_classes, None), one.input_shape).macs
            for one in (network, *beside)
        )
    peak = peak_macs_per_s(here.device, job.training.precision)
    asked = sum(one.asked.views * macs for one, macs in zip(beside, others, strict=True))
    return (views * TRAINING_PASSES * own + asked) / peak, TRAINING_PASSES * own / peak


def _logged(record: LogRecord, here: Context, used: float) -> dict[str, float]:
    """What MLflow gets of a log record; `used`: see _shares_of_peak."""
    device = here.device
    values = {**record.parts, "lr": record.lr, "images_per_s": record.images_per_s}
    values["mfu"] = used * record.images_per_s / here.world_size
    values |= {f"seconds/{part}": time for part, time in record.seconds.items()}
    if record.left_out:
        values["skipped_steps"] = record.left_out
    if device.type == "cuda":
        values["gpu_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return values


def _engine(here: Context, network: Network, job: Job) -> Any:
    """The engine that trains a network."""
    settings = job.training
    passes = settings.passes(here.world_size, pairs=here.recipe.data.augmentation.mixes)
    # Images come in channels_last, which the layers keep; the weights stay contiguous, as ZeRO lays
    # them out in one flat buffer.
    student = build_network(network, here.num_classes, job.start).to(here.device)
    if settings.sync_batchnorm:
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    freeze(student, settings.freeze)
    if settings.compile:
        student.compile()
    return build_engine(
        task_for(here, network, student),
        settings.optimizer,
        micro_batch=settings.batch_size // here.world_size // passes,
        accumulation=passes,
        zero_stage=settings.zero_stage,
        precision=settings.precision,
        skip_bad_steps=settings.skip_bad_steps,
        ema=settings.ema,
    )


def _scheduled(
    job: Job, batches: Iterable[Batch], engine: Any, start: int, steps: int
) -> Iterable[Batch]:
    """Return `batches`, with the progress of the training where a weight of its loss changes."""
    if job.distill is None or not job.distill.weights_change:
        return batches
    passes = engine.gradient_accumulation_steps()
    # Of the part that has teachers: labels alone have no weights that could change.
    taught = job.distill.steps_with_teachers(steps)
    return with_progress(batches, start=start, steps=taught, passes=passes)


def _watched(
    here: Context, network: Network, engine: Any, batches: Iterable[Batch], start: int
) -> Iterable[Batch]:
    """Return `batches`, with a profiler's trace of the steps that the recipe names, if any."""
    assert network.job is not None
    steps = network.job.training.profile_steps
    if steps is None:
        return batches
    trace = here.folder.logs / f"{network.name}-rank-{here.rank}.trace.json"
    passes = engine.gradient_accumulation_steps()
    return profiled(batches, steps, trace, start_step=start, passes=passes)


def _scores_so_far(here: Context, network: Network, engine: Any) -> Accuracy:
    """Evaluate a network in the middle of its training, of which nothing is changed."""
    devices = [here.device] if here.device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # building a network draws weights
        copy = _trained(here, network, engine, averaged=engine.average is not None)
    synchronise_batchnorm(copy)
    return accuracy(copy, validation(here, network.view), here.device)


def _trained(here: Context, network: Network, engine: Any, *, averaged: bool) -> nn.Module:
    """The network with the weights of an engine, or their average, as it is without an engine."""
    # Without its projections of features, which the loss alone needs.
    task = DistillationTask(build_network(network, here.num_classes, None))
    state = whole_state(engine, averaged=averaged)
    task.load_state_dict({k: v for k, v in state.items() if k.startswith("student.")})
    return task.student.to(here.device)


def digests(here: Context, network: Network) -> dict[str, str]:
    """What a checkpoint of a network's training depends on."""
    plan = {} if network.plan is None else {"plan": Plan.load(network.plan).digest()}
    recipe = locks.digest(_reads(here, network))
    return {"recipe": recipe, "data": here.index.digest, "training": network.name} | plan


def _reads(here: Context, network: Network) -> locks.Values:
    return _locked(locks.read_by(locks.values_of(here.recipe.identity()), network.reads))


def _locked(values: locks.Values) -> locks.Values:
    """Return those of a recipe's values that a training must go on with."""
    return {key: value for key, value in values.items() if not key.endswith(_FREE)}


def saved_digests(here: Context, network: Network, checkpoint_folder: Path) -> dict[str, str]:
    """What a checkpoint must depend on to be gone on from.

    Versions before noted the digest of the whole recipe, or of all that the training reads, its
    length included; where that is the same, it fits as well. They did not note the plan. Where keys
    were locked that are free now, the values that it noted decide.
    """
    depends_on = digests(here, network)
    saved = read_manifest(checkpoint_folder).digests
    if "plan" not in saved:
        depends_on.pop("plan", None)
    values = locks.values_of(here.recipe.identity())
    before = locks.digest(locks.read_by(values, network.reads, all_keys=True))
    if saved.get("recipe") in (before, here.recipe.digest()):
        depends_on["recipe"] = saved["recipe"]
    if saved.get("recipe") != depends_on["recipe"]:
        by = checkpoint.written(checkpoint_folder)
        if by is not None and by.reads and _locked(by.reads) == _reads(here, network):
            depends_on["recipe"] = saved["recipe"]
    return depends_on


def _scores(name: str, scores: Accuracy) -> dict[str, float]:
    values = {f"{name}/top1": scores.top1, f"{name}/validation_loss": scores.loss}
    return values | ({f"{name}/top5": scores.top5} if scores.top5 is not None else {})
