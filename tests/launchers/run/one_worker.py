"""What the only worker of a run does, in this process: without Ray, and without DeepSpeed."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from launchers.display import Display
from launchers.images import index_images
from launchers.run import labelling, worker
from launchers.run.batches import targets, training_batches, training_images, with_progress
from launchers.run.building import build_network
from launchers.run.folder import RunFolder
from launchers.run.network import Network
from launchers.run.networks import Networks
from launchers.run.objective import learning_rates, task_for
from launchers.run.read_files import weights_digests
from launchers.run.teaching import choice_for
from sbf_dist.distill import pseudo_labels
from sbf_dist.recipe import Recipe
from sbf_dist.train.loop import Every, LogRecord, fit
from sbf_dist.train.single import SingleEngine
from sbf_dist.weights import save_weights


def begin(recipe: Recipe, runs: Path) -> worker.Context:
    """Index the recipe's images; the worker's place in the run."""
    networks = Networks.of(recipe, RunFolder(runs, recipe.name))
    index = index_images(recipe.data, runs, recipe.seed, Display())
    index.save(networks.folder.index)
    return worker.Context(networks, index, rank=0, world_size=1, device=torch.device("cpu"))


def train(here: worker.Context, network: Network) -> list[LogRecord]:
    """Do one training of a run and keep its weights; the records of all its steps."""
    job = network.job
    assert job is not None
    torch.manual_seed(job.seed)
    settings = job.training
    student = build_network(network, here.num_classes, job.start)
    task = task_for(here, network, student)
    annotate = targets(here, network, choice_for(here, network), task.features)
    steps = settings.steps
    batches = training_batches(here, network, training_images(here, network), steps)
    records: list[LogRecord] = []
    fit(
        SingleEngine(task, settings.optimizer),
        with_progress(batches, start=0, steps=steps, passes=1),
        steps=steps,
        lr_at=learning_rates(job, steps, settings.warmup),
        log=Every(1, records.append),
        annotate=annotate,
    )
    batches.close()
    save_weights(student, network.weights)
    return records


def write_pseudo_labels(here: worker.Context) -> None:
    """Write what the teachers, whose weights are there, predict on all images."""
    weights = weights_digests(here.networks.teachers)
    origin = pseudo_labels.origin(here.recipe, here.index.digest, weights)
    pseudo_labels.begin(here.folder.pseudo_labels, origin)
    chunks = dict(enumerate(pseudo_labels.chunks(labelling.labelled_ids(here.index))))
    labelling.write_chunks(here, worker.ensemble_of(here), chunks)
    labelling.finish(here)


class Logged(dict[int, dict[str, Any]]):
    """Stands for the tracker of a training: what was logged, by step."""

    def log_metrics(self, values: dict[str, Any], step: int) -> None:
        self.setdefault(step, {}).update(values)

    def flush(self) -> None:
        pass


def alone() -> Logged:
    """Let this process be the only rank of a training, without Ray; return what it logs."""
    from launchers.on_ray import ray_train
    from launchers.run import training
    from sbf_dist.train.engine import join_process_group

    logged = Logged()
    ray_train.progress = lambda record: None  # type: ignore[assignment]
    training.tracking.attach = lambda journals: logged  # type: ignore[assignment,return-value]
    torch.set_num_threads(1)
    join_process_group(torch.device("cpu"))
    return logged


def in_a_process(function: Callable[[str], None], folder: Path) -> None:
    """Call function(folder) in a process of its own, which may join a process group."""
    child = multiprocessing.get_context("spawn").Process(target=function, args=(str(folder),))
    child.start()
    child.join()
    assert child.exitcode == 0
