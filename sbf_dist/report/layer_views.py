"""Looking into converted layers: filters, transformations, feature maps, beside the dense ones."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sbf_dist.compression.plan import Plan, Removed, SBFLayer
from sbf_dist.hooks import registered
from sbf_dist.layers import SBFConv2d
from sbf_dist.report.contents import LayerView, RebuiltChannel, Source

_MOST_KEPT = 24  # filters that are shown
_MOST_REBUILT = 6  # channels that are shown
_MOST_SOURCES = 4  # of a channel, that are shown
_MOST_LAYERS = 3


def chosen_layers(plan: Plan) -> list[str]:
    """Return the layers that are rebuilt best, middling and worst, in forward order."""
    converted = {n: layer for n, layer in plan.layers.items() if isinstance(layer, SBFLayer)}
    ranked = sorted(converted, key=lambda name: converted[name].error)
    if len(ranked) > _MOST_LAYERS:
        ranked = [ranked[0], ranked[len(ranked) // 2], ranked[-1]]
    return [name for name in converted if name in ranked]


@torch.inference_mode()
def view_layers(
    dense: nn.Module,
    converted: nn.Module,
    plan: Plan,
    names: Sequence[str],
    image: Tensor | None,
) -> list[LayerView]:
    """Look into layers of a network and of its dense one.

    names  converted layers of the plan
    image  (1, C, H, W), as the networks take it; None: no feature maps
    """
    maps = [_feature_maps(network, names, image) for network in (dense, converted)]
    return [
        _view(
            name,
            _conv(dense, name),
            _sbf(converted, name),
            plan.removed.get(name),
            (maps[0].get(name), maps[1].get(name)),
        )
        for name in names
    ]


def _view(
    name: str,
    dense: nn.Conv2d,
    sbf: SBFConv2d,
    removed: Removed | None,
    maps: tuple[Tensor | None, Tensor | None],
) -> LayerView:
    out = _remaining(dense.out_channels, removed.out if removed is not None else [])
    dense_filters, filters = _filters(dense, sbf, removed, out)
    basis = sbf.basis.weight.float().numpy()
    kept = {out[channel]: basis[place] for place, channel in enumerate(sbf.kept[:_MOST_KEPT])}
    dense_maps, rebuilt_maps = maps
    errors = None
    if dense_maps is not None and rebuilt_maps is not None:
        dense_maps = dense_maps[out]
        errors = _errors(dense_maps, rebuilt_maps)
    rebuilt = [c for c in range(sbf.out_channels) if c not in set(sbf.kept)]
    channels = []
    for place in _spread(rebuilt, errors):
        channel = rebuilt[place]
        sources, more = _sources(sbf, place, out)
        channels.append(
            RebuiltChannel(
                channel=out[channel],
                sources=sources,
                more=more,
                dense=None if dense_filters is None else dense_filters[channel],
                rebuilt=None if filters is None else filters[channel],
                dense_map=None if dense_maps is None else dense_maps[channel].numpy(),
                rebuilt_map=None if rebuilt_maps is None else rebuilt_maps[channel].numpy(),
                error=None if errors is None else float(errors[channel]),
            )
        )
    return LayerView(name, kept, len(sbf.kept), channels, len(rebuilt), sbf.transform_size)


def _filters(
    dense: nn.Conv2d, sbf: SBFConv2d, removed: Removed | None, out: Sequence[int]
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return the filters of both, of one size; None where no filter equals the SBF layer."""
    try:
        rebuilt = sbf.effective_filter().float()
    except ValueError:  # groups, dilation, or something within the layer
        return None, None
    inputs = _remaining(dense.in_channels, removed.inp if removed is not None else [])
    filters = dense.weight[list(out)][:, inputs].float()
    (height, width), (k_h, k_w) = rebuilt.shape[2:], filters.shape[2:]
    top, left = (height - k_h) // 2, (width - k_w) // 2
    padding = (left, width - k_w - left, top, height - k_h - top)
    return nn.functional.pad(filters, padding).numpy(), rebuilt.numpy()


def _sources(sbf: SBFConv2d, place: int, out: Sequence[int]) -> tuple[list[Source], int]:
    """Return the sources of the rebuilt channel at a place that weigh most, and the others' number.

    A source weighs what its filter, transformed, adds: the product of both norms.
    """
    kernels = sbf.transforms[place].float()
    numbers = sbf.rebuilt_from[place]
    norms = sbf.basis.weight[sbf.sources[place]].flatten(1).norm(dim=1)
    weights = kernels.flatten(1).norm(dim=1) * norms
    order = weights.argsort(descending=True)[:_MOST_SOURCES].tolist()
    found = [Source(out[numbers[i]], kernels[i].numpy()) for i in order]
    return found, len(numbers) - len(found)


def _spread(rebuilt: Sequence[int], errors: Tensor | None) -> list[int]:
    """Return places of channels, evenly from the best rebuilt to the worst."""
    places = list(range(len(rebuilt)))
    if errors is not None:
        places.sort(key=lambda place: float(errors[rebuilt[place]]))
    if len(places) <= _MOST_REBUILT:
        return places
    steps = np.linspace(0, len(places) - 1, _MOST_REBUILT).round().astype(int)
    return [places[step] for step in steps]


def _errors(dense: Tensor, rebuilt: Tensor) -> Tensor:
    """Return for each map the share of its variance that is missed."""
    missed = (dense - rebuilt).square().sum((1, 2))
    spread = (dense - dense.mean((1, 2), keepdim=True)).square().sum((1, 2))
    return missed / spread.clamp(min=1e-12)


def _feature_maps(
    network: nn.Module, names: Sequence[str], image: Tensor | None
) -> dict[str, Tensor]:
    if image is None:
        return {}
    with _watched(network, names) as maps:
        network(image)
    return {name: values[0].float() for name, values in maps.items()}


@contextmanager
def _watched(network: nn.Module, names: Sequence[str]) -> Iterator[Mapping[str, Tensor]]:
    maps: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            maps[name] = output.detach()

        return hook

    handles = (network.get_submodule(n).register_forward_hook(keep(n)) for n in names)
    with registered(handles):
        yield maps


def _remaining(channels: int, removed: Sequence[int]) -> list[int]:
    return [channel for channel in range(channels) if channel not in set(removed)]


def _conv(network: nn.Module, name: str) -> nn.Conv2d:
    module = network.get_submodule(name)
    assert isinstance(module, nn.Conv2d), name
    return module


def _sbf(network: nn.Module, name: str) -> SBFConv2d:
    module = network.get_submodule(name)
    assert isinstance(module, SBFConv2d), name
    return module
