"""Seconds from the command to the first training step, on two workers.

    python benchmarks/startup.py --json benchmarks/results/startup.json

`sbf run` of a tiny training on digits, in a new folder each time: images are indexed, Ray is
started, workers join, the first batch is trained on.
"""

import argparse
import datetime
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from faults import PATIENCE, Run
from rich.console import Console
from rich.table import Table
from timing import machine

_POLL_SECONDS = 0.02


def seconds_to_first_step(folder: Path, workers: int) -> float:
    """Give the command and wait until a worker has done a step."""
    run = Run(folder, steps=10, workers=workers, pause=0.0)
    run.runs.mkdir(parents=True)
    begun = time.monotonic()
    run.start()
    while not any(run.passes().values()):
        if not run.alive() or time.monotonic() - begun > PATIENCE:
            raise RuntimeError(f"no step was done:\n{run.output}")
        time.sleep(_POLL_SECONDS)
    seconds = time.monotonic() - begun
    run.finish()
    return seconds


def main() -> None:
    """Measure, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file to write the result to")
    options = parser.parse_args()
    seconds = []
    with tempfile.TemporaryDirectory(prefix="sbf-startup-") as folder:
        for number in range(options.starts):
            seconds.append(seconds_to_first_step(Path(folder, str(number)), options.workers))
    table = Table("workers", "starts", "median s", "fastest s", "slowest s")
    middle = statistics.median(seconds)
    figures = (f"{value:.1f}" for value in (middle, min(seconds), max(seconds)))
    table.add_row(str(options.workers), str(options.starts), *figures)
    Console(width=100).print(table)
    if options.json is not None:
        result = {
            "date": datetime.date.today().isoformat(),
            "machine": machine(),
            "cores": os.cpu_count(),
            "load_average": round(os.getloadavg()[0], 2),
            "workers": options.workers,
            "seconds": [round(value, 2) for value in seconds],
            "median": round(middle, 2),
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
