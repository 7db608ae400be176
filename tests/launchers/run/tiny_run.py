"""A run of which only the files are there that its stages leave."""

import json
from pathlib import Path

from launchers.run import locks
from launchers.run.folder import RunFolder
from launchers.run.networks import Networks
from launchers.run.read_files import file_digests
from launchers.run.sequence import bind
from launchers.run.stages import STAGES
from sbf_dist.recipe import validate

CONTENT = {
    "name": "tiny",
    "data": {"source": "digits", "image_size": 16},
    "teachers": [
        {"name": "one", "model": "cifar_resnet8", "training": {"steps": 10}},
        {"name": "two", "model": "cifar_resnet8", "training": {"steps": 10}},
    ],
    "compress": {"teacher": "one", "macs": 0.5},
    "distill": {"training": {"steps": 10}},
    "baselines": {"steps": 10},
}
# A step of its student has 10 images with labels and 30 without.
BATCHES_OF_40 = {
    "name": "tiny",
    "data": {"source": "digits", "image_size": 16, "labelled_per_class": 2},
    "teachers": [
        {"name": "one", "model": "cifar_resnet8", "training": {"steps": 9, "batch_size": 40}}
    ],
    "compress": {"teacher": "one", "macs": 0.5},
    "distill": {"training": {"steps": 9, "batch_size": 40}},
}
ALL = [stage.name for stage in STAGES]


def networks_of(runs: Path, *overrides: str) -> Networks:
    return Networks.of(validate(CONTENT, overrides, "recipe"), RunFolder(runs, "tiny"))


def do(networks: Networks, *stages: str, note: bool = True, digests: bool = True) -> None:
    """Leave all files that the stages leave, and their results."""
    values = locks.values_of(networks.recipe.identity())
    if digests:
        values |= file_digests(networks.recipe)
    for stage in STAGES:
        if stage.name not in stages:
            continue
        products = stage.products(networks)
        for path in (path for product in products for path in product.files):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        reads = [key for product in products for key in product.reads]
        result = networks.folder.result(stage.name)
        result.parent.mkdir(parents=True, exist_ok=True)
        result.write_text(json.dumps({"read": locks.read_by(values, reads)} if note else {}))
    bind(networks)


def done(networks: Networks) -> list[str]:
    return [name for name in ALL if networks.folder.result(name).exists()]


def checkpoint(networks: Networks, stage: str) -> Path:
    """Leave a checkpoint of a training that was cut."""
    manifest = networks.folder.checkpoints / stage / "checkpoint-3" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.touch()
    return manifest
