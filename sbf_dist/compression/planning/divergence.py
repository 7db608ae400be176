"""How much rebuilding a layer changes the network's outputs, for all layers in one pass."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sbf_dist.compression.fitting.layerwise import layer_of
from sbf_dist.compression.fitting.mixture import Mixture
from sbf_dist.compression.fitting.transforms import Fit
from sbf_dist.compression.outputs import LOGITS, Yardstick, run_backward
from sbf_dist.compression.precision import widened
from sbf_dist.ops import expand


@dataclass(frozen=True)
class Trial:
    """A way to rebuild a layer: all channels but `kept`, ascending, as `fit` does."""

    kept: list[int]
    fit: Fit

    def error(self, outputs: Tensor, bias: Tensor | None) -> tuple[Tensor, list[int]]:
        """Return what rebuilding differs by (N, P, H, W) from `outputs`, and which channels."""
        kept = set(self.kept)
        rebuilt = [channel for channel in range(outputs.shape[1]) if channel not in kept]
        basis = outputs[:, self.kept]
        if bias is not None:
            basis = basis - bias[self.kept, None, None]
        count = len(self.kept)
        shift = torch.cat([torch.zeros(count), self.fit.bias.float()])
        outputs_now = expand(
            basis.contiguous(),
            self.fit.transforms.to(basis),
            self.fit.sources.to(basis.device),
            torch.arange(count + len(rebuilt), device=basis.device),
            shift.to(basis),
        )
        return outputs_now[:, count:] - outputs[:, rebuilt], rebuilt


@dataclass(frozen=True)
class MixtureTrial:
    """A way to compute all of a layer's outputs from themselves, without bias: as `mixture` does.

    change: (C, C), the matrix that does it, less the identity; bias: (C,); single precision, as
    there are some of them for each layer.
    """

    change: Tensor
    bias: Tensor

    @classmethod
    def of(cls, mixture: Mixture) -> Self:
        """Keep of a mixture what its error follows from."""
        change = mixture.matrix.float()
        change.diagonal().sub_(1)
        return cls(change, mixture.bias.float())

    def products(self, seen: "Seen") -> Tensor:
        """Return the products ⟨g, e⟩ (N,) of gradients and this error, from their sums."""
        shift = self.bias.to(seen.gradients) - seen.bias
        return seen.pairs.flatten(1) @ self.change.to(seen.pairs).flatten() + seen.gradients @ shift


@dataclass(frozen=True)
class Seen:
    """Sums over the positions of a layer's outputs, of each image, whatever is tried on them.

    pairs: (N, C, C), of gradients by the first channel and outputs without `bias` by the second;
    gradients: (N, C); bias: (C,), the layer's.
    """

    pairs: Tensor
    gradients: Tensor
    bias: Tensor

    @classmethod
    def of(cls, gradient: Tensor, outputs: Tensor, bias: Tensor | None) -> Self:
        """Sum up gradients and outputs, both (N, C, H, W)."""
        own = outputs.new_zeros(outputs.shape[1]) if bias is None else bias.to(outputs)
        rows = gradient.to(outputs).flatten(2)
        pairs = rows @ (outputs - own[:, None, None]).flatten(2).mT
        return cls(pairs, rows.sum(2), own)


def divergences(
    model: nn.Module,
    trials: Mapping[str, Sequence[Trial | MixtureTrial]],
    batches: Iterable[Tensor],
    *,
    seed: int,
    draws: int = 1,
    yardstick: Yardstick = LOGITS,
) -> dict[str, list[float]]:
    """Estimate the divergence that each trial causes, all other layers being as they are.

    To second order, half of E⟨g, e⟩² with the gradient g of a loss that `yardstick` draws (of
    logits, the log-probability of a label drawn from the network's own predictions, at a
    temperature) and the error e in the layer's outputs. The product sums over channels and
    positions, so errors that add up count as they do in the network. `draws` losses are drawn for
    each image.
    """
    totals = {name: torch.zeros(len(row), dtype=torch.double) for name, row in trials.items()}
    count = 0

    def measure(name: str) -> Callable[[nn.Module], RemovableHandle]:
        bias = layer_of(model, name).bias
        mixes = any(isinstance(trial, MixtureTrial) for trial in trials[name])

        def hook(_: nn.Module, __: tuple[Tensor, ...], outputs: Tensor) -> Tensor:
            # A hook that knew `outputs` would keep the graph that keeps the hook.
            features = widened(outputs.detach())

            def backward(gradient: Tensor) -> None:
                with torch.no_grad():
                    seen = Seen.of(gradient, features, bias) if mixes else None
                    for index, trial in enumerate(trials[name]):
                        if isinstance(trial, MixtureTrial):
                            assert seen is not None
                            product = trial.products(seen)
                        else:
                            error, rebuilt = trial.error(features, bias)
                            product = (gradient[:, rebuilt] * error).sum((1, 2, 3))
                        totals[name][index] += float(product.double().square().sum()) / 2

            outputs.register_hook(backward)
            return outputs.clone()  # which an activation may overwrite in place

        return lambda layer: layer.register_forward_hook(hook)

    hooks = {name: measure(name) for name in trials}
    for images in run_backward(model, hooks, batches, yardstick, seed=seed, draws=draws):
        count += images
    return {name: (total / count).tolist() for name, total in totals.items()}
