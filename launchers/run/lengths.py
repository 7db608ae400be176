"""How long the trainings of a run are, once its images are known."""

from collections.abc import Mapping

from launchers.run.networks import DENSE, SBF_LABELS, Networks
from launchers.run.objective import learning_rates
from launchers.run.shares import epoch_steps
from sbf_dist.errors import UserError


def check_lengths(networks: Networks, images: Mapping[str, int]) -> None:
    """UserError, with its key, for a training that is over before its warm-up is.

    `images` are the numbers of images of the parts. Where a student uses fewer, its epochs are
    shorter, which is for its worker to find.
    """
    pairs = networks.recipe.data.augmentation.mixes
    for network in networks:
        job = network.job
        if job is None:
            continue
        try:
            steps, warmup = job.training.lengths(epoch_steps(job, images, pairs=pairs))
            learning_rates(job, steps, warmup)
        except UserError as error:
            raise UserError(f"{_key(networks, network.name)}: {error}") from None


def _key(networks: Networks, name: str) -> str:
    """Return where in a recipe the training of a network is set."""
    teachers = [teacher.name for teacher in networks.teachers]
    if name in teachers:
        return f"teachers.{teachers.index(name)}.training"
    return "baselines" if name in (DENSE, SBF_LABELS) else "distill.training"
