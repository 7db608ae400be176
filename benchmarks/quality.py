"""SBF beside its peers at equal cost: two data sets, two networks, three seeds.

python benchmarks/quality.py --json benchmarks/results/quality.json

The recipes are recipes/compare-digits.yaml and recipes/compare-photos.yaml, with shorter trainings.
All tables are computed with the first seed, then with two, then with three, and the JSON is written
after each. Every network's result is kept under --runs when it is finished: an interrupted
benchmark resumes. --quick is one seed, one network and one cost.
"""

import argparse
import datetime
import json
import platform
import time
from pathlib import Path

import torch

from launchers.comparison.statistics import comparison_table
from launchers.comparison.summary import compare
from launchers.display import Display
from launchers.machine import available_cpus
from sbf_dist.compare_recipe import load
from sbf_dist.provenance import origin

ROOT = Path(__file__).parents[1]
DATA = ("photos", "digits")
MODELS = ("cifar_resnet14", "cifar_vgg11_w16")
SETTINGS = [
    "methods=[magnitude, depgraph, ghost, low-rank, sbf]",
    "macs=[0.75, 0.5, 0.33, 0.25]",
    "recovery.steps=[50, 150]",
    "dense.steps=400",
]
QUICK = ["macs=[0.5]", "recovery.steps=[30, 60]", "dense.steps=200"]


def measure(data: str, model: str, settings: list[str], runs: Path, display: Display) -> list[dict]:
    """Compare on one data set and one network; the rows say which."""
    overrides = [f"name=quality-{data}-{model}", f"model={model}", *settings]
    recipe = load(ROOT / "recipes" / f"compare-{data}.yaml", overrides)
    display.say(f"{data}, {model}", style="bold")
    rows = compare(recipe, runs, display)["rows"]
    display.console.print(comparison_table(rows))
    return [{"data": data, "model": model, **row} for row in rows]


def report(rows: list[dict], seconds: float) -> dict:
    """Return the rows with the settings and versions they were measured with."""
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        **origin(),
        "seconds": round(seconds),
        "rows": rows,
    }


def main() -> None:
    """Measure, print the tables and write the JSON after each of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "quality")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--data", choices=DATA, nargs="+", default=DATA)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    settings, names, seeds, runs = SETTINGS, options.models, options.seeds, options.runs
    if options.quick:
        settings, names, seeds, runs = QUICK, names[:1], seeds[:1], runs / "quick"
    torch.set_num_threads(available_cpus())
    start = time.monotonic()
    tables: dict[tuple[str, str], list[dict]] = {}
    with Display() as display:
        for number in range(1, len(seeds) + 1):
            for model in names:
                for data in options.data:
                    those = [*settings, f"seeds={seeds[:number]}"]
                    tables[data, model] = measure(data, model, those, runs, display)
                    if options.json:
                        rows = [row for table in tables.values() for row in table]
                        write(options.json, report(rows, time.monotonic() - start))


def write(path: Path, content: dict) -> None:
    """Write JSON in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    partial.replace(path)


if __name__ == "__main__":
    main()
