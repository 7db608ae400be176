"""Learning rates: pure functions of the step, counted from 0."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from sbf_dist.errors import UserError

ScheduleName = Literal["constant", "cosine", "step", "one_cycle"]


def warmed_up(step: int, lr: float, warmup: int) -> float:
    """`lr`, after a linear rise over the first `warmup` steps: lr/warmup, 2 lr/warmup, … lr."""
    return lr * min(1.0, (step + 1) / warmup) if warmup else lr


def constant(step: int, *, lr: float, warmup: int = 0) -> float:
    """The same learning rate throughout, after the warm-up."""
    return warmed_up(step, lr, warmup)


def cosine(step: int, *, lr: float, steps: int, warmup: int = 0, final: float = 0.0) -> float:
    """Half a cosine from lr at the end of the warm-up to final · lr at the last of `steps` steps.

    Loshchilov and Hutter 2017, "SGDR", equation 5, without restarts.
    """
    if step < warmup:
        return warmed_up(step, lr, warmup)
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    return lr * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def step_decay(
    step: int, *, lr: float, milestones: Sequence[int], factor: float = 0.1, warmup: int = 0
) -> float:
    """The learning rate times `factor` for every milestone (a step number) that is reached."""
    return warmed_up(step, lr, warmup) * factor ** sum(step >= m for m in milestones)


def one_cycle(step: int, *, lr: float, steps: int, warmup: int = 0) -> float:
    """Half a cosine from lr/25 up to lr over `warmup` steps, then one down to lr/250,000.

    Without a warm-up the rise takes three tenths of the steps. Smith and Topin 2018,
    "Super-convergence", with the numbers of torch.optim.lr_scheduler.OneCycleLR.
    """
    low, end = lr / 25, lr / 25e4
    top = (warmup or 0.3 * steps) - 1
    if step <= top:
        return _half_cosine(low, lr, step / max(top, 1))
    return _half_cosine(lr, end, min(1.0, (step - top) / max(steps - 1 - top, 1)))


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * progress))


def schedule(
    name: ScheduleName,
    *,
    lr: float,
    steps: int,
    warmup: int = 0,
    milestones: Sequence[float] = (0.5, 0.75),
    factor: float = 0.1,
) -> Callable[[int], float]:
    """The function step -> learning rate for a run of `steps` steps.

    `milestones` are fractions of the run; they and `factor` matter to "step" alone.
    UserError: a warm-up as long as the run, or an unknown name.
    """
    if not 0 <= warmup < max(1, steps):
        raise UserError(f"warmup {warmup}: must be at least 0 and less than the {steps} steps")
    match name:
        case "constant":
            return partial(constant, lr=lr, warmup=warmup)
        case "cosine":
            return partial(cosine, lr=lr, steps=steps, warmup=warmup)
        case "step":
            at = [max(1, round(fraction * steps)) for fraction in milestones]
            return partial(step_decay, lr=lr, milestones=at, factor=factor, warmup=warmup)
        case "one_cycle":
            return partial(one_cycle, lr=lr, steps=steps, warmup=warmup)
        case _:
            raise UserError(f"schedule {name!r}: must be constant, cosine, step or one_cycle")


def followed_by(
    first: Callable[[int], float], then: Callable[[int], float], *, at: int
) -> Callable[[int], float]:
    """The learning rates of `first` up to step `at`, and from it on those of `then`, from its 0."""
    return lambda step: first(step) if step < at else then(step - at)
