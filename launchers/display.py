"""What a user sees while a run works: bars on a terminal, plain lines elsewhere."""

import sys
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

SECONDS_BETWEEN_LINES = 10.0  # of progress, where there is no terminal


class Display:
    """Writes progress, lines and tables to the terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        is_standard = self.console.file in (sys.stdout, sys.stderr)
        self._bars = Progress(
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
            redirect_stdout=is_standard,
            redirect_stderr=is_standard,
        )
        self._task: TaskID | None = None
        self._title = ""
        self._begun = (0.0, 0)  # when the bar's title was first seen, and at which step
        self._last_line = time.monotonic()

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
        """Show progress: "title", "step" of "steps" (None: unknown), and what is known besides.

        That is "rate", in words, and "seconds_left", which are estimated where they are missing,
        and a training's "parts" of the loss and "images_per_s". Where there is no terminal, a line
        comes every SECONDS_BETWEEN_LINES at most, so that what is done sooner has none.
        """
        title, step, steps = record["title"], record["step"], record["steps"]
        now = time.monotonic()
        if title != self._title:
            self._clear()
            self._title, self._begun = title, (now, step)
        detail, seconds_left = self._pace(record, now)
        if self.console.is_terminal:
            if self._task is None:
                self._task = self._bars.add_task(title, total=steps, detail="")
            self._bars.update(self._task, completed=step, total=steps, detail=detail)
            return
        if steps is None or now - self._last_line < SECONDS_BETWEEN_LINES:
            return
        left = "" if seconds_left is None else f"{seconds_left:.0f} s left"
        self.say("  ".join(filter(None, [f"  {title}: {step}/{steps}", detail, left])))
        self._last_line = now

    def wait(self, title: str) -> None:
        """Show on a terminal that something goes on of which no steps are known."""
        self.show({"title": title, "step": 0, "steps": None})

    @contextmanager
    def stage(self, number: int, of: int, name: str) -> Iterator[None]:
        """Announce a stage, and say how long it took."""
        self.say(f"[{number}/{of}] {name}", style="bold")
        start = self._last_line = time.monotonic()
        yield
        self._clear()
        self.say(f"  done in {time.monotonic() - start:.1f} s")

    def _pace(self, record: Mapping[str, Any], now: float) -> tuple[str, float | None]:
        """Return what is known of the pace in words, with the loss, and the seconds left."""
        seconds_left = record.get("seconds_left")
        if "parts" in record:
            detail = f"loss {record['parts']['loss']:.3f}  {record['images_per_s']:.0f} images/s"
            return detail, seconds_left
        since, first = self._begun
        seconds, done = now - since, record["step"] - first
        rate = done / seconds if seconds > 0 else 0.0
        if seconds_left is None and rate > 0:
            seconds_left = (record["steps"] - record["step"]) / rate
        words = f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s"
        return record.get("rate", words if rate > 0 else ""), seconds_left

    def _clear(self) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None
        self._title = ""


def labels_table(report: Mapping[str, Any]) -> Table:
    """Return what sbf_dist.report.labels.describe says of each part, in percent (- if unknown)."""
    table = Table(box=None, pad_edge=False)
    table.add_column("part", no_wrap=True)
    for heading in ("images", "confidence", "teachers agree", "accuracy", "ECE"):
        table.add_column(heading, justify="right")
    for row in report["parts"]:
        shares = (row[key] for key in ("confidence", "agreement", "accuracy", "ece"))
        percent = ["-" if share is None else f"{100 * share:.1f} %" for share in shares]
        table.add_row(row["part"], str(row["images"]), *percent)
    return table


def results_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of results: accuracy in percent (- if unknown), millions of MACs, …

    agrees % and KL compare with the dense network's predictions; they need no labels. An "error" is
    that of other outputs, in percent of their variance; where rows have no agreement, it stands in
    its place. A latency that is None stands for a machine that was too busy to measure it.
    """
    has_error = any(row.get("error") is not None for row in rows)
    has_classes = not has_error or any(row.get("agreement") is not None for row in rows)
    compared = (*(("agrees %", "KL") if has_classes else ()), *(("error %",) if has_error else ()))
    table = Table(box=None, pad_edge=False)  # without lines it fits 80 characters
    table.add_column("network", no_wrap=True)
    for heading in ("top-1 %", *compared, "MACs (M)", "params (k)", "latency (ms)"):
        longest = max(map(len, heading.split()))
        table.add_column(heading, justify="right", min_width=max(5, longest))
    for row in rows:
        agreement, kl = row.get("agreement"), row.get("kl")  # an older version has none
        error = row.get("error")
        likeness = {
            "agrees %": "-" if agreement is None else f"{100 * agreement:.1f}",
            "KL": "-" if kl is None else f"{kl:.3f}",
            "error %": "-" if error is None else f"{100 * error:.2f}",
        }
        table.add_row(
            row["name"],
            "-" if row["top1"] is None else f"{100 * row['top1']:.1f}",
            *(likeness[heading] for heading in compared),
            f"{row['macs'] / 1e6:.2f}",
            f"{row['params'] / 1e3:.1f}",
            "machine busy" if row["latency_ms"] is None else f"{row['latency_ms']:.2f}",
        )
    return table
