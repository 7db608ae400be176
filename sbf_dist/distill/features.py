"""Features of a student that follow those of the teacher that it was compressed from.

FitNets (Romero et al., arXiv 1412.6550), with the error in units of the teacher's own variance.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbf_dist.errors import UserError
from sbf_dist.hooks import registered
from sbf_dist.surgery import deep_copy, in_eval_mode

KEY = "features:"  # of a batch's entries that hold a teacher's features, before the layer's name
_SMALLEST = 1e-6  # variance of features that are the same everywhere
Hook = Callable[[nn.Module, Any, Any], None]


class Watched:
    """What layers of a network give in the first forward pass of each `with` block."""

    def __init__(self, network: nn.Module, layers: Iterable[str]) -> None:
        self._found: dict[str, Tensor] | None = None
        for name in layers:
            network.get_submodule(name).register_forward_hook(self._keep(name))

    def _keep(self, name: str) -> Hook:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            if self._found is not None:
                self._found.setdefault(name, output)

        return hook

    def __enter__(self) -> dict[str, Tensor]:
        """Return what will hold the outputs (N, C, H, W) by the layers' names."""
        self._found = {}
        return self._found

    def __exit__(self, *error: object) -> None:
        self._found = None


class FeatureLoss(nn.Module):
    """The mean over layers of the squared error, as a share of the teacher's variance.

    `channels`: of each layer, those of the student and of the teacher. Where they differ, a 1 × 1
    convolution, trained with the student, maps the one to the other. Where a teacher sees larger
    images, its features are averaged down to the student's height and width.
    """

    def __init__(self, channels: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        self.layers = list(channels)
        self.projections = nn.ModuleList(
            nn.Identity() if own == wanted else nn.Conv2d(own, wanted, 1)
            for own, wanted in channels.values()
        )

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        """Return a scalar; both map layers to features (N, C, H, W)."""
        errors = []
        for name, projection in zip(self.layers, self.projections, strict=True):
            own, wanted = projection(student[name]).float(), teacher[name].float()
            if own.shape[2:] != wanted.shape[2:]:
                wanted = F.adaptive_avg_pool2d(wanted, own.shape[2:])
            variance = wanted.var(correction=0).clamp_min(_SMALLEST)
            errors.append(F.mse_loss(own, wanted) / variance)
        return torch.stack(errors).mean()


def feature_loss(
    student: nn.Module,
    teacher: nn.Module,
    layers: Sequence[str],
    input_shape: tuple[int, int, int],
) -> FeatureLoss:
    """Return the loss between modules that have the same names in both networks.

    Without `layers` the last before pooling is taken. UserError: a network has no such module, or
    one that does not give features (N, C, H, W).
    """
    own = feature_channels(student, input_shape)
    wanted = feature_channels(teacher, input_shape)
    both = [name for name in own if name in wanted]
    chosen = list(layers) or both[-1:]
    for name in chosen:
        if name not in both:
            known = ", ".join(both[-5:]) or "none"
            raise UserError(
                f"distill.features.layers: {name!r} must be a module of student and teacher whose "
                f"output is (N, C, H, W); the last ones are {known}"
            )
    if not chosen:
        raise UserError("distill.features: the network has no features (N, C, H, W) to match")
    return FeatureLoss({name: (own[name], wanted[name]) for name in chosen})


@torch.no_grad()
def feature_channels(network: nn.Module, input_shape: tuple[int, int, int]) -> dict[str, int]:
    """Return the channels of all modules that give (N, C, H, W), H x W > 1, in order of their end.

    Of a module and its last part, which end together, the module comes last. The network is run
    on one black image, in evaluation mode.
    """
    found: dict[str, int] = {}

    def look(name: str) -> Hook:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            found.pop(name, None)
            if isinstance(output, Tensor) and output.ndim == 4 and output[0, 0].numel() > 1:
                found[name] = output.shape[1]

        return hook

    # Changing modes may change weights: of a copy, then.
    network = in_eval_mode(deep_copy(network))
    device = next(network.parameters()).device
    hooks = (m.register_forward_hook(look(n)) for n, m in network.named_modules() if n)
    with registered(hooks):
        network(torch.zeros(1, *input_shape, device=device))
    return found
