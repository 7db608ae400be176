"""Kinds of machines, and what is known of their speed. Every figure says where it is from."""

from dataclasses import dataclass

from sbf_dist.train.utilisation import TRAINING_PASSES

RESNET50_MACS = 4.089e9  # of one image at 224 px, which the published speeds are of


@dataclass(frozen=True)
class Link:
    """A connection: bytes a second in one direction, and the seconds until the first arrives."""

    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True)
class Machine:
    """A kind of machine.

    training_macs_per_s  multiply-adds a second that a GPU reaches in the training of a ResNet-50 in
                         mixed precision, a backward pass counted as two forward passes
    layer_s              seconds that a GPU takes for a layer at least, however few the images are
    cpus                 threads of the machine, for decoding images
    inside, between      what connects a GPU with the others of its machine, and a machine with
                         other machines
    """

    name: str
    gpu: str
    gpus: int
    gpu_bytes: float
    training_macs_per_s: float
    layer_s: float
    cpus: int
    inside: Link
    between: Link


def _speed(images_per_s: float) -> float:
    """Multiply-adds a second, from a published ResNet-50 training at so many images a second."""
    return TRAINING_PASSES * RESNET50_MACS * images_per_s


# A network's line rate, of which NCCL and its like reach this share with large messages.
_OF_LINE_RATE = 0.8
_INSIDE_LATENCY_S = 10e-6
_BETWEEN_LATENCY_S = 25e-6
# benchmarks/results/gpu.json, H100: ResNet-50, one image, uncompiled: 4.02 ms, 175 layers.
_LAYER_S = 23e-6
# NVIDIA DeepLearningExamples, ResNet50 v1.5 for PyTorch, one A100: 2,470 images/s, mixed precision.
_A100_IMAGES_PER_S = 2470.0
# benchmarks/results/gpu.json, 2026-11-26: forward passes of 256 images on an H100 in fp16, without
# compilation: 12,300 images/s, in which a training is three passes. The ratio to the A100 is 1.66,
# that of the two memories' bandwidths (3,350 and 2,039 GB/s) 1.64.
_H100_IMAGES_PER_S = 12300 / TRAINING_PASSES
# Not measured: an A100's figure by the ratio of the memories' bandwidths, 300 to 2,039 GB/s.
_L4_IMAGES_PER_S = _A100_IMAGES_PER_S * 300 / 2039

MACHINES = {
    machine.name: machine
    for machine in (
        Machine(
            name="p5.48xlarge",
            gpu="H100 80 GB",
            gpus=8,
            gpu_bytes=80e9,
            training_macs_per_s=_speed(_H100_IMAGES_PER_S),
            layer_s=_LAYER_S,
            cpus=192,
            inside=Link(450e9 * _OF_LINE_RATE, _INSIDE_LATENCY_S),  # NVLink 4, data sheet
            between=Link(3200e9 / 8 * _OF_LINE_RATE, _BETWEEN_LATENCY_S),
        ),
        Machine(
            name="p4d.24xlarge",
            gpu="A100 40 GB",
            gpus=8,
            gpu_bytes=40e9,
            training_macs_per_s=_speed(_A100_IMAGES_PER_S),
            layer_s=_LAYER_S,
            cpus=96,
            inside=Link(300e9 * _OF_LINE_RATE, _INSIDE_LATENCY_S),  # NVLink 3, data sheet
            between=Link(400e9 / 8 * _OF_LINE_RATE, _BETWEEN_LATENCY_S),
        ),
        Machine(
            name="g6.12xlarge",
            gpu="L4 24 GB",
            gpus=4,
            gpu_bytes=24e9,
            training_macs_per_s=_speed(_L4_IMAGES_PER_S),
            layer_s=_LAYER_S,
            cpus=48,
            inside=Link(16e9 * _OF_LINE_RATE, _INSIDE_LATENCY_S),  # PCIe 4, 8 lanes
            between=Link(40e9 / 8 * _OF_LINE_RATE, _BETWEEN_LATENCY_S),
        ),
    )
}
