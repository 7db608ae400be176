"""How far the outputs of two networks are apart.

The divergence of each output that counts (`named_outputs`) is one of two:

kl      of logits (N, K, …): KL divergence from the dense network's predictions, mean over positions
error   of anything else: mean squared error, in units of the variance of the dense network's output

'auto' takes an output (N, K), K ≥ 2, for logits if it is what a linear layer gives (log_softmax
and changes of shape or type may follow), or if K is the network's own attribute `num_classes`.
Several outputs count alike.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.finite import check_outputs
from sbf_dist.compression.named_outputs import ALONE, counted, named_tensors, run_on
from sbf_dist.compression.precision import widened
from sbf_dist.errors import UserError
from sbf_dist.hooks import first_given, leaves, registered
from sbf_dist.settings import Compression, Divergence, DivergenceFunction

Kind = Literal["kl", "error"]

# Of drawn losses of logits. A few images show few of the classes. At 1, an error in the logits of
# all the others would count for nothing, though other images will have them.
TEMPERATURE = 4.0
LEAST_SCALE = 1e-3  # of drawn losses: what they say of channels beside each other is not lost
IMAGES = 128  # on which the variance of outputs is measured

_LINEAR = {F.linear, F.log_softmax, torch.log_softmax, Tensor.log_softmax}
_PASSING = {
    *(Tensor.to, Tensor.float, Tensor.double, Tensor.clone, Tensor.contiguous, Tensor.view),
    *(Tensor.reshape, Tensor.flatten, torch.flatten, Tensor.squeeze, torch.squeeze),
}


@dataclass(frozen=True)
class Output:
    """An output that counts.

    variance: the unit of a squared error, not used by a KL divergence; scale: of the losses that
    are drawn for logits, see `losses`.
    """

    name: str
    kind: Kind
    variance: float = 1.0
    scale: float = 1.0

    def distances(self, found: Tensor, wanted: Tensor) -> Tensor:
        """Return how far `found` is from the dense network's `wanted`, of each image, (N,)."""
        found, wanted = widened(found), widened(wanted)
        if self.kind == "error":
            return (found - wanted).square().reshape(len(found), -1).mean(1) / self.variance
        logs = wanted.log_softmax(1)
        divergence = (logs.exp() * (logs - found.log_softmax(1))).sum(1)
        return divergence.reshape(len(divergence), -1).mean(1)

    def losses(self, output: Tensor, generator: torch.Generator, draws: int) -> Iterator[Tensor]:
        """Give losses, drawn at random, with gradients g such that E⟨g, e⟩² / 2 is the divergence.

        Of an error e of the output, to second order, and of each image. For logits, the negative
        log-probability of a class that is drawn from them, at each position; for others, a normally
        distributed direction: a square root of the generalised Gauss-Newton matrix (Martens, arXiv
        1412.1193, sections 5 and 9). Logits are divided by TEMPERATURE before, and the losses
        multiplied by it and by `scale`, so that on average gradients are as large as without.
        """
        output = widened(output)
        if self.kind == "error":
            for _ in range(draws):
                direction = torch.randn(output.shape, generator=generator).to(output)
                scale = 2 / (self.variance * output[0].numel())
                yield (direction * output).sum() * scale**0.5
            return
        logs = (output / TEMPERATURE).log_softmax(1).movedim(1, -1)
        positions = logs[0].numel() // logs.shape[-1]
        logs = logs.reshape(-1, logs.shape[-1])
        drawn = torch.multinomial(
            logs.detach().exp().cpu(), draws, replacement=True, generator=generator
        )
        for classes in drawn.T.to(logs.device):
            loss = F.nll_loss(logs, classes, reduction="sum")
            yield self.scale * TEMPERATURE * loss / positions**0.5


@dataclass(frozen=True)
class Yardstick:
    """Which outputs of a network count, and how far those of another are from them.

    function: the user's own, of (student's outputs, dense network's outputs), both as the networks
    give them; its result judges instead of the mean over `outputs`. Where derivatives are needed,
    those of `outputs` serve.
    """

    outputs: tuple[Output, ...]
    function: DivergenceFunction | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, dense: nn.Module, images: Calibration, settings: Compression) -> "Yardstick":
        """Find out what counts in the outputs of `dense`, in eval mode, for `images`.

        Raises UserError if it cannot take them, for names of `settings.outputs` that it does not
        have, and for divergence 'kl' of an output without classes.
        """
        kinds = _kinds(dense, images.first(2), settings.outputs, settings.divergence)
        others = [name for name, (kind, _) in kinds.items() if kind == "error"]
        logits = [name for name in kinds if name not in others]
        variances, scales = _variances(dense, images, others), _scales(dense, images, logits)
        own = settings.divergence
        return cls(
            tuple(
                Output(name, kind, variances.get(name, 1.0), scales.get(name, 1.0))
                for name, (kind, _) in kinds.items()
            ),
            own if callable(own) else None,
        )

    @property
    def title(self) -> str:
        """What the divergence is called, and how large ones are meant."""
        if self.function is not None:
            return "divergence"
        kinds = {output.kind for output in self.outputs}
        return {"kl": "KL", "error": "error"}[kinds.pop()] if len(kinds) == 1 else "divergence"

    def tensors(self, outputs: Any) -> list[Tensor]:
        """Take what counts out of a network's outputs.

        Networks that give one tensor may give more of them in training, with auxiliary heads: then
        the first.
        """
        found = named_tensors(outputs)
        if ALONE not in found and [output.name for output in self.outputs] == [ALONE]:
            return [next(iter(found.values()))]
        return [found[output.name] for output in self.outputs]

    def losses(self, outputs: Any, generator: torch.Generator, draws: int = 1) -> Iterator[Tensor]:
        """Give losses as `Output.losses` does, of all that counts in a network's outputs."""
        scale = len(self.outputs) ** -0.5
        rows = [
            output.losses(tensor, generator, draws)
            for output, tensor in zip(self.outputs, self.tensors(outputs), strict=True)
        ]
        for losses in zip(*rows, strict=True):
            yield torch.stack([scale * loss for loss in losses]).sum()

    def distillation(self, found: Any, wanted: Any, temperature: float) -> Tensor:
        """Return the loss that draws outputs `found` to the dense network's `wanted`."""
        pairs = zip(self.outputs, self.tensors(found), self.tensors(wanted), strict=True)
        losses = [
            output.distances(one / temperature, other / temperature).mean() * temperature**2
            for output, one, other in pairs
        ]
        return torch.stack(losses).mean()


LOGITS = Yardstick((Output(ALONE, "kl"),))  # of a classifier that gives one tensor


def run_backward(
    model: nn.Module,
    hooks: Mapping[str, Callable[[nn.Module], RemovableHandle]],
    batches: Iterable[Tensor],
    yardstick: Yardstick,
    *,
    seed: int,
    draws: int = 1,
) -> Iterator[int]:
    """Run batches forward, and back from each of `draws` drawn losses (`Yardstick.losses`).

    `hooks` register, on the modules of their names, what looks at gradients; these reach all of
    them. Gives the number of images after each pass backward. Take all: hooks go at the end.
    """
    generator = torch.Generator().manual_seed(seed)
    handles = (register(model.get_submodule(name)) for name, register in hooks.items())
    with leaves(model, hooks) as found, registered(handles):
        for batch in batches:
            images = batch.detach().requires_grad_()
            with torch.enable_grad():
                outputs = model(images)
                check_outputs(model, images, yardstick.tensors(outputs))
                losses = yardstick.losses(outputs, generator, draws)
            for number in range(1, draws + 1):
                with torch.enable_grad():
                    loss = next(losses)
                # Without hooks there may be nothing to go back to: all is behind no_grad.
                if hooks or loss.requires_grad:
                    torch.autograd.grad(
                        loss,
                        [images, *found],
                        retain_graph=number < draws,
                        allow_unused=True,
                    )
                if number == draws:
                    found.clear()
                yield len(images)


def number_of_classes(dense: nn.Module, examples: Tensor, settings: Compression) -> int:
    """Return the classes of the first output that is logits; 0 if none is.

    Logits are what 'auto' takes for them, unless `settings` ask for 'kl'. Raises UserError as
    `Yardstick.of` does.
    """
    kinds = (
        _kinds(dense, examples, settings.outputs, "kl")
        if settings.divergence == "kl"
        else _kinds(dense, examples, None, "auto")
    )
    return next((classes for kind, classes in kinds.values() if kind == "kl"), 0)


@torch.no_grad()
def _kinds(
    dense: nn.Module,
    examples: Tensor,
    names: Sequence[str] | None,
    asked: Divergence | DivergenceFunction,
) -> dict[str, tuple[Kind, int]]:
    """Map what counts to its kind of divergence, and to what would be its number of classes."""
    linear = _LinearOutputs()
    with torch.enable_grad(), linear, _all_learning(dense):
        given = run_on(dense, examples.detach())
    tensors = counted(dense, given, len(examples), names)
    check_outputs(dense, examples, tensors.values())
    own_classes = getattr(dense, "num_classes", None)
    kinds: dict[str, tuple[Kind, int]] = {}
    for name, tensor in tensors.items():
        classes = tensor.shape[1] if tensor.ndim > 1 else 0
        is_logits = tensor.ndim == 2 and (linear.gave(tensor) or classes == own_classes)
        if asked == "kl" and classes < 2:
            raise UserError(
                f"divergence = 'kl': output {name or 'of the network'} is {tuple(tensor.shape)}, "
                "and logits are (N, classes, …)"
            )
        if asked == "kl" or (asked != "error" and is_logits and classes > 1):
            kinds[name] = "kl", classes
        else:
            kinds[name] = "error", classes
    return kinds


@contextmanager
def _all_learning(model: nn.Module) -> Iterator[None]:
    """Let all parameters have gradients in a `with` block, so that what depends on them has."""
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_()
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


class _LinearOutputs(TorchFunctionMode):
    """Notes, while active, what linear layers give, also behind changes of shape and type."""

    def __init__(self) -> None:
        super().__init__()
        self._given: dict[int, Tensor] = {}  # kept alive, so that identities stay unique

    def gave(self, tensor: Tensor) -> bool:
        return id(tensor) in self._given

    def __torch_function__(
        self,
        func: Callable,
        types: Sequence[type],
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        passes = func in _PASSING and id(first_given(args, kwargs or {})) in self._given
        if (func in _LINEAR or passes) and isinstance(result, Tensor):
            self._given[id(result)] = result
        return result


def _scales(dense: nn.Module, images: Calibration, names: list[str]) -> dict[str, float]:
    """Return by how much drawn losses of logits are larger without a temperature than with it.

    The mean square of a gradient is 1 - Σ p²: next to nothing where a network is sure, which is
    what tells it from one whose outputs any error changes.
    """
    if not names:
        return {}
    doubts = {name: [0.0, 0.0] for name in names}
    for batch in images.parts(images.part, IMAGES):
        found = named_tensors(dense(batch))
        for name in names:
            logits = widened(found[name])
            for index, temperature in enumerate((1.0, TEMPERATURE)):
                squares = (logits / temperature).softmax(1).square().sum(1)
                doubts[name][index] += float((1 - squares).double().sum())
    return {
        name: max(LEAST_SCALE, (one / other) ** 0.5) if other > 0 else 1.0
        for name, (one, other) in doubts.items()
    }


def _variances(dense: nn.Module, images: Calibration, names: list[str]) -> dict[str, float]:
    """Mean over channels (dimension 1) of each output's variance over images and positions.

    An output that is always the same, as that for one image may be, has its mean square instead.
    """
    if not names:
        return {}
    sums: dict[str, list[Tensor]] = {}
    counts = dict.fromkeys(names, 0)
    for batch in images.parts(images.part, IMAGES):
        found = named_tensors(dense(batch))
        for name in names:
            rows = found[name].double()
            rows = (
                rows.movedim(1, -1).reshape(-1, rows.shape[1]) if rows.ndim > 1 else rows[:, None]
            )
            terms = [rows.sum(0), rows.square().sum(0)]
            old = sums.get(name)
            sums[name] = terms if old is None else [a + b for a, b in zip(old, terms, strict=True)]
            counts[name] += len(rows)
    variances = {}
    for name, (first, second) in sums.items():
        square = float(second.mean()) / counts[name]
        variance = square - float(first.square().mean()) / counts[name] ** 2
        if not variance > 1e-12 * square:
            variance = square
        variances[name] = variance if variance > 0 else 1.0
    return variances
