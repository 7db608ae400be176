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
    (of the sample; 0 for one seed), "seeds", and "agreement_mean" and "kl_mean" with the dense
    network (missing in results of a version that did not measure them). A method that could not get
    there with each seed has the reason as "refused" and no figures.
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
            figures: Result = {
                "trained_steps": int(steps),
                "top1_mean": statistics.mean(top1),
                "top1_std": statistics.stdev(top1) if len(top1) > 1 else 0.0,
            }
            for key in ("agreement", "kl"):
                known = [r[key][steps] for r in group if key in r]
                if known:
                    figures[f"{key}_mean"] = statistics.mean(known)
            rows.append(row | figures)
    return rows


def comparison_table(rows: list[Mapping[str, Any]]) -> Table:
    """Return the table of a comparison: a line for each method and cost, a column per length.

    Before any training, also how far the predictions agree with the dense network's.
    """
    lengths = sorted({row["trained_steps"] for row in rows if "trained_steps" in row})
    table = Table()
    table.add_column("method", no_wrap=True)
    table.add_column("MACs %", justify="right")
    for steps in lengths:
        table.add_column(f"top-1 %, {steps} steps", justify="right")
        if steps == 0:
            table.add_column("agrees %", justify="right")
            table.add_column("KL", justify="right")
    lines: dict[tuple[str, float], dict[int, list[str]]] = {}
    costs: dict[tuple[str, float], str] = {}
    for row in rows:
        key = (row["title"], row["macs"])
        if row.get("refused"):
            costs[key] = f"{100 * row['macs']:.0f}"
            lines[key] = {steps: ["—"] * (1 if steps else 3) for steps in lengths}
            continue
        costs[key] = f"{100 * row['reached']:.1f}"
        figure = f"{100 * row['top1_mean']:.1f}"
        if row["seeds"] > 1:
            figure += f" ± {100 * row['top1_std']:.1f}"
        cells = [figure]
        if row["trained_steps"] == 0:
            agreement, kl = row.get("agreement_mean"), row.get("kl_mean")
            cells.append("-" if agreement is None else f"{100 * agreement:.1f}")
            cells.append("-" if kl is None else f"{kl:.3f}")
        lines.setdefault(key, {})[row["trained_steps"]] = cells
    last = None
    for key, figures in lines.items():
        if last is not None and key[1] != last:
            table.add_section()
        last = key[1]
        table.add_row(key[0], costs[key], *(cell for steps in lengths for cell in figures[steps]))
    return table
