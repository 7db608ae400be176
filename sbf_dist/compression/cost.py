"""What a network costs in multiply-adds and parameters, by tracing."""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sbf_dist.compression.dry_run import dry_run


@dataclass(frozen=True)
class Cost:
    """Cost of one forward pass of one image.

    `macs` counts the multiply-adds of convolutions, SBF layers and matrix products (batch norm,
    activations and pooling are left out, as is usual); `layers` gives them by module name (the
    first, of a module that has several), each including its children.
    """

    macs: int
    params: int
    layers: dict[str, int]


def count(model: nn.Module, input_shape: tuple[int, ...], image: Tensor | None = None) -> Cost:
    """Count `model` on one image of `input_shape` (channels, height, width).

    Every operator, however it is called, is seen by PyTorch's own counter. Nothing is computed,
    unless the network's code needs values: then it runs on `image` (1, C, H, W), or on random
    numbers if that is None (see `dry_run`).
    """

    def run(network: nn.Module, one: Tensor) -> tuple[nn.Module, FlopCounterMode]:
        with FlopCounterMode(display=False) as counter:
            network(one)
        return network, counter

    shadow, counter = dry_run(model, input_shape, run, image)
    root = type(shadow).__name__
    first_name = {module: name for name, module in shadow.named_modules()}
    layers: dict[str, int] = {}
    for path, flops in counter.get_flop_counts().items():
        if path.startswith(f"{root}."):
            module = shadow.get_submodule(path.removeprefix(f"{root}."))
            name = first_name[module]
            layers[name] = layers.get(name, 0) + sum(flops.values()) // 2
    return Cost(
        macs=counter.get_total_flops() // 2,
        params=sum(parameter.numel() for parameter in model.parameters()),
        layers=layers,
    )
