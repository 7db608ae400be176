"""What each way of teaching brings an SBF student, with few labels, at equal steps.

    python benchmarks/distillation.py --json benchmarks/results/distillation.json \\
        --picture docs/distillation.png FOLDER

Two teachers are trained on the labels, the first is compressed, and the student is trained on from
there in each way. All trainings of students have the same steps, batches and learning rates. They
run in this process, with the library's own loaders, task and loop. A seed chooses the labelled
images, the weights and the order of the images. Each cell is kept in FOLDER as soon as it is there:
a benchmark that was cut goes on, and one with more seeds does the new ones alone.
"""

import argparse
import copy
import datetime
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from distillation_table import draw, summarise, table
from rich.console import Console
from timing import machine
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sbf_dist
from launchers.display import Display
from launchers.images import calibration_images, evaluation_loader, index_images
from launchers.run.batches import with_progress
from pipelines.batch_shares import shares_of_batch
from pipelines.joined import JoinedLoader, LoadersInTurn
from pipelines.loader import TrainLoader
from pipelines.reader import Reader
from sbf_dist import compare_recipe, models
from sbf_dist.distill.features import FeatureLoss, feature_loss
from sbf_dist.distill.live import feature_targets, live_targets
from sbf_dist.distill.task import DistillationTask, stored_targets
from sbf_dist.distill.teachers import Member, TeacherEnsemble
from sbf_dist.distill_recipe import Consistency, Distill, Features, LabelsLast
from sbf_dist.provenance import origin
from sbf_dist.recipe import Data
from sbf_dist.settings import Augmentation, Compression
from sbf_dist.train.evaluate import accuracy, predict
from sbf_dist.train.loop import Annotation, Every, fit
from sbf_dist.train.schedule import cosine, followed_by
from sbf_dist.train.single import SingleEngine
from sbf_dist.weights import load_weights, save_weights

ROOT = Path(__file__).parents[1]
SETS = {"digits": 16, "photos": 16}  # and the side of their images here, pixels
TEACHERS = ("cifar_resnet14_w12", "cifar_resnet20_w12")  # the first is compressed
LABELS = (4, 10, 40)
BATCH = 64
WARMUP = 20
LAST = "last"  # marks batches of the last phase, on labels alone
# Ways of teaching: settings of a recipe's section `distill`, the members of the ensemble, and the
# budget of multiply-adds.
HALF, QUARTER = 0.5, 0.25
ENSEMBLE, ONE = (0, 1), (0,)


@dataclass(frozen=True)
class Method:
    """A way of teaching a student."""

    distill: Distill | None  # None: labels alone
    members: tuple[int, ...] = ENSEMBLE
    macs: float = HALF
    ema: float | None = None  # decay of a moving average of the student's weights, which counts


def taught(targets: str = "live", **settings: object) -> Distill:
    """Return the settings of a training of the student; its length is the benchmark's."""
    own = {"label_weight": 0.2, "targets": targets} | settings
    return Distill.model_validate({"training": {"steps": 1}} | own)


# Self-training takes over from the teachers. A quarter of a step's images are labelled, or half.
FADING = taught(label_weight=1.0, teacher_weight=(1.0, 0.0), consistency=Consistency())
FADING_HALF = FADING.model_copy(update={"labelled_share": 0.5})
STORED_HALF = taught("stored", label_weight=1.0, labelled_share=0.5)
EMA_DECAY = 0.98  # of the last 50 of 300 steps

METHODS = {
    "supervised": Method(None),
    "one teacher, live": Method(taught(), ONE),
    "ensemble, live": Method(taught()),
    "ensemble, stored": Method(taught("stored")),
    "FixMatch": Method(taught(label_weight=1.0, teacher_weight=0.0, consistency=Consistency())),
    "ensemble, live + features": Method(taught(features=Features())),
    "ensemble, live + labels last": Method(taught(labels_last=LabelsLast(share=0.2))),
    "ensemble fading, live + consistency": Method(FADING),
    "ensemble fading, live + consistency, EMA": Method(FADING, ema=EMA_DECAY),
    "ensemble fading, live + consistency, half labelled": Method(FADING_HALF),
    "ensemble, stored, half labelled": Method(STORED_HALF),
    "ensemble, live, a quarter": Method(taught(), macs=QUARTER),
    "ensemble, stored, a quarter": Method(taught("stored"), macs=QUARTER),
    "ensemble fading, live + consistency, a quarter": Method(FADING, macs=QUARTER),
    "ensemble fading, live + consistency, half labelled, a quarter": Method(
        FADING_HALF, macs=QUARTER
    ),
    "ensemble, stored, half labelled, a quarter": Method(STORED_HALF, macs=QUARTER),
}
REFERENCES = ("teacher 1", "teacher 2", "ensemble")


@dataclass(frozen=True)
class Lengths:
    """Steps of the trainings of teachers and of students."""

    teachers: int
    students: int


@dataclass(frozen=True)
class Setting:
    """All that the cells of one set, number of labels and seed share."""

    folder: Path
    data: Data
    seed: int
    lr: float
    steps: Lengths

    @cached_property
    def index(self):
        return index_images(self.data, self.folder, self.seed, Display(Console(quiet=True)))

    @cached_property
    def validation(self) -> list[dict[str, Tensor]]:
        return self._evaluated(self.index.parts["validation"])

    def _evaluated(self, ids: np.ndarray) -> list[dict[str, Tensor]]:
        loader = evaluation_loader(self.data, self.index, ids)
        # DALI takes its buffers back when a batch dies.
        return [{key: value.clone() for key, value in batch.items()} for batch in loader]

    @cached_property
    def teachers(self) -> list[nn.Module]:
        found = []
        for number, name in enumerate(TEACHERS):
            torch.manual_seed(self.seed + number)
            network = models.build(name, len(self.index.classes))
            weights = self.folder / f"{self._name}-teacher-{number + 1}.safetensors"
            if weights.exists():
                load_weights(network, weights)
            else:
                self.train(
                    DistillationTask(network), Method(None), self.steps.teachers, seed=number
                )
                save_weights(network, weights)
            found.append(network.eval())
        return found

    @property
    def _name(self) -> str:
        return f"{self.data.source}-{self.data.labelled_per_class}-seed-{self.seed}"

    def ensemble(self, members: tuple[int, ...]) -> TeacherEnsemble:
        """Return some of the teachers together."""
        return TeacherEnsemble(
            [
                Member(TEACHERS[number], copy.deepcopy(self.teachers[number]), self.data.view)
                for number in members
            ]
        )

    def student(self, macs: float) -> nn.Module:
        """Compress the first teacher, without training."""
        folder = self.folder / f"{self._name}-student-{macs:g}"
        if not folder.exists():
            images = calibration_images(self.data, self.index, 512, self.seed)
            settings = Compression(macs=macs)
            student, _ = sbf_dist.compress(self.teachers[0], images, settings, seed=self.seed)
            sbf_dist.save(student, folder)
        return sbf_dist.load(folder)

    def stored(self, ensemble: TeacherEnsemble) -> Callable[[dict], dict]:
        """Return what joins the ensemble's predictions on each image as it is, without a crop."""
        ids = np.sort(np.concatenate([self.index.parts[p] for p in ("labelled", "unlabelled")]))
        networks = [member.network for member in ensemble.members]
        each = [predict(network, self._evaluated(ids), "cpu") for network in networks]
        probabilities = ensemble.average([one.probabilities for one in each])
        top = probabilities.topk(probabilities.shape[1])
        classes = len(self.index.classes)
        return stored_targets(each[0].ids, top.indices, top.values, num_classes=classes)

    def loader(self, parts: dict[str, int], seed: int, strong: Augmentation | None) -> JoinedLoader:
        """Return the batches of so many images of each part."""
        reader = Reader(cache="memory")
        return JoinedLoader(
            [
                TrainLoader(
                    self.index,
                    [part],
                    reader,
                    batch_size=size,
                    view=self.data.view,
                    augmentation=self.data.augmentation,
                    seed=seed,
                    strong=strong,
                )
                for part, size in parts.items()
            ]
        )

    def batches(self, method: Method, steps: int, seed: int) -> Iterator[dict[str, Tensor]]:
        """Return the batches of a training of so many steps."""
        distill = method.distill
        if distill is None:
            return self.loader({"labelled": BATCH}, seed, None)
        shares = shares_of_batch(BATCH, distill.labelled_share, pairs=False)
        strong = None
        if distill.consistency is not None:
            strong = distill.consistency.strong_views(self.data.augmentation)
        joined = self.loader(shares, seed, strong)
        if distill.labels_last is None:
            return joined
        first = steps - round(steps * distill.labels_last.share)
        alone = self.loader({"labelled": BATCH}, seed, None)
        return LoadersInTurn(joined, alone, samples=first * BATCH, mark=LAST)

    def annotate(self, method: Method, features: FeatureLoss | None) -> Annotation | None:
        """Return what adds the targets to a batch."""
        distill = method.distill
        if distill is None or (distill.teacher_weight == 0 and features is None):
            return None
        ensemble = self.ensemble(method.members)
        view = self.data.view
        if distill.targets == "stored":
            return Annotation(self.stored(ensemble))
        ask = live_targets(ensemble, view)
        if features is not None:
            ask = feature_targets(ensemble, 0, view, features.layers, ask)
        return Annotation(lambda batch: batch if LAST in batch else ask(batch), ensemble)

    def train(self, task: DistillationTask, method: Method, steps: int, seed: int) -> None:
        """Train a network, teacher or student, in one way."""
        distill = method.distill
        optimizer = compare_recipe.load(
            ROOT / "recipes" / f"compare-{self.data.source}.yaml"
        ).dense.optimizer
        last = None if distill is None else distill.labels_last
        first = steps if last is None else steps - round(steps * last.share)
        lr_at = lr_of(self.lr, first, WARMUP)
        if last is not None:
            lr_at = followed_by(lr_at, lr_of(self.lr * last.lr, steps - first, 0), at=first)
        batches = self.batches(method, steps, self.seed + seed)
        engine = SingleEngine(task, optimizer.model_copy(update={"lr": self.lr}))
        averaged = None
        if method.ema is not None:
            average = get_ema_multi_avg_fn(method.ema)
            averaged = AveragedModel(task.student, multi_avg_fn=average, use_buffers=True)
            engine.optimizer.register_step_post_hook(
                lambda *_: averaged.update_parameters(task.student)
            )
        fit(
            engine,
            with_progress(batches, start=0, steps=steps, passes=1),
            steps=steps,
            lr_at=lr_at,
            log=Every(None, lambda record: None),
            annotate=self.annotate(method, task.features),
        )
        batches.close()
        if averaged is not None:
            task.student.load_state_dict(averaged.module.state_dict())

    def taught(self, method: Method) -> dict[str, float]:
        """Train a student in one way; its accuracy after it and before."""
        student = self.student(method.macs)
        torch.manual_seed(self.seed)
        distill = method.distill
        settings: dict = {}
        if distill is not None:
            settings = {
                "label_weight": distill.label_weight,
                "teacher_weight": distill.teacher_weight,
                "consistency": distill.consistency,
            }
            if distill.features is not None:
                shape = (3, self.data.image_size, self.data.image_size)
                layers = distill.features.layers
                settings["features"] = feature_loss(student, self.teachers[0], layers, shape)
                settings["feature_weight"] = distill.features.weight
        task = DistillationTask(student, **settings)
        before = self.top1(student)
        self.train(task, method, self.steps.students, seed=0)
        return {"top1": self.top1(student), "before": before}

    def top1(self, network: nn.Module) -> float:
        """Return a network's share of right answers on the validation images."""
        return accuracy(network, self.validation, "cpu").top1

    def reference(self, name: str) -> dict[str, float]:
        """Return the accuracy of a teacher, or of both together."""
        if name != "ensemble":
            return {"top1": self.top1(self.teachers[REFERENCES.index(name)])}
        ensemble = self.ensemble(ENSEMBLE)
        right = [
            ensemble(batch["image"], self.data.view).argmax(1) == batch["label"]
            for batch in self.validation
        ]
        return {"top1": torch.cat(right).double().mean().item()}


def lr_of(lr: float, steps: int, warmup: int) -> Callable[[int], float]:
    """Return half a cosine down to 0 over so many steps, after the warm-up."""
    return lambda step: cosine(step, lr=lr, steps=steps, warmup=warmup)


def setting(folder: Path, name: str, labels: int, seed: int, lr: float, steps: Lengths) -> Setting:
    """Return a set with so many labels a class."""
    recipe = compare_recipe.load(ROOT / "recipes" / f"compare-{name}.yaml")
    size = {"image_size": SETS[name], "labelled_per_class": labels, "cache": "memory"}
    return Setting(folder, recipe.data.model_copy(update=size), seed, lr, steps)


def main() -> None:
    """Make all cells that are not there yet, print the table, write JSON and picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--labels", nargs="+", type=int, default=list(LABELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    known = (*REFERENCES, *METHODS)
    parser.add_argument("--methods", nargs="+", choices=known, default=list(known))
    parser.add_argument("--teacher-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument(
        "--kept", action="store_true", help="report cells that are there, make none"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps = Lengths(options.teacher_steps, options.steps)
    kept = options.folder / "cells"
    kept.mkdir(parents=True, exist_ok=True)
    cells = []
    for seed in options.seeds:
        for name in options.data:
            for labels in options.labels:
                given = setting(options.folder, name, labels, seed, options.lr, steps)
                for method in options.methods:
                    path = kept / f"{name} {labels} {seed} {method}.json"
                    if not path.exists():
                        if options.kept:
                            continue
                        is_taught = method in METHODS
                        found = (
                            given.taught(METHODS[method]) if is_taught else given.reference(method)
                        )
                        cell = {"data": name, "labels_per_class": labels, "seed": seed}
                        path.write_text(json.dumps(cell | {"method": method} | found))
                        print(path.read_text(), flush=True)
                    cells.append(json.loads(path.read_text()))
    rows = summarise(cells)
    Console(width=120).print(table(rows))
    if options.json:
        report = {
            "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
            "machine": machine(),
            "threads": torch.get_num_threads(),
            **origin(),
            "teachers": TEACHERS,
            "image_size": SETS,
            "steps": {"teachers": steps.teachers, "students": steps.students},
            "batch": BATCH,
            "lr": options.lr,
            "rows": rows,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.picture:
        draw(rows, options.picture)


if __name__ == "__main__":
    main()
