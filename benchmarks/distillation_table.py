"""The rows of the benchmark of distillation: means over seeds, as a table and as a picture."""

import statistics
from pathlib import Path
from typing import Any

from rich.table import Table

Row = dict[str, Any]
KEY = ("data", "labels_per_class", "method")
REFERENCE = "supervised"


def summarise(cells: list[Row]) -> list[Row]:
    """Return a row for each set, number of labels and method: top-1 over the seeds, per cent."""
    groups: dict[tuple, list[Row]] = {}
    for cell in cells:
        groups.setdefault(tuple(cell[key] for key in KEY), []).append(cell)
    rows = []
    for key, members in groups.items():
        top1 = [100 * cell["top1"] for cell in members]
        row = dict(zip(KEY, key, strict=True)) | {
            "top1_mean": round(statistics.mean(top1), 2),
            "top1_std": round(statistics.stdev(top1), 2) if len(top1) > 1 else 0.0,
            "seeds": [cell["seed"] for cell in members],
        }
        if "before" in members[0]:  # of students, without training
            row["before"] = round(100 * statistics.mean(cell["before"] for cell in members), 2)
        rows.append(row)
    return rows


def table(rows: list[Row]) -> Table:
    """Lay the rows out: a line for each method, a column for each set and number of labels."""
    columns = list(dict.fromkeys((row["data"], row["labels_per_class"]) for row in rows))
    result = Table("top-1 %", *(f"{data}, {labels}" for data, labels in columns))
    for method in dict.fromkeys(row["method"] for row in rows):
        found = {(r["data"], r["labels_per_class"]): r for r in rows if r["method"] == method}
        result.add_row(
            method,
            *(
                f"{found[c]['top1_mean']:.1f} ± {found[c]['top1_std']:.1f}" if c in found else ""
                for c in columns
            ),
        )
    return result


def draw(rows: list[Row], path: Path) -> None:
    """Draw how far each row is from the supervised student, a panel for each set."""
    import matplotlib.pyplot as plt

    sets = list(dict.fromkeys(row["data"] for row in rows))
    labels = sorted({row["labels_per_class"] for row in rows})
    methods = [m for m in dict.fromkeys(row["method"] for row in rows) if m != REFERENCE]
    figure, axes = plt.subplots(1, len(sets), figsize=(11, 4.8), sharey=True, layout="constrained")
    for name, axis in zip(sets, axes, strict=True):
        for number, count in enumerate(labels):
            found = {
                row["method"]: row
                for row in rows
                if (row["data"], row["labels_per_class"]) == (name, count)
            }
            shown = [m for m in methods if m in found and REFERENCE in found]
            axis.errorbar(
                [found[m]["top1_mean"] - found[REFERENCE]["top1_mean"] for m in shown],
                [methods.index(m) + 0.22 * (number - 1) for m in shown],
                xerr=[found[m]["top1_std"] for m in shown],
                fmt="o",
                capsize=2,
                label=f"{count} labels a class",
            )
        axis.axvline(0, color="grey", linewidth=1)
        axis.set_title(name)
        axis.set_xlabel("points above the supervised student")
        axis.grid(alpha=0.3)
    axes[0].set_yticks(range(len(methods)), methods)
    axes[0].invert_yaxis()
    figure.legend(
        *axes[-1].get_legend_handles_labels(), loc="outside upper center", ncols=len(labels)
    )
    figure.savefig(path, dpi=110)
