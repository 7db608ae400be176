"""A profiler's trace of some steps of a training."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from torch.profiler import ProfilerActivity, profile, supported_activities

Item = TypeVar("Item")


def profiled(
    batches: Iterable[Item], steps: tuple[int, int], file: Path, *, start_step: int, passes: int
) -> Iterator[Item]:
    """Give `batches`, and write a trace of the steps from the first of `steps` up to the second.

    `start_step` is the step of the first batch, `passes` how many batches a step takes. The trace
    is JSON that chrome://tracing and ui.perfetto.dev show. It ends with the batches at the latest;
    of steps that lie before `start_step` there is none.
    """
    first, last = steps
    running: profile | None = None
    activities = supported_activities() & {ProfilerActivity.CPU, ProfilerActivity.CUDA}
    try:
        for number, batch in enumerate(batches):
            step, rest = divmod(number, passes)
            if rest == 0 and start_step + step == first:
                running = profile(activities=activities)
                running.start()
            if rest == 0 and start_step + step == last and running is not None:
                _write(running, file)
                running = None
            yield batch
    finally:
        if running is not None:
            _write(running, file)


def _write(running: profile, file: Path) -> None:
    running.stop()
    file.parent.mkdir(parents=True, exist_ok=True)
    running.export_chrome_trace(str(file))
