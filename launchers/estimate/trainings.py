"""The trainings of a recipe with their real networks, traced but not run."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from launchers.estimate.memory import (
    FLOAT_BYTES,
    Memory,
    activation_bytes,
    frozen_bytes,
    state_memory,
)
from launchers.estimate.student import even_student
from launchers.estimate.timing import Work
from launchers.run.network import Job, Network
from launchers.run.networks import Networks
from launchers.run.shares import epoch_steps
from sbf_dist import models
from sbf_dist.compression.cost import Cost, count

# A training step of a ResNet-50 at half its multiply-adds, in steps of the dense one: 1.6 with one
# source of a rebuilt channel (layers on an H100, benchmarks/results/gpu.json), 3.3 with four (whole
# steps on an H200, gpu-training.json). The time of the kernels is in proportion to the sources.
SBF_STEP_OF_ONE_SOURCE, MORE_FOR_EACH_SOURCE = 1.6, 0.55


@dataclass(frozen=True)
class Traced:
    """A network: its multiply-adds, parameters and layers, and the module itself.

    views  of an image that it is asked about as a teacher
    """

    network: nn.Module
    input_shape: tuple[int, int, int]
    cost: Cost
    layers: int
    views: int = 1

    @classmethod
    def of(cls, network: nn.Module, input_shape: tuple[int, int, int], views: int = 1) -> "Traced":
        """Trace one image."""
        layers = sum(not list(module.children()) for module in network.modules())
        return cls(network, input_shape, count(network, input_shape), layers, views)

    @property
    def asked_macs(self) -> int:
        """Multiply-adds of its answer, as a teacher, to one image."""
        return self.views * self.cost.macs


@dataclass(frozen=True)
class Planned:
    """A training that a run will do.

    replaced  the dense network, of an SBF student
    sources   of its rebuilt channels, at most
    teachers  that are run beside it
    towards   what it is trained towards
    steps     of `batch` images, all workers together; None: the images would have to be counted
    """

    name: str
    job: Job
    trained: Traced
    teachers: tuple[Traced, ...]
    steps: int | None
    replaced: Traced | None = None
    sources: int = 1
    towards: str = "live"

    @property
    def views(self) -> int:
        """How many views of an image the network sees in a step."""
        return 2 if self.job.distill is not None and self.job.distill.consistency else 1

    @property
    def batch(self) -> int:
        """Images of a step."""
        return self.job.training.batch_size

    @property
    def timed_macs(self) -> float:
        """Multiply-adds of a dense network whose steps take as long."""
        if self.replaced is None:
            return self.trained.cost.macs
        ratio = SBF_STEP_OF_ONE_SOURCE + MORE_FOR_EACH_SOURCE * (self.sources - 1)
        return ratio * self.replaced.cost.macs

    def work(self) -> Work:
        """What a step of it has to do."""
        return Work(
            trained_macs=self.views * self.timed_macs,
            frozen_macs=sum(teacher.asked_macs for teacher in self.teachers),
            trained_layers=self.trained.layers,
            frozen_layers=sum(teacher.views * teacher.layers for teacher in self.teachers),
            gradient_bytes=FLOAT_BYTES * self.trained.cost.params,
        )

    def state(self, workers: int) -> Memory:
        """Return what a worker keeps between steps."""
        training = self.job.training
        sizes = [parameter.numel() for parameter in self.trained.network.parameters()]
        averaged = training.ema is not None
        return state_memory(
            training.zero_stage, training.optimizer.name, sizes, workers, averaged=averaged
        )

    def memory(self, workers: int, *, pairs: bool) -> Memory:
        """Return what a worker keeps in a step. UserError: so many do not divide the batch."""
        training = self.job.training
        at_once = self.batch // workers // training.passes(workers, pairs=pairs)
        state = self.state(workers)
        return Memory(
            weights=state.weights,
            gradients=state.gradients,
            optimizer=state.optimizer,
            activations=activation_bytes(
                self.trained.network,
                self.trained.input_shape,
                self.views * at_once,
                training.precision,
            ),
            teachers=sum(
                frozen_bytes(teacher.network, teacher.input_shape, at_once, training.precision)
                for teacher in self.teachers
            ),
        )


@dataclass(frozen=True)
class PlannedRun:
    """The trainings of a run; its teachers, given ones among them; the one that is compressed."""

    trainings: tuple[Planned, ...]
    teachers: tuple[Traced, ...]
    compressed: Traced


def planned_run(networks: Networks, classes: int, images: Mapping[str, int] | None) -> PlannedRun:
    """Build and trace the networks that a run trains; the student by an even plan.

    `images` are the numbers of each part, where they are known. Where the recipe leaves open
    whether teachers are asked live (`distill.targets: auto`), they are; see teachers.settled.
    """
    recipe = networks.recipe
    traced = {
        teacher.name: Traced.of(
            models.build(teacher.model, classes, teacher.arguments),
            teacher.input_shape,
            teacher.asked.views,
        )
        for teacher in networks.teachers
    }
    dense = traced[networks.compressed.name]
    shape = networks.student.input_shape
    student: Traced | None = None
    found = []
    for network in networks:
        job = network.job
        if job is None:
            continue
        if network.plan is not None and student is None:
            student = Traced.of(even_student(dense.network, recipe.compress, shape), shape)
        is_sbf = network.plan is not None
        trained = student if is_sbf else _dense(network, traced, classes)
        assert trained is not None
        towards = _towards(job)
        beside = list(traced.values()) if towards in ("live", "auto") else []
        if not beside and job.distill is not None and job.distill.features is not None:
            beside = [dense]
        found.append(
            Planned(
                name=network.name,
                job=job,
                trained=trained,
                teachers=tuple(beside),
                replaced=dense if is_sbf else None,
                sources=recipe.compress.sources,
                steps=_steps(job, images, pairs=recipe.data.augmentation.mixes),
                towards=towards,
            )
        )
    return PlannedRun(tuple(found), tuple(traced.values()), dense)


def _towards(job: Job) -> str:
    """What a network is trained towards; "auto" is still to be settled."""
    if job.distill is None:
        return "labels"
    return job.distill.targets if job.distill.asks_teachers else "itself"


def _dense(network: Network, traced: Mapping[str, Traced], classes: int) -> Traced:
    if network.name in traced:
        return traced[network.name]
    built = models.build(network.model, classes, network.arguments)
    return Traced.of(built, network.input_shape)


def _steps(job: Job, images: Mapping[str, int] | None, *, pairs: bool) -> int | None:
    if job.training.epochs is None:
        return job.training.steps
    if images is None:
        return None
    return job.training.lengths(epoch_steps(job, images, pairs=pairs))[0]
