"""Progress of long work, reported to the caller."""

from collections.abc import Callable, Iterator

from torch import Tensor

from sbf_dist.compression.calibration import Calibration

Progress = Callable[[str, int, int], None]  # what, done, of


def report(progress: Progress | None, what: str, done: int, of: int) -> None:
    """Call `progress`, if there is one."""
    if progress is not None:
        progress(what, done, of)


def reported(
    progress: Progress | None, what: str, images: Calibration, first: int
) -> Iterator[Tensor]:
    """Give the first images for passes with gradients, and report how far that is."""
    done, of = 0, min(first, images.count)
    # A graph of gradients is about as large again as the features.
    for part in images.parts(images.part // 2, first):
        report(progress, what, min(done, of), of)
        yield part
        done += len(part)
    report(progress, what, of, of)
