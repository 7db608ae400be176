"""SBF and its peers side by side: the same dense network, the same cost, the same training."""

import dataclasses
import json
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from launchers.display import Display
from launchers.images import calibration_images, evaluation_loader, index_images
from launchers.shared_batches import SharedBatches
from pipelines.index import DataIndex
from pipelines.joined import JoinedLoader, shares_of_batch
from pipelines.loader import TrainLoader
from pipelines.reader import Reader
from sbf_dist import models
from sbf_dist.compare_recipe import Comparison, Method, Training
from sbf_dist.compression.cost import count
from sbf_dist.distill.mixup import mixup
from sbf_dist.distill.task import DistillationTask
from sbf_dist.errors import UserError
from sbf_dist.peers.methods import TITLES, compressed
from sbf_dist.provenance import origin
from sbf_dist.report.chart import accuracy_over_macs
from sbf_dist.train.evaluate import accuracy
from sbf_dist.train.loop import Every, LogRecord, fit
from sbf_dist.train.schedule import schedule
from sbf_dist.train.single import SingleEngine

Result = dict[str, Any]
Batch = dict[str, Tensor]

DENSE = "dense"
EVAL_BATCH = 128


@dataclass(frozen=True)
class Trial:
    """One network of a comparison, all its trainings together."""

    method: Method | None  # None: the dense network, trained on as the others are
    macs: float
    seed: int

    @property
    def name(self) -> str:
        return DENSE if self.method is None else f"{self.method}-{self.macs:g}"


def compare(recipe: Comparison, runs: Path, display: Display) -> Result:
    """Do what is not done yet of a comparison, and write its table and its picture.

    RUNS/NAME keeps every network's result as soon as it is there: a comparison that was cut goes
    on, and one to which methods, shares or seeds are added does the new ones alone. It runs in
    this process, on a CUDA device if there is one. Returns what it writes as comparison.json.
    UserError for a folder that was made with other settings, and for images that are not there.
    """
    folder = runs / recipe.name
    models.build(recipe.model, classes=2)  # an unknown one is refused before anything is written
    _check_identity(recipe, folder)
    todo = trials(recipe)
    missing = [trial for trial in todo if not _path(folder, trial).exists()]
    if missing:
        # The seeds of a comparison share their images.
        index = index_images(recipe.data, runs, 0, display)
        for seed in recipe.seeds:
            mine = [trial for trial in missing if trial.seed == seed]
            if mine:
                bench = Bench.of(recipe, index, folder, seed, display)
                for trial in mine:
                    _write(_path(folder, trial), bench.result(trial))
                    done = sum(_path(folder, other).exists() for other in todo)
                    display.say(f"  {done} of {len(todo)}: {_told(folder, trial)}")
    results = [json.loads(_path(folder, trial).read_text()) for trial in todo]
    rows = summarise(results)
    report = {"model": recipe.model, "seeds": recipe.seeds, "rows": rows, **origin()}
    _write(folder / "comparison.json", report)
    accuracy_over_macs(rows).savefig(folder / "comparison.png", dpi=120)
    return report


def trials(recipe: Comparison) -> list[Trial]:
    """All networks of a comparison, seed by seed."""
    return [
        trial
        for seed in recipe.seeds
        for trial in (
            Trial(None, 1.0, seed),
            *(Trial(method, macs, seed) for macs in recipe.macs for method in recipe.methods),
        )
    ]


@dataclass(frozen=True)
class Bench:
    """All that the networks of one seed share."""

    recipe: Comparison
    seed: int
    dense: nn.Module
    classes: int
    calibration: Tensor
    batches: SharedBatches
    validation: SharedBatches
    device: torch.device
    display: Display

    @classmethod
    def of(
        cls, recipe: Comparison, index: DataIndex, folder: Path, seed: int, display: Display
    ) -> "Bench":
        """Train the dense network of the seed, unless it is there, and let it say its word."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(seed)
        dense = models.build(recipe.model, len(index.classes)).to(device)
        weights = folder / "dense" / f"seed-{seed}.safetensors"
        if weights.exists():
            models.load_weights(dense, weights)
        else:
            labelled = _loader(recipe, index, {"labelled": recipe.dense.batch_size}, seed, device)
            title = f"dense network, seed {seed}"
            task = DistillationTask(dense)
            _fit(task, recipe.dense, recipe.dense.steps, labelled, title, display)
            models.save_weights(dense, weights)
        dense.eval()
        recovery = recipe.recovery
        parts = shares_of_batch(
            recovery.batch_size, recovery.labelled_share, pairs=recipe.data.augmentation.mixes
        )
        if not len(index.parts["unlabelled"]):
            parts = {"labelled": recovery.batch_size}

        def with_word() -> Iterable[Batch]:
            for batch in _loader(recipe, index, parts, seed, device):
                with torch.no_grad():
                    word = dense(batch["image"]).softmax(1)
                yield batch | {"teacher": word}

        images = calibration_images(recipe.data, index, recipe.images, seed)
        held_out = evaluation_loader(
            recipe.data,
            index,
            index.parts["validation"],
            batch_size=EVAL_BATCH,
            device=device,
        )
        return cls(
            recipe=recipe,
            seed=seed,
            dense=dense,
            classes=len(index.classes),
            calibration=images.first(images.count).to(device),
            batches=SharedBatches(with_word, recovery.steps[-1]),
            validation=SharedBatches(lambda: held_out, len(held_out)),
            device=device,
            display=display,
        )

    def result(self, trial: Trial) -> Result:
        """Compress, train for each of the lengths, and measure each time."""
        start = time.monotonic()
        size = self.recipe.data.image_size
        told: Result = {
            "method": trial.method or DENSE,
            "macs": trial.macs,
            "seed": trial.seed,
            "refused": None,
        }
        try:
            network = self._compressed(trial)
        except UserError as error:
            # That a method cannot get there is a result: it says so in the table.
            return told | {"refused": str(error)}
        cost, dense = count(network, (3, size, size)), count(self.dense, (3, size, size))
        told |= {"multiply_adds": cost.macs, "reached": cost.macs / dense.macs}
        told |= {"params": cost.params, "seconds_compressing": round(time.monotonic() - start, 2)}
        top1 = {"0": self._top1(network)}
        state = {key: value.clone() for key, value in network.state_dict().items()}
        recovery = self.recipe.recovery
        for steps in recovery.steps:
            network.load_state_dict(state)
            torch.manual_seed(trial.seed)
            title = f"{trial.name}, seed {trial.seed}"
            task = DistillationTask(network, label_weight=recovery.label_weight)
            _fit(task, recovery, steps, self.batches, title, self.display)
            top1[str(steps)] = self._top1(network)
        return told | {"top1": top1, "seconds": round(time.monotonic() - start, 2)}

    def _compressed(self, trial: Trial) -> nn.Module:
        if trial.method is None:
            network = models.build(self.recipe.model, self.classes).to(self.device)
            network.load_state_dict(self.dense.state_dict())
            return network
        return compressed(
            trial.method,
            self.dense,
            trial.macs,
            self.calibration,
            model_name=self.recipe.model,
            classes=self.classes,
            seed=trial.seed,
        )

    def _top1(self, network: nn.Module) -> float:
        return accuracy(network, self.validation, self.device).top1


def summarise(results: Sequence[Mapping[str, Any]]) -> list[Result]:
    """Return a row for each method, cost and length of training: mean and deviation of the seeds.

    Rows are in the order of `results`, with "method", "title", "macs" (the target), "reached"
    (mean share of the dense network's multiply-adds), "trained_steps", "top1_mean", "top1_std"
    (of the sample; 0 for one seed) and "seeds". A method that could not get there with each seed
    has the reason as "refused" and no figures.
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
            figures = {
                "trained_steps": int(steps),
                "top1_mean": statistics.mean(top1),
                "top1_std": statistics.stdev(top1) if len(top1) > 1 else 0.0,
            }
            rows.append(row | figures)
    return rows


# --- training ------------------------------------------------------------------------------------


def _fit(
    task: nn.Module,
    settings: Training,
    steps: int,
    batches: Iterable[Batch],
    title: str,
    display: Display,
) -> None:
    def on_log(record: LogRecord) -> None:
        display.show({"title": title, **dataclasses.asdict(record)})

    fit(
        SingleEngine(task, settings.optimizer),
        batches,
        steps=steps,
        lr_at=schedule(
            settings.schedule, lr=settings.optimizer.lr, steps=steps, warmup=settings.warmup
        ),
        log=Every(50, on_log),
    )


def _loader(
    recipe: Comparison, index: DataIndex, sizes: dict[str, int], seed: int, device: torch.device
) -> Iterator[Batch]:
    """Return endless batches; where the recipe says so, their images are mixed already."""
    data = recipe.data
    loader = partial(
        TrainLoader,
        index,
        reader=Reader(threads=data.threads, device=device, cache=data.cache),
        view=data.view,
        augmentation=data.augmentation,
        seed=seed,
    )
    loaders = [loader([part], batch_size=size) for part, size in sizes.items() if size]
    return map(mixup, JoinedLoader(loaders))


# --- files ---------------------------------------------------------------------------------------


def _path(folder: Path, trial: Trial) -> Path:
    return folder / "results" / f"seed-{trial.seed}" / f"{trial.name}.json"


def _told(folder: Path, trial: Trial) -> str:
    result = json.loads(_path(folder, trial).read_text())
    name = f"{trial.name}, seed {trial.seed}: "
    if result["refused"]:
        return name + result["refused"]
    figures = ", ".join(f"{100 * v:.1f} % after {k} steps" for k, v in result["top1"].items())
    return f"{name}{result['reached']:.3f} of the MACs, {figures}"


def _write(path: Path, content: Result) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file = path.with_name(f".{path.name}.partial")
    partial_file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    partial_file.replace(path)


def _check_identity(recipe: Comparison, folder: Path) -> None:
    """Refuse a folder that was made with settings on which the results there depend."""
    growing = {"seeds", "methods", "macs"}  # entries may be added and left out
    now = recipe.model_dump(mode="json", exclude=growing)
    path = folder / "recipe.json"
    if not path.exists():
        _write(path, now)
        return
    before = json.loads(path.read_text())
    for key, value in now.items():
        if before.get(key) != value:
            raise UserError(
                f"comparison folder {folder} was made with {key} = {before.get(key)!r}, the recipe "
                f"says {value!r}; give another name (name=…) or remove the folder"
            )
