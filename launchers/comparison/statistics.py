"""Means and deviations over the seeds of a comparison, and their table."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from launchers.comparison.trials import DENSE, Result
from sbf_dist.peers.methods import TITLES


def summarise(results: Sequence[Mapping[str, Any]]) -> list[Result]:
    """Return a row for each method, cost and length of training: mean and deviation of the seeds.

    Rows are in the order of `results`, with "method", "title", "macs" (the target), "reached"
    (mean share of the dense network's multiply-adds), "trained_steps", "top1_mean", "top1_std"
    (of the sample; 0 for one seed) and "seeds". A method that could not get there with each seed
    has the reason as "refused" and no figures.
    """
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["method"], result["macs"]), []).append(result)
    rows: list[Result] = []
    for (method, macs), group in groups.items():
        title = "dense" if method == DENSE else TITLES[method]  # type: ignore[index]
        row: Result = {"method": method, "title": title, "macs": macs, "seeds": len(group)}
        refused = next((r["refused"] for r in group if r["refused"]), None)
        if refused is not None:
            rows.append(row | {"refused": refused})
            continue
        row["reached"] = statistics.mean(r["reached"] for r in group)
        for steps in group[0]["top1"]:
            top1 = [r["top1"][steps] for r in group]
            figures = {
                "trained_steps": int(steps),
                "top1_mean": statistics.mean(top1),
                "top1_std": statistics.stdev(top1) if len(top1) > 1 else 0.0,
            }
            rows.append(row | figures)
    return rows


def comparison_table(rows: list[Mapping[str, Any]]) -> Table:
    """Return the table of a comparison: a line for each method and cost, a column per length."""
    lengths = sorted({row["trained_steps"] for row in rows if "trained_steps" in row})
    table = Table()
    table.add_column("method", no_wrap=True)
    table.add_column("MACs %", justify="right")
    for steps in lengths:
        table.add_column(f"top-1 %, {steps} steps", justify="right")
    lines: dict[tuple[str, float], dict[int, str]] = {}
    costs: dict[tuple[str, float], str] = {}
    for row in rows:
        key = (row["title"], row["macs"])
        if row.get("refused"):
            costs[key], lines[key] = f"{100 * row['macs']:.0f}", dict.fromkeys(lengths, "—")
            continue
        costs[key] = f"{100 * row['reached']:.1f}"
        figure = f"{100 * row['top1_mean']:.1f}"
        if row["seeds"] > 1:
            figure += f" ± {100 * row['top1_std']:.1f}"
        lines.setdefault(key, {})[row["trained_steps"]] = figure
    last = None
    for key, figures in lines.items():
        if last is not None and key[1] != last:
            table.add_section()
        last = key[1]
        table.add_row(key[0], costs[key], *(figures[steps] for steps in lengths))
    return table
