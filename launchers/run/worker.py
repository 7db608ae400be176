"""What one worker of a run does: train networks, write pseudo-labels, evaluate.

Each function here runs on every rank. Its configuration is JSON-like: the recipe, the run's folder
and where to log. Ray is imported where it is used: the driver imports this module before it has set
the environment that Ray reads.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from launchers.run import locks
from launchers.run.building import build_network
from launchers.run.folder import RunFolder
from launchers.run.networks import Network, Networks, Row
from pipelines.agreement import check_workers_agree
from pipelines.index import DataIndex
from pipelines.joined import JoinedLoader, shares_of_batch
from pipelines.loader import EvalLoader, TrainLoader
from pipelines.reader import Reader
from sbf_dist import tracking
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
from sbf_dist.weights import save_weights

EVALUATION_BATCH = 128
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Context:
    """The run that this worker works on, and where it stands among all workers."""

    networks: Networks
    index: DataIndex
    rank: int
    world_size: int
    device: torch.device

    @property
    def recipe(self) -> Recipe:
        return self.networks.recipe

    @property
    def folder(self) -> RunFolder:
        return self.networks.folder

    @property
    def num_classes(self) -> int:
        """The outputs of all networks, one for each class of the images."""
        return len(self.index.classes)

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Context":
        from launchers.on_ray import ray_train

        folder = RunFolder(Path(config["runs"]), config["recipe"]["name"])
        place = ray_train.place()
        return cls(
            networks=Networks.of(Recipe.model_validate(config["recipe"]), folder),
            index=DataIndex.load(folder.index),
            rank=place.rank,
            world_size=place.world_size,
            device=place.device,
        )


# --- training ------------------------------------------------------------------------------------


def train_networks(config: dict[str, Any]) -> dict[str, Any]:
    """Train the networks of a stage or a round one after another, from the latest checkpoint.

    The answer maps each network that was trained to its validation accuracy and the step that it
    was resumed from.
    """
    from launchers.on_ray import ray_train

    here = Context.of(config)
    wanted = here.networks.trained_in(config["group"])
    check_workers_agree(here.index, here.device)
    results: dict[str, Any] = {}
    with ray_train.latest_checkpoint() as folder:
        resumed = checkpoint.read_manifest(folder).digests["training"] if folder else None
        for number, network in enumerate(wanted, 1):
            done = network.weights.exists()
            dist.barrier()  # all have looked before rank 0 writes
            if not done:
                resume = folder if resumed == network.name else None
                title = f"{network.name} ({number} of {len(wanted)})"
                results[network.name] = _train(here, network, resume, title, config["tracking"])
    return results


def _train(
    here: Context, network: Network, resume: Path | None, title: str, address: list[str]
) -> dict[str, Any]:
    """Compose and run one training: student, task, engine, loaders, loop."""
    from launchers.on_ray import ray_train

    job = network.job
    assert job is not None
    torch.manual_seed(job.seed)
    settings = job.training
    student = build_network(network, here.num_classes, job.start)
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
    index, annotate = _targets(here, network)
    batches = _batches(here, network, index)
    digests = _digests(here, network)
    start = 0
    if resume is not None:
        restored = checkpoint.load(engine, resume, digests=_saved_digests(here, network, resume))
        batches.load_state_dict(restored.loader_state)
        start = restored.step
    tracker = tracking.attach(*address) if here.rank == 0 else None

    def on_log(record: LogRecord) -> None:
        ray_train.progress({"title": title, **dataclasses.asdict(record)})
        if tracker is not None:
            values = {**record.parts, "lr": record.lr, "images_per_s": record.images_per_s}
            named = {f"{network.name}/{key}": value for key, value in values.items()}
            tracker.log_metrics(named, record.step)

    def on_checkpoint(step: int) -> None:
        synchronise_batchnorm(student)

        def write(folder: Path) -> None:
            checkpoint.save(
                engine, folder, step=step, loader_state=batches.state_dict(), digests=digests
            )

        ray_train.report({"training": network.name, "step": step}, write)

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
    scores = accuracy(student, _validation(here, network.view), here.device)
    if here.rank == 0:
        save_weights(student, network.weights)
    if tracker is not None:
        tracker.log_metrics(_scores(network.name, scores), settings.steps)
        tracker.flush()
    dist.barrier()
    return {"top1": scores.top1, "loss": scores.loss, "steps": settings.steps, "from_step": start}


def _digests(here: Context, network: Network) -> dict[str, str]:
    """What a checkpoint of a network's training depends on."""
    read = locks.read_by(locks.values_of(here.recipe.identity()), network.reads)
    return {"recipe": locks.digest(read), "data": here.index.digest, "training": network.name}


def _saved_digests(here: Context, network: Network, checkpoint_folder: Path) -> dict[str, str]:
    """What a checkpoint must depend on to be gone on from.

    A version before noted the digest of the whole recipe; where that is the same, it fits as well.
    """
    digests = _digests(here, network)
    saved = checkpoint.read_manifest(checkpoint_folder).digests.get("recipe")
    return digests | ({"recipe": saved} if saved == here.recipe.digest() else {})


def _targets(here: Context, network: Network) -> tuple[DataIndex, Callable[[Batch], Batch]]:
    """Return the images that a network trains on and what adds the targets to its batches.

    Where images are mixed (mixup, cutmix), their targets are mixed with them.
    """
    job = network.job
    assert job is not None
    if job.targets == "labels":
        return here.index, mixup
    stored = pseudo_labels.load(
        here.folder.pseudo_labels, pseudo_labels.origin(here.recipe, here.index.digest)
    )
    used = select(stored.classes[:, 0], stored.probabilities[:, 0], here.recipe.pseudo_labels)
    unlabelled = here.index.parts["unlabelled"]
    chosen = unlabelled[np.isin(unlabelled, stored.ids[used])]
    index = dataclasses.replace(here.index, parts=here.index.parts | {"unlabelled": chosen})
    if job.targets == "live":
        live = _live_targets(here, network.view)
        return index, lambda batch: live(mixup(batch))  # the teachers see the mixed images
    ids, classes, probabilities = (
        torch.tensor(column, device=here.device)  # a copy: Arrow's own is read-only
        for column in (stored.ids, stored.classes, stored.probabilities)
    )
    join = stored_targets(ids, classes, probabilities, num_classes=len(index.classes))
    return index, lambda batch: mixup(join(batch))


def _live_targets(here: Context, view: View) -> Callable[[Batch], Batch]:
    ensemble = _ensemble(here)
    return lambda batch: batch | {"teacher": ensemble(batch["image"], view)}


def _ensemble(here: Context) -> TeacherEnsemble:
    teachers = here.networks.teachers
    return TeacherEnsemble(
        [build_network(t, here.num_classes, t.weights).to(here.device) for t in teachers],
        [teacher.view for teacher in teachers],
        [teacher.ensemble_weight for teacher in teachers],
        temperature=here.recipe.pseudo_labels.temperature,
        dtype=torch.float16 if here.device.type == "cuda" else None,
    )


def _batches(here: Context, network: Network, index: DataIndex) -> JoinedLoader:
    """Return the training batches: labelled images and, with teachers, unlabelled ones."""
    job = network.job
    assert job is not None
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
                view=network.view,
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
    """Write what the teachers predict on every training image; chunks that are there are kept."""
    from launchers.on_ray import ray_train

    here = Context.of(config)
    check_workers_agree(here.index, here.device)  # the first stage with workers, perhaps
    folder = here.folder.pseudo_labels
    ids = np.sort(np.concatenate([here.index.parts[p] for p in ("labelled", "unlabelled")]))
    if here.rank == 0:
        pseudo_labels.begin(folder, pseudo_labels.origin(here.recipe, here.index.digest))
    dist.barrier()
    ensemble = _ensemble(here)
    parts = pseudo_labels.chunks(ids)
    for number in range(here.rank, len(parts), here.world_size):
        if pseudo_labels.chunk_path(folder, number).exists():
            continue
        _write_chunk(here, ensemble, number, parts[number])
        ray_train.progress({"title": "pseudo-labels", "step": number + 1, "steps": len(parts)})
    dist.barrier()
    if here.rank == 0:
        pseudo_labels.finish(folder, ids)
    return {"images": len(ids)}


def _write_chunk(here: Context, ensemble: TeacherEnsemble, number: int, ids: np.ndarray) -> None:
    probabilities = ensemble.average(
        [_predictions(here, ensemble, teacher, ids) for teacher in range(len(ensemble.views))]
    )
    pseudo_labels.write_chunk(
        here.folder.pseudo_labels,
        number,
        ids,
        probabilities.numpy(),
        here.recipe.pseudo_labels,
    )


def _predictions(here: Context, ensemble: TeacherEnsemble, teacher: int, ids: np.ndarray) -> Tensor:
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
    """Measure every row of the table on the validation part, over all ranks.

    Its accuracy, and how far what was made of the compressed teacher still agrees with it.
    """
    from launchers.on_ray import ray_train

    here = Context.of(config)
    rows = here.networks.rows()
    results: dict[str, Any] = {}
    for number, row in enumerate(rows, 1):
        results[row.name] = dataclasses.asdict(_score(here, row))
        ray_train.progress({"title": "evaluate", "step": number, "steps": len(rows)})
    return results


def _score(here: Context, row: Row) -> Accuracy:
    if len(row.members) > 1:
        view = here.recipe.data.view
        ensemble = _EnsembleAsNetwork(_ensemble(here), view)
        return accuracy(ensemble, _validation(here, view), here.device)
    (network,) = row.members
    model = build_network(network, here.num_classes, network.weights).to(here.device)
    reference = None
    dense = here.networks.compressed
    if network.name != dense.name and network.model == dense.model:
        reference = build_network(dense, here.num_classes, dense.weights).to(here.device)
    return accuracy(model, _validation(here, network.view), here.device, reference)


class _EnsembleAsNetwork(nn.Module):
    """An ensemble that answers with log-probabilities, as a network does with logits."""

    def __init__(self, ensemble: TeacherEnsemble, view: View) -> None:
        super().__init__()
        self.ensemble = ensemble
        self.view = view

    def forward(self, images: Tensor) -> Tensor:
        return self.ensemble(images, self.view).log()


def _validation(here: Context, view: View) -> EvalLoader:
    return _evaluation(here, view, "validation")


def _evaluation(here: Context, view: View, part: str) -> EvalLoader:
    return EvalLoader(
        here.index,
        part,
        _reader(here),
        batch_size=EVALUATION_BATCH,
        view=view,
        crop=here.recipe.data.crop,
    )


def _scores(name: str, scores: Accuracy) -> dict[str, float]:
    values = {f"{name}/top1": scores.top1, f"{name}/validation_loss": scores.loss}
    return values | ({f"{name}/top5": scores.top5} if scores.top5 is not None else {})
