"""What a network of a run trains on: its images, in batches, and its targets."""

from collections.abc import Callable

from launchers.run.networks import Network
from launchers.run.predictions import add_stored_targets, selected_images, sharper
from launchers.run.shares import divided, epoch_steps, step_shares
from launchers.run.worker import Batch, Context, ensemble_of, reader
from pipelines.index import DataIndex
from pipelines.joined import JoinedLoader
from pipelines.loader import TrainLoader
from sbf_dist.distill.mixup import mixup
from sbf_dist.settings import View


def targets(here: Context, network: Network) -> tuple[DataIndex, Callable[[Batch], Batch]]:
    """Return the images that a network trains on and what adds the targets to its batches.

    Where images are mixed (mixup, cutmix), their targets are mixed with them.
    """
    job = network.job
    assert job is not None
    if job.targets == "labels":
        return here.index, mixup
    index = selected_images(here, network.name)
    if job.targets == "live":
        live = _live_targets(here, network.view)
        return index, lambda batch: live(mixup(batch))  # the teachers see the mixed images
    join = add_stored_targets(here)
    return index, lambda batch: mixup(join(batch))


def _live_targets(here: Context, view: View) -> Callable[[Batch], Batch]:
    ensemble = ensemble_of(here)
    temperature = here.recipe.pseudo_labels.sharpening
    return lambda batch: sharper(batch | {"teacher": ensemble(batch["image"], view)}, temperature)


def training_batches(here: Context, network: Network, index: DataIndex) -> JoinedLoader:
    """Return the training batches: labelled images and, with teachers, unlabelled ones.

    UserError: the workers cannot share the images of a step out as the recipe divides them.
    """
    job = network.job
    assert job is not None
    augmentation = here.recipe.data.augmentation
    divisor = here.world_size * job.training.passes(here.world_size, pairs=augmentation.mixes)
    shares = step_shares(job, sizes(index), pairs=augmentation.mixes)
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


def steps_per_epoch(here: Context, network: Network, index: DataIndex) -> float:
    """How many steps it takes until each image that a network trains on was seen once."""
    assert network.job is not None
    return epoch_steps(network.job, sizes(index), pairs=here.recipe.data.augmentation.mixes)


def sizes(index: DataIndex) -> dict[str, int]:
    """Return the number of images of each part."""
    return {part: len(ids) for part, ids in index.parts.items()}
