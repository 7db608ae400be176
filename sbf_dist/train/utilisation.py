"""How much of a device's arithmetic a training uses."""

import time

import torch

_PRODUCTS = 5  # of which the fastest counts
_SIDES = {"cpu": 1024, "cuda": 8192}
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TRAINING_PASSES = 3  # multiply-adds of a training step, in forward passes: backward is two


def peak_macs_per_s(device: torch.device, precision: str) -> float:
    """Measure the multiply-adds a second of a large matrix product on a device.

    That is what a network can reach at most, and less than the figure of a data sheet. It takes
    some hundredths of a second.
    """
    side = _SIDES.get(device.type, _SIDES["cuda"])
    # Random, as a GPU multiplies equal numbers faster, and without a draw from the training's own.
    generator = torch.Generator(device).manual_seed(0)
    matrix = torch.randn(side, side, device=device, generator=generator).to(_TYPES[precision])
    seconds = []
    for _ in range(_PRODUCTS):
        _finish(device)
        start = time.perf_counter()
        matrix @ matrix
        _finish(device)
        seconds.append(time.perf_counter() - start)
    return side**3 / min(seconds)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
