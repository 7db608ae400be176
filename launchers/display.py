"""What a user sees while a run works: bars on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

SECONDS_BETWEEN_LINES = 5.0


class Display:
    """Writes progress, lines and tables to the terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._bars = Progress(
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task: TaskID | None = None
        self._title = ""
        self._last_line = 0.0

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line above the bars."""
        self.console.print(text, style=style, markup=False, soft_wrap=True)

    def show(self, record: Mapping[str, Any]) -> None:
        """Show progress: "title", "step" of "steps", "rate", "seconds_left", a training's loss."""
        title, step, steps = record["title"], record["step"], record["steps"]
        detail = _detail(record)
        if not self.console.is_terminal:
            if "seconds_left" in record:  # a bar shows it
                detail += f"  {record['seconds_left']:.0f} s left"
            now = time.monotonic()
            changed = title != self._title
            if changed or step == steps or now - self._last_line > SECONDS_BETWEEN_LINES:
                self.say(f"  {title}: {step}/{steps}{detail and '  ' + detail}")
                self._last_line = now
            self._title = title
            return
        if self._task is None or title != self._title:
            self._clear()
            self._task = self._bars.add_task(title, total=steps, detail="")
            self._title = title
        self._bars.update(self._task, completed=step, total=steps, detail=detail)

    @contextmanager
    def stage(self, number: int, of: int, name: str) -> Iterator[None]:
        """Announce a stage, and say how long it took."""
        self.say(f"[{number}/{of}] {name}", style="bold")
        start = time.monotonic()
        yield
        self._clear()
        self.say(f"  done in {time.monotonic() - start:.1f} s")

    def _clear(self) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None
        self._title = ""


def _detail(record: Mapping[str, Any]) -> str:
    if "parts" not in record:
        return str(record.get("rate", ""))
    return f"loss {record['parts']['loss']:.3f}  {record['images_per_s']:.0f} images/s"


def labels_table(report: Mapping[str, Any]) -> Table:
    """Return what sbf_dist.report.labels.describe says of each part, in percent (- if unknown)."""
    table = Table(box=None, pad_edge=False)
    table.add_column("images", no_wrap=True)
    for heading in ("number", "confidence", "teachers agree", "right", "ECE"):
        table.add_column(heading, justify="right")
    for row in report["parts"]:
        shares = (row[key] for key in ("confidence", "agreement", "accuracy", "ece"))
        percent = ["-" if share is None else f"{100 * share:.1f} %" for share in shares]
        table.add_row(row["part"], str(row["images"]), *percent)
    return table


def results_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of results: accuracy in percent (- if unknown), millions of MACs, …

    agrees % and KL compare with the dense network's predictions; they need no labels. A latency
    that is None stands for a machine that was too busy to measure it.
    """
    table = Table(box=None, pad_edge=False)  # without lines it fits 80 characters
    table.add_column("network", no_wrap=True)
    for heading in ("top-1 %", "agrees %", "KL", "MACs (M)", "params (k)", "latency (ms)"):
        longest = max(map(len, heading.split()))
        table.add_column(heading, justify="right", min_width=max(5, longest))
    for row in rows:
        agreement, kl = row.get("agreement"), row.get("kl")  # an older version has none
        table.add_row(
            row["name"],
            "-" if row["top1"] is None else f"{100 * row['top1']:.1f}",
            "-" if agreement is None else f"{100 * agreement:.1f}",
            "-" if kl is None else f"{kl:.3f}",
            f"{row['macs'] / 1e6:.2f}",
            f"{row['params'] / 1e3:.1f}",
            "machine busy" if row["latency_ms"] is None else f"{row['latency_ms']:.2f}",
        )
    return table
