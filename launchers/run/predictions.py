"""The teachers' stored predictions as a training of a run uses them."""

import dataclasses
import logging
from collections.abc import Callable

import torch

from launchers.run.read_files import weights_digests
from launchers.run.worker import Batch, Context
from pipelines.index import DataIndex
from sbf_dist.distill import pseudo_labels
from sbf_dist.distill.selection import check_choice, choose, unused_classes
from sbf_dist.distill.stored_labels import StoredLabels, load
from sbf_dist.distill.task import sharpened, stored_targets

_log = logging.getLogger(__name__)


def stored_predictions(here: Context) -> StoredLabels:
    """Return the pseudo-labels of the run; UserError where its teachers or images are others."""
    weights = weights_digests(here.networks.teachers)
    origin = pseudo_labels.origin(here.recipe, here.index.digest, weights)
    return load(here.folder.pseudo_labels, origin)


def selected_images(here: Context, name: str) -> DataIndex:
    """Return the images that the training `name` uses: of those without labels the selected ones.

    Classes without an image are named in the log. UserError where no image is selected.
    """
    settings = here.recipe.pseudo_labels
    stored = stored_predictions(here)
    unlabelled = here.index.parts["unlabelled"]
    chosen = choose(stored, unlabelled, settings)
    check_choice(stored, unlabelled, chosen, settings)
    unused = unused_classes(stored, unlabelled, chosen, settings, here.index.classes)
    if unused is not None:
        _log.warning("%s: %s", name, unused)
    return dataclasses.replace(here.index, parts=here.index.parts | {"unlabelled": chosen})


def add_stored_targets(here: Context) -> Callable[[Batch], Batch]:
    """Return what adds the teachers' stored probabilities to a batch, sharpened as the recipe says.

    On a CPU the store is not copied: all ranks of a node have the same pages of memory.
    """
    stored = stored_predictions(here)
    columns = (stored.ids, stored.classes, stored.probabilities)
    on_device = (torch.from_numpy(column).to(here.device) for column in columns)
    join = stored_targets(*on_device, num_classes=here.num_classes)
    return lambda batch: sharper(join(batch), here.recipe.pseudo_labels.sharpening)


def sharper(batch: Batch, temperature: float) -> Batch:
    """Return a batch with the teachers' probabilities sharpened."""
    return batch | {"teacher": sharpened(batch["teacher"], temperature)}
