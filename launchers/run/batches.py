"""What a network of a run trains on: its images, in batches, and its targets."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch

from launchers.run.networks import Job, Network
from launchers.run.worker import Batch, Context, ensemble_of, reader
from pipelines.index import DataIndex
from pipelines.joined import JoinedLoader, shares_of_batch
from pipelines.loader import TrainLoader
from sbf_dist.distill import pseudo_labels
from sbf_dist.distill.mixup import mixup
from sbf_dist.distill.selection import select
from sbf_dist.distill.task import stored_targets
from sbf_dist.errors import UserError
from sbf_dist.settings import View


def targets(here: Context, network: Network) -> tuple[DataIndex, Callable[[Batch], Batch]]:
    """Return the images that a network trains on and what adds the targets to its batches.

    Where images are mixed (mixup, cutmix), their targets are mixed with them.
    """
    job = network.job
    assert job is not None
    if job.targets == "labels":
        return here.index, mixup
    stored = pseudo_labels.load(
        here.folder.pseudo_labels, pseudo_labels.origin(here.recipe, here.index.digest)
    )
    used = select(stored.classes[:, 0], stored.probabilities[:, 0], here.recipe.pseudo_labels)
    unlabelled = here.index.parts["unlabelled"]
    chosen = unlabelled[np.isin(unlabelled, stored.ids[used])]
    index = dataclasses.replace(here.index, parts=here.index.parts | {"unlabelled": chosen})
    if job.targets == "live":
        live = _live_targets(here, network.view)
        return index, lambda batch: live(mixup(batch))  # the teachers see the mixed images
    ids, classes, probabilities = (
        torch.tensor(column, device=here.device)  # a copy: Arrow's own is read-only
        for column in (stored.ids, stored.classes, stored.probabilities)
    )
    join = stored_targets(ids, classes, probabilities, num_classes=len(index.classes))
    return index, lambda batch: mixup(join(batch))


def _live_targets(here: Context, view: View) -> Callable[[Batch], Batch]:
    ensemble = ensemble_of(here)
    return lambda batch: batch | {"teacher": ensemble(batch["image"], view)}


def training_batches(here: Context, network: Network, index: DataIndex) -> JoinedLoader:
    """Return the training batches: labelled images and, with teachers, unlabelled ones.

    UserError: the workers cannot share the images of a step out as the recipe divides them.
    """
    job = network.job
    assert job is not None
    augmentation = here.recipe.data.augmentation
    divisor = here.world_size * job.training.passes(here.world_size, pairs=augmentation.mixes)
    shares = step_shares(job, index, pairs=augmentation.mixes)
    return JoinedLoader(
        [
            TrainLoader(
                index,
                [part],
                reader(here),
                batch_size=size // divisor,
                view=network.view,
                augmentation=augmentation,
                seed=job.seed,
            )
            for part, size in divided(shares, divisor, pairs=augmentation.mixes).items()
        ]
    )


def step_shares(job: Job, index: DataIndex, *, pairs: bool) -> dict[str, int]:
    """How many images of each part a step has, all workers together; `pairs`: they are mixed."""
    total = job.training.batch_size
    if job.targets == "labels" or not len(index.parts["unlabelled"]):
        return {"labelled": total}
    sizes = shares_of_batch(total, job.labelled_share, pairs=pairs)
    return {part: size for part, size in sizes.items() if size}


def divided(shares: dict[str, int], divisor: int, *, pairs: bool) -> dict[str, int]:
    """`shares`, which workers x accumulation = `divisor` must divide, in pairs where mixed.

    Otherwise the shares would depend on the number of workers. UserError with the numbers that do.
    """
    unit = 2 if pairs else 1
    common = math.gcd(*shares.values())
    if common % (unit * divisor):
        fitting = [n for n in range(1, common // unit + 1) if common % (unit * n) == 0]
        images = " and ".join(f"{size} {part}" for part, size in shares.items())
        raise UserError(
            f"batch of {images} images: {divisor} workers x accumulation do not divide it"
            + (" into even numbers, as mixup and cutmix need" if pairs else "")
            + f"; {_listed(fitting)}, or change batch_size or labelled_share"
        )
    return shares


def _listed(numbers: list[int]) -> str:
    if not numbers:
        return "no number does"
    return f"these numbers do: {', '.join(map(str, numbers))}"


def steps_per_epoch(here: Context, network: Network, index: DataIndex) -> float:
    """How many steps it takes until each image that a network trains on was seen once."""
    assert network.job is not None
    shares = step_shares(network.job, index, pairs=here.recipe.data.augmentation.mixes)
    return max(len(index.parts[part]) / size for part, size in shares.items())
