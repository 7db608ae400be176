"""What one Ray worker does: train networks, write pseudo-labels, evaluate.

Each function here runs on every rank. Its configuration is JSON-like: the recipe, the run's folder
and where to log.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ray import train as ray_train
from ray.train.torch import get_device
from torch import Tensor, nn

from launchers import networks
from launchers import ray_train as launcher
from launchers.layout import RunFolder
from launchers.networks import Job, Row
from pipelines.agreement import check_workers_agree
from pipelines.index import DataIndex
from pipelines.joined import JoinedLoader, shares_of_batch
from pipelines.loader import EvalLoader, TrainLoader
from pipelines.reader import Reader
from sbf_dist import models, tracking
from sbf_dist.compression.convert import convert
from sbf_dist.compression.plan import Plan
from sbf_dist.distill import pseudo_labels
from sbf_dist.distill.mixup import mixup
from sbf_dist.distill.selection import select
from sbf_dist.distill.task import DistillationTask, stored_targets
from sbf_dist.distill.teachers import TeacherEnsemble
from sbf_dist.recipe import Recipe
from sbf_dist.settings import View
from sbf_dist.train import checkpoint
from sbf_dist.train.engine import build_engine
from sbf_dist.train.evaluate import Accuracy, accuracy, synchronise_batchnorm
from sbf_dist.train.loop import Every, LogRecord, fit
from sbf_dist.train.schedule import schedule

EVAL_BATCH = 128
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Context:
    """Where this worker stands."""

    recipe: Recipe
    run: RunFolder
    index: DataIndex
    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Context":
        run = RunFolder(Path(config["runs"]), config["recipe"]["name"])
        place = ray_train.get_context()
        return cls(
            recipe=Recipe.model_validate(config["recipe"]),
            run=run,
            index=DataIndex.load(run.index),
            rank=place.get_world_rank(),
            world_size=place.get_world_size(),
            device=get_device(),
        )


# --- training ------------------------------------------------------------------------------------


def train_networks(config: dict[str, Any]) -> dict[str, Any]:
    """Train the jobs of a stage one after another, from the latest checkpoint if there is one.

    The answer maps each job to its validation accuracy and the step that it was resumed from.
    """
    here = Context.of(config)
    jobs = networks.jobs_of(here.recipe, config["stage"])
    check_workers_agree(here.index, here.device)
    results: dict[str, Any] = {}
    with launcher.latest_checkpoint() as folder:
        resumed = checkpoint.read_manifest(folder).digests["training"] if folder else None
        for number, job in enumerate(jobs):
            done = here.run.weights(job.name).exists()
            dist.barrier()  # all have looked before rank 0 writes
            if not done:
                resume = folder if resumed == job.name else None
                title = f"{job.name} ({number + 1} of {len(jobs)})"
                results[job.name] = _train(here, job, resume, title, config["tracking"])
    return results


def _train(
    here: Context, job: Job, resume: Path | None, title: str, address: list[str]
) -> dict[str, Any]:
    """Compose and run one training: student, task, engine, loaders, loop."""
    torch.manual_seed(job.seed)
    settings = job.training
    student = build_network(here.recipe, here.run, job.name, start_from=job.start_from)
    # Images come in channels_last, which the layers keep; the weights stay contiguous, as ZeRO lays
    # them out in one flat buffer.
    student = student.to(here.device)
    task = DistillationTask(student, label_weight=job.label_weight)
    engine = build_engine(
        task,
        settings.optimizer,
        micro_batch=settings.batch_size // here.world_size // settings.accumulation,
        accumulation=settings.accumulation,
        zero_stage=settings.zero_stage,
        precision=settings.precision,
    )
    index, annotate = _targets(here, job)
    batches = _batches(here, job, index)
    digests = {"recipe": here.recipe.digest(), "data": index.digest, "training": job.name}
    start = 0
    if resume is not None:
        restored = checkpoint.load(engine, resume, digests=digests)
        batches.load_state_dict(restored.loader_state)
        start = restored.step
    tracker = tracking.attach(*address) if here.rank == 0 else None

    def on_log(record: LogRecord) -> None:
        launcher.progress({"title": title, **dataclasses.asdict(record)})
        if tracker is not None:
            values = {**record.parts, "lr": record.lr, "images_per_s": record.images_per_s}
            tracker.log_metrics({f"{job.name}/{k}": v for k, v in values.items()}, record.step)

    def on_checkpoint(step: int) -> None:
        synchronise_batchnorm(student)

        def write(folder: Path) -> None:
            checkpoint.save(
                engine, folder, step=step, loader_state=batches.state_dict(), digests=digests
            )

        launcher.report({"training": job.name, "step": step}, write)

    fit(
        engine,
        batches,
        steps=settings.steps,
        start_step=start,
        lr_at=schedule(
            settings.schedule,
            lr=settings.optimizer.lr,
            steps=settings.steps,
            warmup=settings.warmup,
        ),
        log=Every(settings.log_every, on_log),
        checkpoint=Every(settings.checkpoint_every, on_checkpoint),
        annotate=annotate,
    )
    batches.close()
    scores = accuracy(student, _validation(here, job.view), here.device)
    if here.rank == 0:
        models.save_weights(student, here.run.weights(job.name))
    if tracker is not None:
        tracker.log_metrics(_scores(job.name, scores), settings.steps)
        tracker.flush()
    dist.barrier()
    return {"top1": scores.top1, "loss": scores.loss, "steps": settings.steps, "from_step": start}


def build_network(
    recipe: Recipe, run: RunFolder, network: str, *, start_from: str | None
) -> nn.Module:
    """Build a network of the run: its architecture, the plan applied, weights loaded.

    Without `start_from` it has random weights.
    """
    classes = len(DataIndex.load(run.index).classes)
    model = models.build(networks.model_of(recipe, network), classes)
    plan = networks.plan_of(recipe, run, network)
    if plan is not None:
        model = convert(model, Plan.load(plan))
    if start_from is not None:
        models.load_weights(model, networks.weights_of(recipe, run, start_from))
    return model


def _targets(here: Context, job: Job) -> tuple[DataIndex, Callable[[Batch], Batch]]:
    """Return the images that a job trains on and what adds the teachers' word to its batches.

    Where images are mixed (mixup, cutmix), what they are to be learnt as is mixed with them.
    """
    if job.targets == "labels":
        return here.index, mixup
    stored = pseudo_labels.load(
        here.run.pseudo_labels, pseudo_labels.origin(here.recipe, here.index.digest)
    )
    used = select(stored.classes[:, 0], stored.probabilities[:, 0], here.recipe.pseudo_labels)
    unlabelled = here.index.parts["unlabelled"]
    chosen = unlabelled[np.isin(unlabelled, stored.ids[used])]
    index = dataclasses.replace(here.index, parts=here.index.parts | {"unlabelled": chosen})
    if job.targets == "live":
        live = _live_targets(here, job.view)
        return index, lambda batch: live(mixup(batch))  # the teachers see the mixed images
    ids, classes, probabilities = (
        torch.tensor(column, device=here.device)  # a copy: Arrow's own is read-only
        for column in (stored.ids, stored.classes, stored.probabilities)
    )
    join = stored_targets(ids, classes, probabilities, num_classes=len(index.classes))
    return index, lambda batch: mixup(join(batch))


def _live_targets(here: Context, view: View) -> Callable[[Batch], Batch]:
    ensemble = _ensemble(here, tuple(teacher.name for teacher in here.recipe.teachers))
    return lambda batch: batch | {"teacher": ensemble(batch["image"], view)}


def _ensemble(here: Context, members: tuple[str, ...]) -> TeacherEnsemble:
    teachers = [t for t in here.recipe.teachers if t.name in members]
    return TeacherEnsemble(
        [
            build_network(here.recipe, here.run, t.name, start_from=t.name).to(here.device)
            for t in teachers
        ],
        [networks.teacher_view(here.recipe, t) for t in teachers],
        [t.weight for t in teachers],
        temperature=here.recipe.pseudo_labels.temperature,
        dtype=torch.float16 if here.device.type == "cuda" else None,
    )


def _batches(here: Context, job: Job, index: DataIndex) -> JoinedLoader:
    """Return the training batches: labelled images and, with teachers, unlabelled ones."""
    total = job.training.batch_size // here.world_size // job.training.accumulation
    augmentation = here.recipe.data.augmentation
    sizes = shares_of_batch(total, job.labelled_share, pairs=augmentation.mixes)
    if job.targets == "labels" or not len(index.parts["unlabelled"]):
        sizes = {"labelled": total}
    return JoinedLoader(
        [
            TrainLoader(
                index,
                [part],
                _reader(here),
                batch_size=size,
                view=job.view,
                augmentation=augmentation,
                seed=job.seed,
            )
            for part, size in sizes.items()
            if size
        ]
    )


def _reader(here: Context) -> Reader:
    data = here.recipe.data
    return Reader(here.rank, here.world_size, data.threads, here.device, cache=data.cache)


# --- pseudo-labels -------------------------------------------------------------------------------


def write_pseudo_labels(config: dict[str, Any]) -> dict[str, Any]:
    """Write what the teachers say of every training image; chunks that are there are kept."""
    here = Context.of(config)
    check_workers_agree(here.index, here.device)  # the first stage with workers, perhaps
    folder = here.run.pseudo_labels
    ids = np.sort(np.concatenate([here.index.parts[p] for p in ("labelled", "unlabelled")]))
    if here.rank == 0:
        pseudo_labels.begin(folder, pseudo_labels.origin(here.recipe, here.index.digest))
    dist.barrier()
    ensemble = _ensemble(here, tuple(teacher.name for teacher in here.recipe.teachers))
    parts = pseudo_labels.chunks(ids)
    for number in range(here.rank, len(parts), here.world_size):
        if pseudo_labels.chunk_path(folder, number).exists():
            continue
        _write_chunk(here, ensemble, number, parts[number])
        launcher.progress({"title": "pseudo-labels", "step": number + 1, "steps": len(parts)})
    dist.barrier()
    if here.rank == 0:
        pseudo_labels.finish(folder, ids)
    return {"images": len(ids)}


def _write_chunk(here: Context, ensemble: TeacherEnsemble, number: int, ids: np.ndarray) -> None:
    probabilities = ensemble.average(
        [_ask(here, ensemble, teacher, ids) for teacher in range(len(ensemble.views))]
    )
    pseudo_labels.write_chunk(
        here.run.pseudo_labels,
        number,
        ids,
        probabilities.numpy(),
        here.recipe.pseudo_labels,
    )


def _ask(here: Context, ensemble: TeacherEnsemble, teacher: int, ids: np.ndarray) -> Tensor:
    """Return one teacher's probabilities of the images `ids`, in their order, on the CPU."""
    none = ids[:0]
    index = dataclasses.replace(
        here.index, parts={"labelled": none, "unlabelled": ids, "validation": none}
    )
    alone = dataclasses.replace(here, index=index, rank=0, world_size=1)
    batches = _evaluation(alone, ensemble.views[teacher], "unlabelled")
    answers = [
        (batch["id"].cpu(), ensemble.probabilities(teacher, batch["image"]).cpu())
        for batch in batches
    ]
    order = torch.cat([ids for ids, _ in answers]).argsort()
    return torch.cat([probabilities for _, probabilities in answers])[order]


# --- evaluation ----------------------------------------------------------------------------------


def evaluate_networks(config: dict[str, Any]) -> dict[str, Any]:
    """Measure the accuracy of every row of the table on the validation part, over all ranks."""
    here = Context.of(config)
    table = networks.rows(here.recipe)
    results: dict[str, Any] = {}
    for number, row in enumerate(table):
        model, view = _row_model(here, row)
        scores = accuracy(model, _validation(here, view), here.device)
        results[row.network] = dataclasses.asdict(scores)
        launcher.progress({"title": "evaluate", "step": number + 1, "steps": len(table)})
    return results


class _Together(nn.Module):
    """An ensemble that answers with log-probabilities, as a network does with logits."""

    def __init__(self, ensemble: TeacherEnsemble, view: View) -> None:
        super().__init__()
        self.ensemble = ensemble
        self.view = view

    def forward(self, images: Tensor) -> Tensor:
        return self.ensemble(images, self.view).log()


def _row_model(here: Context, row: Row) -> tuple[nn.Module, View]:
    if len(row.members) > 1:
        view = networks.student_view(here.recipe)
        return _Together(_ensemble(here, row.members), view), view
    view = networks.student_view(here.recipe)
    for teacher in here.recipe.teachers:
        if teacher.name == row.network:
            view = networks.teacher_view(here.recipe, teacher)
    model = build_network(here.recipe, here.run, row.network, start_from=row.network)
    return model.to(here.device), view


def _validation(here: Context, view: View) -> EvalLoader:
    return _evaluation(here, view, "validation")


def _evaluation(here: Context, view: View, part: str) -> EvalLoader:
    return EvalLoader(
        here.index,
        part,
        _reader(here),
        batch_size=EVAL_BATCH,
        view=view,
        crop=here.recipe.data.crop,
    )


def _scores(name: str, scores: Accuracy) -> dict[str, float]:
    values = {f"{name}/top1": scores.top1, f"{name}/validation_loss": scores.loss}
    return values | ({f"{name}/top5": scores.top5} if scores.top5 is not None else {})
