"""What a network of a run trains on: its images, in batches, and its targets."""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from launchers.run.networks import Network
from launchers.run.worker import Batch, Context, ensemble_of, reader
from pipelines.index import DataIndex
from pipelines.joined import JoinedLoader, shares_of_batch
from pipelines.loader import TrainLoader
from sbf_dist.distill import pseudo_labels
from sbf_dist.distill.mixup import mixup
from sbf_dist.distill.selection import select
from sbf_dist.distill.task import stored_targets
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
    """Return the training batches: labelled images and, with teachers, unlabelled ones."""
    job = network.job
    assert job is not None
    total = job.training.batch_size // here.world_size // job.training.accumulation
    augmentation = here.recipe.data.augmentation
    sizes = shares_of_batch(total, job.labelled_share, pairs=augmentation.mixes)
    if job.targets == "labels" or not len(index.parts["unlabelled"]):
        sizes = {"labelled": total}
    return JoinedLoader(
        [
            TrainLoader(
                index,
                [part],
                reader(here),
                batch_size=size,
                view=network.view,
                augmentation=augmentation,
                seed=job.seed,
            )
            for part, size in sizes.items()
            if size
        ]
    )
