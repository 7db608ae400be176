"""How long a training step takes on many GPUs: compute, images, gradients, waiting for the slowest.

The model is checked against published trainings and our own by benchmarks/scaling.py; docs/scaling
says where it is right and where not.
"""

import math
from dataclasses import dataclass

from launchers.estimate.machines import Machine
from sbf_dist.train.utilisation import TRAINING_PASSES

# Images that a CPU thread decodes, crops and resizes in a second: half of what two threads did with
# photographs of ILSVRC's size (benchmarks/results/loader.json, 2026-11-25: 1,711 images/s).
DECODED_PER_S = 855.0
# Standard deviation of a GPU's compute, as a share of it: what brings the model to the 1 and 8 GPUs
# of NVIDIA's DGX-1 and DGX A100 (benchmarks/scaling.py), on which gradients take next to no time.
JITTER = 0.03
# Share of the backward pass behind which gradients can be exchanged: DeepSpeed, as it is set here,
# exchanges them after it. PyTorch's DDP and Horovod begin with the first bucket.
NO_OVERLAP, OVERLAP = 0.0, 0.9
BACKWARD = 2 / TRAINING_PASSES  # of a training step's compute


@dataclass(frozen=True)
class Work:
    """What a training step has to do.

    trained_macs   multiply-adds of a forward pass of the trained network, one image
    frozen_macs    of the teachers that run beside it
    layers         of all these networks, a forward pass
    gradient_bytes that all GPUs exchange
    """

    trained_macs: float
    frozen_macs: float
    trained_layers: int
    frozen_layers: int
    gradient_bytes: float


@dataclass(frozen=True)
class StepTime:
    """Where the seconds of a step go; communication is what is not hidden behind the compute.

    starts_layers  whether the GPU is busier with starting layers than with computing them
    """

    compute: float
    images: float
    communication: float
    stragglers: float
    starts_layers: bool

    @property
    def total(self) -> float:
        """Images are read while the step before computes."""
        return max(self.compute + self.communication + self.stragglers, self.images)

    @property
    def bound(self) -> str:
        """What most of it goes into."""
        if self.images >= self.total:
            return "images"
        if self.communication > self.compute:
            return "communication"
        return "few images" if self.starts_layers else "compute"


def step_time(
    work: Work, machine: Machine, *, gpus: int, images: float, overlap: float = NO_OVERLAP
) -> StepTime:
    """Estimate a step of `images` per GPU on so many GPUs, in as few machines as hold them."""
    arithmetic, starts = arithmetic_time(work, machine, images), starting_time(work, machine)
    compute = max(arithmetic, starts)
    on_machine = min(gpus, machine.gpus)
    exchanged = all_reduce_time(work.gradient_bytes, machine, gpus)
    hidden = overlap * BACKWARD * compute
    return StepTime(
        compute=compute,
        images=images * on_machine / (DECODED_PER_S * machine.cpus),
        communication=max(0.0, exchanged - hidden),
        stragglers=straggling_time(compute, gpus),
        starts_layers=starts > arithmetic,
    )


def straggling_time(compute: float, ranks: int) -> float:
    """Estimate the seconds that ranks wait for the slowest: the largest of n normal deviations."""
    return compute * JITTER * math.sqrt(2 * math.log(ranks))


def arithmetic_time(work: Work, machine: Machine, images: float) -> float:
    """Estimate the seconds that a GPU computes for a step of many `images`."""
    macs = images * (TRAINING_PASSES * work.trained_macs + work.frozen_macs)
    return macs / machine.training_macs_per_s


def starting_time(work: Work, machine: Machine) -> float:
    """Estimate the seconds that it takes to start all layers of a step, however few the images."""
    layers = TRAINING_PASSES * work.trained_layers + work.frozen_layers
    return layers * machine.layer_s


def all_reduce_time(size: float, machine: Machine, gpus: int) -> float:
    """Estimate the seconds until all GPUs have the sum of `size` bytes of each.

    Within a machine by a ring, between machines, all GPUs of one through its connection, by a ring
    or a tree, whichever is faster; piece by piece, so that the slower of the two counts. Patarasuk
    and Yuan 2009 (rings), Sanders et al. 2009 (double trees).
    """
    on_machine = min(gpus, machine.gpus)
    machines = math.ceil(gpus / machine.gpus)
    ring = ring_time(size, on_machine, machine.inside.bytes_per_s, machine.inside.latency_s)
    between = machine.between
    ways = (
        ring_time(size, machines, between.bytes_per_s, between.latency_s),
        tree_time(size, machines, between.bytes_per_s, between.latency_s),
    )
    return max(ring, min(ways))


def ring_time(size: float, members: int, bytes_per_s: float, latency_s: float) -> float:
    """Seconds of a ring: everybody sends its part on, 2 (n - 1) times."""
    return 2 * (members - 1) * (size / members / bytes_per_s + latency_s)


def tree_time(size: float, members: int, bytes_per_s: float, latency_s: float) -> float:
    """Seconds of two trees that share the data, each member inner in one: up, and down again."""
    if members == 1:
        return 0.0
    return 2 * size / bytes_per_s + 2 * math.ceil(math.log2(members)) * latency_s
