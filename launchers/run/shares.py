"""How the images of a step are shared out: among parts, and among workers."""

import math
from collections.abc import Mapping

from launchers.run.folder import RunFolder
from launchers.run.network import Job
from pipelines.batch_shares import shares_of_batch
from sbf_dist.errors import UserError
from sbf_dist.recipe import Recipe

_NAMED = 8  # numbers of workers in a message


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


def has_unlabelled(recipe: Recipe, folder: RunFolder) -> bool | None:
    """Whether a run has images without labels; None: they would have to be counted."""
    is_prepared = folder.result("prepare").exists()
    known = folder.read_result("prepare").get("unlabelled") if is_prepared else None
    if known is not None:
        return bool(known)
    if recipe.data.unlabelled is not None:
        return True
    if recipe.data.labelled_per_class is None and recipe.data.split is None:
        return False
    return None


def numbers_of_workers(recipe: Recipe, *, unlabelled: bool) -> list[int]:
    """Return the numbers in the range of workers.count that divide the steps of all trainings.

    With `unlabelled` images the students' steps have both parts, each of which they divide.
    UserError, with numbers that do, where none is left.
    """
    found = [count for count in recipe.numbers_of_workers() if _divides(recipe, count, unlabelled)]
    if found:
        return found
    training, workers = recipe.distill.training, recipe.workers
    shares = _student_shares(recipe, unlabelled=unlabelled)
    common = math.gcd(*shares.values())
    fitting = [
        count
        for count in range(1, common + 1)
        if common % count == 0 and recipe.divides(count) and _divides(recipe, count, unlabelled)
    ]
    near = sorted(sorted(fitting, key=lambda n: abs(n - workers.least))[:_NAMED])
    *first, last = [str(count) for count in near] or ["no number"]
    right = f"{', '.join(first)} or {last}" if first else last
    passes = f" in {training.accumulation} passes" if training.accumulation > 1 else ""
    mixed = ", in even numbers, as mixup and cutmix need" if recipe.data.augmentation.mixes else ""
    raise UserError(
        f"workers.count = {workers.count_as_written} must divide the "
        f"{' and '.join(f'{size} {part}' for part, size in shares.items())} images of a step of "
        f"distill.training{passes}{mixed}: {right} does; or change distill.training.batch_size or "
        "distill.labelled_share"
    )


def expected_numbers_of_workers(recipe: Recipe, folder: RunFolder) -> list[int]:
    """Return numbers_of_workers as far as is known before the images are prepared.

    Where it is open whether there are images without labels: what suits both cases, if any does.
    """
    known = has_unlabelled(recipe, folder)
    try:
        return numbers_of_workers(recipe, unlabelled=known is not False)
    except UserError:
        if known is not None:
            raise
    return recipe.numbers_of_workers()


def _divides(recipe: Recipe, workers: int, unlabelled: bool) -> bool:
    pairs = recipe.data.augmentation.mixes
    passes = recipe.distill.training.passes(workers, pairs=pairs)
    try:
        divided(_student_shares(recipe, unlabelled=unlabelled), workers * passes, pairs=pairs)
    except UserError:
        return False
    return True


def _student_shares(recipe: Recipe, *, unlabelled: bool) -> dict[str, int]:
    """Return the images of each part in a step of every student, of the rounds as well."""
    job = Job("distill", recipe.distill.training, recipe.seed, distill=recipe.distill)
    pairs = recipe.data.augmentation.mixes
    return step_shares(job, {"labelled": 1, "unlabelled": int(unlabelled)}, pairs=pairs)
