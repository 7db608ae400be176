"""From the archives of a set, in their published layout, to a student that was trained on it."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import one_worker
import pytest
from archive_makers import cifar10_python, cifar100_python, imagenet, synsets, tiny_imagenet
from typer.testing import CliRunner

from launchers import cli
from launchers.display import Display
from launchers.images import calibration_images
from launchers.run import scoring
from launchers.run.building import build_network
from launchers.student import make_student
from sbf_dist import recipe as recipes
from sbf_dist.object_storage import ObjectFolder
from sbf_dist.weights import save_weights

ROOT = Path(__file__).parents[3]
SBF = Path(sys.executable).with_name("sbf")
HELD_OUT = 20


def of_a_hundred_classes(folder: Path) -> None:
    cifar100_python(folder, [f"class_{k:02}" for k in range(100)], train=200, test=HELD_OUT)


def of_two_hundred_classes(folder: Path) -> None:
    tiny_imagenet(folder, per_class=2, classes=synsets(200), validation=HELD_OUT)


def of_a_thousand_classes(folder: Path) -> None:
    imagenet(folder, per_class=2, classes=synsets(1000), validation=HELD_OUT)


@dataclass(frozen=True)
class Case:
    """A set: what makes its archives, how many images they hold, and a recipe of its own."""

    make: Callable[[Path], object]
    train: int
    held_out: int
    recipe: str
    more: tuple[str, ...] = ()


SETS = {
    "cifar10": Case(cifar10_python, 50, 10, "cifar10-resnet56"),
    "cifar100": Case(of_a_hundred_classes, 200, HELD_OUT, "cifar100-resnet56"),
    "tiny-imagenet": Case(of_two_hundred_classes, 400, HELD_OUT, "tiny-imagenet-resnet18"),
    "imagenet": Case(
        of_a_thousand_classes, 2000, HELD_OUT, "ilsvrc-resnet50-300", ("data.image_size=16",)
    ),
}
# The recipe's images, augmentation, targets and weights stay; lengths and networks are small.
TRAINING = ("steps=3", "batch_size=8", "warmup=1", "precision=fp32", "optimizer.lr=0.01")
SHORT = (
    "workers={}",
    "data.threads=1",
    "teachers.0.model=cifar_resnet8_w4",
    "teachers.1.model=cifar_resnet8_w4",
    "compress.images=16",
    "baselines=null",
    *(
        f"{where}.{change}"
        for where in ("teachers.0.training", "teachers.1.training", "distill.training")
        for change in TRAINING
    ),
)


def prepare(name: str, folder: Path, out: str | Path, *options: str) -> None:
    """Make the archives of a set, prepare it from them with the command, and check it."""
    SETS[name].make(folder / "archives")
    archives = ["--archives", str(folder / "archives"), "--no-checksum"]
    for order in (["prepare", name, *archives, "--out", str(out), *options], ["check", str(out)]):
        done = CliRunner().invoke(cli.app, ["data", *order])
        assert done.exit_code == 0, done.output
    assert "files are unchanged" in done.output


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_prepared_checked_trained_on_and_evaluated(name, tmp_path):
    case = SETS[name]
    root = tmp_path / name
    prepare(name, tmp_path, root)
    recipe = recipes.load(
        ROOT / "recipes" / f"{case.recipe}.yaml", [f"data.root={root}", *SHORT, *case.more]
    )
    here = one_worker.begin(recipe, tmp_path / "runs")
    networks = here.networks
    assert {part: len(ids) for part, ids in here.index.parts.items()} == {
        "labelled": case.train,
        "unlabelled": 0,
        "validation": case.held_out,
    }

    records = [one_worker.train(here, network) for network in networks.trained_in("teachers")]
    one_worker.write_pseudo_labels(here)
    teacher = networks.compressed
    images = calibration_images(recipe.data, here.index, recipe.compress.images, recipe.seed)
    dense = build_network(teacher, here.num_classes, teacher.weights)
    student, plan = make_student(
        dense, images, recipe.compress, teacher.model, recipe.seed, Display()
    )
    save_weights(student, networks.one_shot.weights)
    plan.save(here.folder.plan)
    records += [one_worker.train(here, network) for network in networks.trained_in("distill")]

    assert [[record.step for record in one] for one in records] == 3 * [[1, 2, 3]]
    assert all(math.isfinite(value) for one in records for r in one for value in r.parts.values())
    assert set(records[-1][-1].parts) == {"loss", "cross_entropy", "divergence"}
    assert plan.macs_after <= 0.5 * plan.macs_before
    for row in networks.rows():
        if row.members != (networks.zeroed,):
            scores = scoring.score(here, row)
            assert scores.count == case.held_out
            assert math.isfinite(scores.loss)


@pytest.mark.slow
def test_a_run_goes_from_a_bucket_and_a_list_of_labels_to_an_exported_student(
    s3, tmp_path, monkeypatch
):
    monkeypatch.setenv("SBF_DIST_CACHE", str(tmp_path / "caches"))
    root = f"{s3.bucket}/sets/imagenet"
    prepare("imagenet", tmp_path, root, "--format", "webdataset")
    shards = [name for name in ObjectFolder.at(root).names() if name.endswith(".tar")]
    assert shards == ["train-000000.tar", "val-000000.tar"]
    listed = tmp_path / "half.txt"
    choose = ["data", "split", root, "--labelled", "1", "--out", str(listed)]
    assert CliRunner().invoke(cli.app, choose).exit_code == 0
    done = subprocess.run(
        [
            SBF, "run", ROOT / "recipes" / "ilsvrc-resnet50-10percent.yaml",
            "--runs", tmp_path / "runs", *SHORT, "data.image_size=16", f"data.root={root}",
            "data.labelled_per_class=null", f"data.split={listed}", "pseudo_labels.threshold=0",
            "data.augmentation.mixup=0.2", f"data.cache_dir={tmp_path / 'disk'}",
        ],
        cwd=tmp_path,
        # On one CPU: two threads that work on so little wait for each other most of the time.
        preexec_fn=lambda: os.sched_setaffinity(0, {max(os.sched_getaffinity(0))}),
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1000 classes, 1000 labelled, 1000 unlabelled, 20 validation" in done.stdout
    assert len(list((tmp_path / "disk" / "objects").iterdir())) == len(shards)
    run = tmp_path / "runs" / "ilsvrc-resnet50-10percent"
    results = {path.stem: json.loads(path.read_text()) for path in (run / "stages").iterdir()}
    assert results["pseudo-labels"]["images"] == 2000
    assert results["pseudo-labels"]["used"] == 1000  # of those without a label
    labels = json.loads((run / "pseudo-labels" / "report.json").read_text())
    counts = {row["part"]: row["images"] for row in labels["parts"]}
    assert counts == {"labelled": 1000, "unlabelled": 1000, "validation": 20, "used": 1000}
    assert results["distill"]["trainings"]["sbf-distilled"]["steps"] == 3
    assert [row["count"] for row in results["evaluate"]["rows"]] == 6 * [HELD_OUT]
    assert (run / "student" / "student.onnx").is_file()
