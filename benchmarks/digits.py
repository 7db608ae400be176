"""The demo's figures over several seeds: mean and deviation of each row of its table.

A seed chooses the labelled images, the initial weights and the order of the images.
"""

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from sbf_dist.provenance import origin

ROOT = Path(__file__).parents[1]


def run_seed(seed: int, runs: Path) -> dict:
    """Run the demo's recipe with `seed`, or read its results if it was run before."""
    name = f"digits-seed-{seed}"
    command = [
        str(Path(sys.executable).with_name("sbf")),
        "run",
        str(ROOT / "recipes" / "digits.yaml"),
        "--runs",
        str(runs),
        f"name={name}",
        f"seed={seed}",
    ]
    subprocess.run(command, check=True)
    stages = runs / name / "stages"
    seconds = {path.stem: json.loads(path.read_text())["seconds"] for path in stages.glob("*.json")}
    return {
        "seed": seed,
        "rows": json.loads((runs / name / "summary.json").read_text())["rows"],
        "seconds": seconds,
    }


def summarise(results: list[dict]) -> list[dict]:
    """Return a row for each network: top-1 mean and deviation, costs of the first seed."""
    rows = []
    for index, first in enumerate(results[0]["rows"]):
        top1 = [result["rows"][index]["top1"] for result in results]
        rows.append(
            {
                "network": first["network"],
                "name": first["name"],
                "top1": top1,
                "top1_mean": statistics.mean(top1),
                "top1_std": statistics.stdev(top1) if len(top1) > 1 else 0.0,
                "macs": statistics.mean(r["rows"][index]["macs"] for r in results),
                "latency_ms": statistics.median(r["rows"][index]["latency_ms"] for r in results),
            }
        )
    return rows


def ratios(results: list[dict], compressed: str = "teacher-1") -> dict[str, list[float]]:
    """Return, per seed, the ratios that the README states."""

    def top1(result: dict, network: str) -> float:
        return next(row["top1"] for row in result["rows"] if row["network"] == network)

    return {
        "one_shot_over_dense_teacher": [
            top1(r, "sbf-one-shot") / top1(r, compressed) for r in results
        ],
        "distilled_minus_ensemble": [
            top1(r, "sbf-distilled") - top1(r, "ensemble") for r in results
        ],
        "distilled_minus_dense_labels": [
            top1(r, "sbf-distilled") - top1(r, "dense-labels") for r in results
        ],
    }


def main() -> None:
    """Run, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "benchmark")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = [run_seed(seed, options.runs) for seed in options.seeds]
    rows = summarise(results)
    table = Table(title=f"digits, 100 labels, seeds {options.seeds}")
    for heading in ("network", "top-1 %", "± (std)", "MACs (M)", "latency (ms)"):
        table.add_column(heading, justify="left" if heading == "network" else "right")
    for row in rows:
        table.add_row(
            row["name"],
            f"{100 * row['top1_mean']:.2f}",
            f"{100 * row['top1_std']:.2f}",
            f"{row['macs'] / 1e6:.2f}",
            f"{row['latency_ms']:.2f}",
        )
    promises = ratios(results)
    Console().print(table)
    for name, values in promises.items():
        print(f"{name}: {', '.join(f'{value:.4f}' for value in values)}")
    if options.json:
        report = {
            "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, "
            f"{torch.backends.cpu.get_cpu_capability()}",
            **origin(),
            "rows": rows,
            "promises": promises,
            "seconds": [result["seconds"] for result in results],
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
