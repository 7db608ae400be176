"""Latency of the networks of benchmarks/quality.py: equal multiply-adds are not equal time.

    python benchmarks/quality_latency.py --json benchmarks/results/quality-latency.json

The dense networks are those that benchmarks/quality.py trained (it has to have run), of the first
seed, on photos; each method brings them to each cost, untrained, as training changes no shape. All
are timed after `optimize`, dense too: medians of interleaved rounds, on a machine with nothing else
to do.
"""

import argparse
import datetime
import json
from functools import partial
from pathlib import Path

import torch
from quality import MODELS, ROOT, SETTINGS
from rich.console import Console
from rich.table import Table
from timing import interleaved_medians, machine, pin_malloc

from launchers.display import Display
from launchers.images import calibration_images, index_images
from sbf_dist import models
from sbf_dist.compare_recipe import load
from sbf_dist.export.optimize import optimize
from sbf_dist.peers.methods import TITLES, compressed
from sbf_dist.provenance import origin
from sbf_dist.weights import load_weights

BATCHES = (1, 64)


def measure(model: str, runs: Path, rounds: int, display: Display) -> list[dict]:
    """Time dense and compressed networks of one architecture; milliseconds by batch size."""
    name = f"quality-photos-{model}"
    recipe = load(
        ROOT / "recipes" / "compare-photos.yaml", [f"name={name}", f"model={model}", *SETTINGS]
    )
    index = index_images(recipe.data, runs, 0, display)
    calibration = calibration_images(recipe.data, index, recipe.images, seed=0)
    images = calibration.first(calibration.count)
    classes = len(index.classes)
    dense = models.build(model, classes)
    load_weights(dense, runs / name / "dense" / "seed-0.safetensors")
    dense.eval()
    networks = {("dense", 1.0): optimize(dense)}
    for macs in recipe.macs:
        for method in recipe.methods:
            networks[method, macs] = optimize(compressed(method, dense, macs, images, seed=0))
    size = recipe.data.image_size
    rows: list[dict] = [
        {"model": model, "method": method, "macs": macs, "ms": {}} for method, macs in networks
    ]
    for batch in BATCHES:
        x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
        calls = {
            f"{method} {macs}": partial(network, x) for (method, macs), network in networks.items()
        }
        with torch.inference_mode():
            ms = interleaved_medians(calls, rounds=rounds, repeats=10)
        for row in rows:
            row["ms"][batch] = round(ms[f"{row['method']} {row['macs']}"], 4)
    return rows


def table(rows: list[dict]) -> Table:
    """Milliseconds, and shares of the dense network's."""
    shown = Table("network", "method", "MACs", *(f"ms, batch {batch}" for batch in BATCHES))
    dense = {row["model"]: row["ms"] for row in rows if row["method"] == "dense"}
    for row in rows:
        times = [
            f"{row['ms'][batch]:.3f} ({row['ms'][batch] / dense[row['model']][batch]:.2f})"
            for batch in BATCHES
        ]
        title = TITLES.get(row["method"], row["method"])
        shown.add_row(row["model"], title, f"{row['macs']:g}", *times)
    return shown


def main() -> None:
    """Measure all networks, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "quality")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pin_malloc()
    with Display() as display:
        rows = [
            row for model in MODELS for row in measure(model, options.runs, options.rounds, display)
        ]
    Console(width=100).print(table(rows))
    if options.json:
        report = {
            "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
            "machine": machine(),
            "threads": options.threads,
            **origin(),
            "rows": rows,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
