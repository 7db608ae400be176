"""The first lines of the page: what a run came to, as tiles, and the table of results."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sbf_dist.report.contents import Missing, RunContents
from sbf_dist.report.cost_charts import row_color, row_label

NONE = "-"
COLUMNS = ("top-1 %", "agrees %", "KL", "MACs (M)", "params (k)", "time (ms)")


@dataclass(frozen=True)
class Tile:
    """One figure of a run, with what it is compared with."""

    title: str
    figure: str
    beside: str


@dataclass(frozen=True)
class TableRow:
    """One line of the table of results; `cells` belong to COLUMNS."""

    label: str
    color: str
    name: str
    cells: tuple[str, ...]
    is_student: bool


def tiles(run: RunContents) -> list[Tile]:
    """Return what the student came to, beside the network that was compressed."""
    student, dense = run.student, run.row(run.compressed)
    if student is None or dense is None:
        return []
    found = []
    if student["top1"] is not None and dense["top1"] is not None:
        points = 100 * (student["top1"] - dense["top1"])
        found.append(
            Tile(
                "top-1 accuracy",
                f"{100 * student['top1']:.1f} %",
                f"{points:+.1f} points beside {100 * dense['top1']:.1f} % dense",
            )
        )
    found.append(
        Tile(
            "multiply-adds",
            f"{100 * student['macs'] / dense['macs']:.0f} %",
            f"{student['macs'] / 1e6:.2f} of {dense['macs'] / 1e6:.2f} M",
        )
    )
    found.append(
        Tile(
            "parameters",
            f"{100 * student['params'] / dense['params']:.0f} %",
            f"{student['params'] / 1e3:.1f} of {dense['params'] / 1e3:.1f} k",
        )
    )
    after, before = student.get("latency_ms"), dense.get("latency_ms")
    if after is not None and before is not None:
        found.append(
            Tile(
                "time of one image",
                f"{100 * after / before:.0f} %",
                f"{after:.2f} of {before:.2f} ms",
            )
        )
    if student.get("agreement") is not None:
        found.append(
            Tile(
                "same class as dense",
                f"{100 * student['agreement']:.1f} %",
                f"of {student['count']} validation images",
            )
        )
    return found


def verdict(run: RunContents) -> str:
    """Say in a sentence what the run came to, or how far it is."""
    student = run.student
    if student is None or run.row(run.compressed) is None:
        done = [stage.name for stage in run.stages if stage.done]
        return f"Not finished: done so far: {', '.join(done) or 'nothing'}."
    dense = run.row(run.compressed)
    assert dense is not None
    cost = f"{100 * student['macs'] / dense['macs']:.0f} % of its multiply-adds"
    if student["top1"] is None or dense["top1"] is None:
        return f"{dense['name']} became “{student['name']}” with {cost}."
    return (
        f"{dense['name']}, {100 * dense['top1']:.1f} % right, became “{student['name']}”, "
        f"{100 * student['top1']:.1f} % right, with {cost}."
    )


def table_rows(runs: Sequence[tuple[str, RunContents]]) -> list[TableRow]:
    """Return the table of all runs, each with a letter ("" for one alone)."""
    found = []
    for number, (letter, run) in enumerate(runs):
        if isinstance(run.rows, Missing):
            continue
        for place, row in enumerate(run.rows, 1):
            found.append(
                TableRow(
                    row_label(letter, place),
                    row_color(row, number, len(runs)),
                    row["name"],
                    _cells(row),
                    row is run.student,
                )
            )
    return found


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    def text(value: float | None, form: str, factor: float = 1.0) -> str:
        return NONE if value is None else format(factor * value, form)

    return (
        text(row["top1"], ".1f", 100),
        text(row.get("agreement"), ".1f", 100),  # an older version has none
        text(row.get("kl"), ".3f"),
        text(row["macs"], ".2f", 1e-6),
        text(row["params"], ".1f", 1e-3),
        text(row.get("latency_ms"), ".2f"),
    )
