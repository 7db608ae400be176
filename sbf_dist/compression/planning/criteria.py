"""Criteria: which channels of a layer are its basis, of whatever size the budget allows.

- reconstruction: the channels from which the others are best rebuilt (`transforms.rank_channels`).
- l1, l2: the norms of the filters (Li et al., arXiv 1608.08710).
- bn_scale: |gamma| of the batch norm that reads the layer's output (Liu et al., arXiv 1708.06519).
- taylor: the squared sum over positions of gradient x activation, behind the batch norm where one
  follows (Molchanov et al. 2019, arXiv 1906.10771, section 3.2), of losses that
  `outputs.Output.losses` draws. For logits these have labels from the network's own predictions:
  calibration images have none.
- random: an order drawn from the seed; what a criterion must beat.

A criterion decides what is kept. How much is lost by it is estimated in the same way for all.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from sbf_dist.compression.finite import check_gradients
from sbf_dist.compression.fitting.layerwise import layer_of
from sbf_dist.compression.fitting.norms import following_norms
from sbf_dist.compression.fitting.statistics import Moments
from sbf_dist.compression.fitting.transforms import rank_channels
from sbf_dist.compression.outputs import LOGITS, Yardstick
from sbf_dist.compression.recognition import weight_of
from sbf_dist.errors import UserError
from sbf_dist.hooks import registered
from sbf_dist.layers import SBFConv2d

Criterion = Literal["reconstruction", "l1", "l2", "bn_scale", "taylor", "random"]
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)


@dataclass(frozen=True)
class Ranking:
    """How the channels of one layer are put in order.

    criterion: the one that was used, as a plan's reason names it; scores: (C,), the larger the
    more the channel matters, or None for 'reconstruction'; among: the channels that may be kept,
    None for all; groups: of the convolution, each of which keeps as many.
    """

    criterion: str
    scores: Tensor | None = None
    among: Collection[int] | None = None
    groups: int = 1

    def order(self, moments: Moments, sensitivity: Tensor) -> list[int]:
        """Order the channels so that each prefix, of whole rows of groups, is a basis."""
        if self.scores is None:
            ranked = rank_channels(moments, sensitivity, self.among)
        else:
            ranked = self.scores.argsort(descending=True, stable=True).tolist()
            ranked = ranked if self.among is None else [c for c in ranked if c in self.among]
        return ranked if self.groups == 1 else _in_turns(ranked, len(sensitivity), self.groups)

    def restrict(self, among: Collection[int]) -> "Ranking":
        """Return the ranking of these channels only."""
        return dataclasses.replace(self, among=frozenset(among))


def _in_turns(ranked: list[int], channels: int, groups: int) -> list[int]:
    """Order channels so that the first of all groups come first, then the second, and so on."""
    turns: dict[int, int] = {}
    of_group = [0] * groups
    for channel in ranked:
        group = channel * groups // channels
        turns[channel] = of_group[group]
        of_group[group] += 1
    return sorted(ranked, key=turns.__getitem__)


def rankings(
    model: nn.Module,
    names: list[str],
    batches: Callable[[], Iterable[Tensor]],
    criterion: str,
    seed: int,
    yardstick: Yardstick = LOGITS,
) -> dict[str, Ranking]:
    """Give each of the layers `names` of `model` (in eval mode) its order of channels.

    Channels that an SBF layer rebuilds have no filter: l1 and l2 rank them last. `batches` gives
    calibration images (N, C, H, W), anew at each call. Where bn_scale finds no batch norm with a
    scale behind a layer, l2 is used there, and the ranking says so. Raises UserError for an
    unknown criterion.
    """
    ranked = _rankings(model, names, batches, criterion, seed, yardstick)
    return {
        name: dataclasses.replace(ranking, groups=layer_of(model, name).groups)
        for name, ranking in ranked.items()
    }


def _rankings(
    model: nn.Module,
    names: list[str],
    batches: Callable[[], Iterable[Tensor]],
    criterion: str,
    seed: int,
    yardstick: Yardstick,
) -> dict[str, Ranking]:
    if criterion not in CRITERIA:
        raise UserError(f"criterion = {criterion!r} must be one of {', '.join(CRITERIA)}")
    if criterion == "reconstruction" or not names:
        return {name: Ranking(criterion) for name in names}
    if criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        widths = {name: layer_of(model, name).out_channels for name in names}
        return {
            name: Ranking(criterion, torch.rand(width, generator=generator, dtype=torch.double))
            for name, width in widths.items()
        }
    if criterion in ("l1", "l2"):
        norm = 1 if criterion == "l1" else 2
        return {name: Ranking(criterion, _filter_norms(model, name, norm)) for name in names}
    first = next(iter(batches()))
    following = following_norms(model, first[:2])
    if criterion == "bn_scale":
        return {name: _by_scale(model, name, following.get(name)) for name in names}
    readers = {name: following.get(name, name) for name in names}
    scores = _taylor(model, list(readers.values()), batches, seed, yardstick)
    return {name: Ranking(criterion, scores[reader]) for name, reader in readers.items()}


def _filter_norms(model: nn.Module, name: str, order: int) -> Tensor:
    layer = layer_of(model, name)
    weight = layer.basis.weight if isinstance(layer, SBFConv2d) else weight_of(layer)
    norms = weight.detach().flatten(1).double().norm(order, dim=1).cpu()
    if isinstance(layer, SBFConv2d):
        norms = (
            torch.zeros(layer.out_channels).double().index_put((torch.tensor(layer.kept),), norms)
        )
    return norms


def _by_scale(model: nn.Module, name: str, norm: str | None) -> Ranking:
    scale = None if norm is None else model.get_submodule(norm).weight
    if not isinstance(scale, Tensor):
        what = "no batch norm reads its output" if norm is None else "its batch norm has no scale"
        return Ranking(f"l2 ({what})", _filter_norms(model, name, 2))
    return Ranking("bn_scale", scale.detach().double().abs().cpu())


def _taylor(
    model: nn.Module,
    names: list[str],
    batches: Callable[[], Iterable[Tensor]],
    seed: int,
    yardstick: Yardstick,
) -> dict[str, Tensor]:
    """Mean over images of (sum over positions of gradient x activation)² of each channel.

    Raises UserError where gradients are not finite.
    """
    totals: dict[str, Tensor] = {}
    count = 0
    for outputs, gradients in _gradients(model, names, batches(), seed, yardstick):
        for name, gradient in zip(names, gradients, strict=True):
            products = (gradient.double() * outputs[name].detach().double()).sum((2, 3))
            total = products.square().sum(0)
            totals[name] = totals[name] + total if name in totals else total
        count += len(gradients[0])
    found = {name: total.cpu() / count for name, total in totals.items()}
    check_gradients(found)
    return found


def _gradients(
    model: nn.Module,
    names: list[str],
    batches: Iterable[Tensor],
    seed: int,
    yardstick: Yardstick,
) -> Iterator[tuple[dict[str, Tensor], tuple[Tensor, ...]]]:
    """Outputs of the named modules and, for each, the gradient of every image's own loss."""
    generator = torch.Generator().manual_seed(seed)
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, __: tuple[Tensor, ...], result: Tensor) -> Tensor:
            outputs[name] = result
            return result.clone()  # which an activation may overwrite in place

        return hook

    hooks = (model.get_submodule(name).register_forward_hook(keep(name)) for name in names)
    with registered(hooks):
        for images in batches:
            with torch.enable_grad():
                given = model(images.detach().requires_grad_())
                (loss,) = yardstick.losses(given, generator)
                gradients = torch.autograd.grad(loss, [outputs[name] for name in names])
            yield outputs, gradients
