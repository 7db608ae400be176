"""The networks of a comparison: compressed, trained and measured alike."""

import dataclasses
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from launchers.comparison.shared_batches import SharedBatches
from launchers.display import Display
from launchers.images import calibration_images, evaluation_loader, shard_cache
from pipelines.batch_shares import shares_of_batch
from pipelines.index import DataIndex
from pipelines.joined import JoinedLoader
from pipelines.loader import TrainLoader
from pipelines.reader import Reader
from sbf_dist import models
from sbf_dist.compare_recipe import Comparison, Method, Training
from sbf_dist.compression.cost import count
from sbf_dist.distill.mixup import mixup
from sbf_dist.distill.task import DistillationTask
from sbf_dist.errors import UserError
from sbf_dist.peers.methods import compressed
from sbf_dist.train.evaluate import Accuracy, accuracy
from sbf_dist.train.loop import Every, LogRecord, fit
from sbf_dist.train.schedule import schedule
from sbf_dist.train.single import SingleEngine
from sbf_dist.weights import load_weights, save_weights

Result = dict[str, Any]
Batch = dict[str, Tensor]

DENSE = "dense"
EVALUATION_BATCH = 128


@dataclass(frozen=True)
class Trial:
    """One network of a comparison, all its trainings together."""

    method: Method | None  # None: the dense network, trained on as the others are
    macs: float
    seed: int

    @property
    def name(self) -> str:
        return DENSE if self.method is None else f"{self.method}-{self.macs:g}"


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
class SeedContext:
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
    ) -> "SeedContext":
        """Train the dense network of the seed, unless it is there, and load what all share."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(seed)
        dense = models.build(recipe.model, len(index.classes), recipe.arguments).to(device)
        weights = folder / "dense" / f"seed-{seed}.safetensors"
        if weights.exists():
            load_weights(dense, weights)
        else:
            labelled = _loader(recipe, index, {"labelled": recipe.dense.batch_size}, seed, device)
            title = f"dense network, seed {seed}"
            task = DistillationTask(dense)
            _fit(task, recipe.dense, recipe.dense.steps, labelled, title, display)
            save_weights(dense, weights)
        dense.eval()
        recovery = recipe.recovery
        parts = shares_of_batch(
            recovery.batch_size, recovery.labelled_share, pairs=recipe.data.augmentation.mixes
        )
        if not len(index.parts["unlabelled"]):
            parts = {"labelled": recovery.batch_size}

        def with_teacher() -> Iterable[Batch]:
            for batch in _loader(recipe, index, parts, seed, device):
                with torch.no_grad():
                    predictions = dense(batch["image"]).softmax(1)
                yield batch | {"teacher": predictions}

        images = calibration_images(recipe.data, index, recipe.images, seed)
        held_out = evaluation_loader(
            recipe.data,
            index,
            index.parts["validation"],
            batch_size=EVALUATION_BATCH,
            device=device,
        )
        return cls(
            recipe=recipe,
            seed=seed,
            dense=dense,
            classes=len(index.classes),
            calibration=images.first(images.count).to(device),
            batches=SharedBatches(with_teacher, recovery.steps[-1]),
            validation=SharedBatches(lambda: held_out, len(held_out)),
            device=device,
            display=display,
        )

    def result(self, trial: Trial) -> Result:
        """Compress, train for each of the lengths, and measure each time."""
        start = time.monotonic()
        size = self.recipe.data.image_size
        result: Result = {
            "method": trial.method or DENSE,
            "macs": trial.macs,
            "seed": trial.seed,
            "refused": None,
        }
        try:
            network = self._compressed(trial)
        except UserError as error:
            # That a method cannot get there is a result: it says so in the table.
            return result | {"refused": str(error)}
        cost, dense = count(network, (3, size, size)), count(self.dense, (3, size, size))
        result |= {"multiply_adds": cost.macs, "reached": cost.macs / dense.macs}
        result |= {"params": cost.params, "seconds_compressing": round(time.monotonic() - start, 2)}
        scores = {"0": self._scores(network)}
        state = {key: value.clone() for key, value in network.state_dict().items()}
        recovery = self.recipe.recovery
        for steps in recovery.steps:
            network.load_state_dict(state)
            torch.manual_seed(trial.seed)
            title = f"{trial.name}, seed {trial.seed}"
            task = DistillationTask(network, label_weight=recovery.label_weight)
            _fit(task, recovery, steps, self.batches, title, self.display)
            scores[str(steps)] = self._scores(network)
        figures = {
            key: {steps: getattr(score, key) for steps, score in scores.items()}
            for key in ("top1", "agreement", "kl")
        }
        return result | figures | {"seconds": round(time.monotonic() - start, 2)}

    def _compressed(self, trial: Trial) -> nn.Module:
        if trial.method is None:
            network = models.build(self.recipe.model, self.classes, self.recipe.arguments).to(
                self.device
            )
            network.load_state_dict(self.dense.state_dict())
            return network
        return compressed(
            trial.method,
            self.dense,
            trial.macs,
            self.calibration,
            seed=trial.seed,
        )

    def _scores(self, network: nn.Module) -> Accuracy:
        return accuracy(network, self.validation, self.device, self.dense)


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
        reader=Reader(
            threads=data.threads,
            device=device,
            cache=data.cache,
            shard_cache=shard_cache(data),
        ),
        view=data.view,
        augmentation=data.augmentation,
        seed=seed,
    )
    loaders = [loader([part], batch_size=size) for part, size in sizes.items() if size]
    return map(mixup, JoinedLoader(loaders))
