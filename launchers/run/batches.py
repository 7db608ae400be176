"""What a network of a run trains on: its images, in batches, and its targets."""

from collections.abc import Callable, Iterable, Iterator

import torch

from launchers.estimate.teachers import Choice
from launchers.run.network import Network
from launchers.run.predictions import add_stored_targets, selected_images, sharper
from launchers.run.shares import divided, epoch_steps, step_shares
from launchers.run.worker import Batch, Context, ensemble_of, reader
from pipelines.index import DataIndex
from pipelines.joined import JoinedLoader, LoadersInTurn
from pipelines.loader import TrainLoader
from sbf_dist.distill.features import FeatureLoss
from sbf_dist.distill.live import feature_targets, live_targets
from sbf_dist.distill.mixup import mixup
from sbf_dist.distill.teachers import TeacherEnsemble
from sbf_dist.settings import Augmentation, View
from sbf_dist.train.loop import Annotation

LABELS_ALONE = "labels_alone"  # marks batches of the last steps, where no teacher is asked


def training_images(here: Context, network: Network) -> DataIndex:
    """Return the images that a network trains on: for a student those that were selected."""
    assert network.job is not None
    if network.job.distill is None:
        return here.index
    return selected_images(here, network.name)


def targets(
    here: Context, network: Network, choice: Choice | None, features: FeatureLoss | None
) -> Annotation:
    """Return what adds the targets to a network's batches.

    Where images are mixed (mixup, cutmix), stored targets are mixed with them; live teachers see
    the mixed images.
    """
    before: list[Callable[[Batch], Batch]] = []
    after: list[Callable[[Batch], Batch]] = []
    if choice is not None and choice.targets == "stored":
        before.append(add_stored_targets(here))
    live = ensemble_of(here) if choice is not None and choice.targets == "live" else None
    if features is not None:
        after = _with_features(here, network.view, features.layers, live)
    elif live is not None:
        after.append(live_targets(live, network.view))
    if live is not None:
        after.append(lambda batch: sharper(batch, here.recipe.pseudo_labels.sharpening))

    def annotate(batch: Batch) -> Batch:
        if LABELS_ALONE in batch:
            return mixup(batch)
        for step in (*before, mixup, *after):
            batch = step(batch)
        return batch

    return Annotation(annotate, live)


def _with_features(
    here: Context, view: View, layers: list[str], ensemble: TeacherEnsemble | None
) -> list[Callable[[Batch], Batch]]:
    """What adds the features of the compressed teacher, and the predictions of a live ensemble.

    Where it is among the teachers that are asked, it is run once. In a round of self-training it
    may be none of them.
    """
    compressed = here.networks.compressed
    if ensemble is None:
        return [feature_targets(ensemble_of(here, [compressed]), 0, view, layers, None)]
    live = live_targets(ensemble, view)
    names = [member.name for member in ensemble.members]
    if compressed.name in names:
        return [feature_targets(ensemble, names.index(compressed.name), view, layers, live)]
    alone = ensemble_of(here, [compressed])
    return [live, feature_targets(alone, 0, view, layers, None)]


def training_batches(
    here: Context, network: Network, index: DataIndex, steps: int
) -> JoinedLoader | LoadersInTurn:
    """Return the batches of a training of so many steps: for a student also of unlabelled images.

    With `distill.labels_last` the last of them are of labelled images alone. UserError: the workers
    cannot share the images of a step out as the recipe divides them.
    """
    job = network.job
    assert job is not None
    shares = step_shares(job, sizes(index), pairs=here.recipe.data.augmentation.mixes)
    distill = job.distill
    strong = None
    if distill is not None and distill.consistency is not None:
        strong = distill.consistency.strong_views(here.recipe.data.augmentation)
    batches = _joined(here, network, index, shares, strong)
    if distill is None or distill.labels_last is None:
        return batches
    size = job.training.batch_size
    return LoadersInTurn(
        batches,
        _joined(here, network, index, {"labelled": size}, None),
        samples=distill.steps_with_teachers(steps) * size,
        mark=LABELS_ALONE,
    )


def _joined(
    here: Context,
    network: Network,
    index: DataIndex,
    shares: dict[str, int],
    strong: Augmentation | None,
) -> JoinedLoader:
    """The batches of so many images of each part and step, all workers together."""
    job = network.job
    assert job is not None
    augmentation = here.recipe.data.augmentation
    divisor = here.world_size * job.training.passes(here.world_size, pairs=augmentation.mixes)
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
                strong=strong,
            )
            for part, size in divided(shares, divisor, pairs=augmentation.mixes).items()
        ]
    )


def with_progress(
    batches: Iterable[Batch], *, start: int, steps: int, passes: int
) -> Iterator[Batch]:
    """Add "progress" to batches: 0 in the first of `steps` steps, 1 in the last and after it.

    `passes` batches make a step.
    """
    for number, batch in enumerate(batches, start * passes):
        share = min(1.0, number // passes / max(1, steps - 1))
        yield batch | {"progress": torch.tensor(share)}


def steps_per_epoch(here: Context, network: Network, index: DataIndex) -> float:
    """How many steps it takes until each image that a network trains on was seen once."""
    assert network.job is not None
    return epoch_steps(network.job, sizes(index), pairs=here.recipe.data.augmentation.mixes)


def sizes(index: DataIndex) -> dict[str, int]:
    """Return the number of images of each part."""
    return {part: len(ids) for part, ids in index.parts.items()}
