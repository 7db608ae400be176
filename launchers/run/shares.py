"""How the images of a step are shared out: among parts, and among workers."""

import math
from collections.abc import Mapping

from launchers.run.networks import Job
from pipelines.joined import shares_of_batch
from sbf_dist.errors import UserError


def step_shares(job: Job, images: Mapping[str, int], *, pairs: bool) -> dict[str, int]:
    """How many images of each part a step has, all workers together; `pairs`: they are mixed.

    `images` are the numbers of images of the parts.
    """
    total = job.training.batch_size
    if job.distill is None or not images["unlabelled"]:
        return {"labelled": total}
    sizes = shares_of_batch(total, job.distill.labelled_share, pairs=pairs)
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


def epoch_steps(job: Job, images: Mapping[str, int], *, pairs: bool) -> float:
    """How many steps it takes until each image that a network trains on was seen once."""
    shares = step_shares(job, images, pairs=pairs)
    return max(images[part] / size for part, size in shares.items())
