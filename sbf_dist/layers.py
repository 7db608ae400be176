"""SBFConv2d: a convolution that computes some of its channels and rebuilds the others."""

import copy
import math
from collections.abc import Sequence
from typing import Literal, Self, TypedDict, Unpack

import torch
from torch import Tensor, nn

from sbf_dist.ops import expand, sbf_conv2d
from sbf_dist.padding import PaddedConv2d, pad_of


class ConvolutionKeywords(TypedDict, total=False):
    """What nn.Conv2d takes beside its channels and kernel size, with the same defaults."""

    stride: int | tuple[int, int]
    padding: int | tuple[int, int] | str
    dilation: int | tuple[int, int]
    groups: int
    bias: bool
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"]
    device: torch.device | str | None
    dtype: torch.dtype | None


class SBFConv2d(nn.Module):
    """Convolution of which `kept` channels are computed and the others rebuilt from these.

    A drop-in for nn.Conv2d: same input and output shapes and channel order. With the basis
    features z = basis(x), a kept channel is its z, and a rebuilt channel is the sum over its S
    sources of z[source] cross-correlated with an m x m kernel (zero padding, stride 1), all plus
    bias (Miles and Mikolajczyk, arXiv 2110.12844).

    kept: indices of the output channels that are kept, ascending; with groups, equally many of
    each group; or how many: then the first ones, of each group. sources: for each rebuilt channel,
    in ascending order, the S kept channels (output channel numbers) that it is rebuilt from; or S
    alone: then all kept channels are used by turns. transform_size: m, odd. between: a module that
    maps (N, B, H, W) to the same shape, through which basis features go before they are
    transformed; kept channels are the basis features themselves (after Miles and Mikolajczyk, ICCVW
    2023). pad: a module that pads the input, where `padding` cannot say how (`sbf_dist.padding`).
    The other arguments are nn.Conv2d's; padding_mode concerns the basis convolution only. Raises
    ValueError, naming the argument and its value, if these do not fit together.

    Parameters: basis.weight (B, in_channels / groups, k, k), transforms (P, S, m, m), bias
    (out_channels,) or None. Initially the basis and bias are nn.Conv2d's, and a transform is
    1 / sqrt(S) in its centre and zero elsewhere: a rebuilt channel is the sum of its sources,
    scaled so that uncorrelated sources of equal variance give their own variance.
    """

    sources: Tensor
    order: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        kept: int | Sequence[int],
        sources: int | Sequence[Sequence[int]],
        transform_size: int = 3,
        *,
        between: nn.Module | None = None,
        pad: nn.Module | None = None,
        **convolution: Unpack[ConvolutionKeywords],
    ) -> None:
        super().__init__()
        bias, groups = convolution.get("bias", True), convolution.get("groups", 1)
        convolution["bias"] = False  # which the whole layer has
        if isinstance(kept, int):
            kept = _first_channels(out_channels, groups, kept)
        if isinstance(sources, int):
            sources = _by_turns(out_channels, kept, sources)
        check_wiring(out_channels, groups, kept, sources, transform_size)
        basis = nn.Conv2d(in_channels, len(kept), kernel_size, **convolution)
        self.basis = basis if pad is None else PaddedConv2d(basis, pad)
        device, dtype = self.basis.weight.device, self.basis.weight.dtype
        self.between = between
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = self.basis.kernel_size
        self.stride = self.basis.stride
        self.padding = self.basis.padding
        self.dilation = self.basis.dilation
        self.groups = groups
        self.padding_mode = self.basis.padding_mode
        self.kept = tuple(kept)
        self.rebuilt_from = tuple(tuple(row) for row in sources)
        self.transform_size = transform_size

        # The wiring is given by the constructor's arguments, like a kernel size, so it is no state.
        positions, order = self.wiring()
        self.register_buffer("sources", positions.to(device), persistent=False)
        self.register_buffer("order", order.to(device), persistent=False)
        self.transforms = nn.Parameter(
            torch.empty(
                *positions.shape,
                transform_size,
                transform_size,
                device=device,
                dtype=dtype,
            )
        )
        self.bias = (
            nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        )
        self.reset_own_parameters()
        self.register_load_state_dict_post_hook(_wire_loaded)

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        kept: Sequence[int],
        sources: Sequence[Sequence[int]],
        transform_size: int = 3,
        between: nn.Module | None = None,
    ) -> Self:
        """Make the layer that keeps these filters of `conv`; transforms have their initial values.

        Filters and bias are copied, with dtype, device, memory format, training mode and
        requires_grad. Raises ValueError as the constructor does.
        """
        # PyTorch types the attributes of its own layers more loosely than their arguments.
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            kept,
            sources,
            transform_size,
            between=between,
            pad=copy.deepcopy(pad_of(conv)),
            stride=conv.stride,  # type: ignore[arg-type]
            padding=conv.padding,  # type: ignore[arg-type]
            dilation=conv.dilation,  # type: ignore[arg-type]
            groups=conv.groups,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        with torch.no_grad():
            # Indexing keeps the filters' own memory format.
            layer.basis.weight = nn.Parameter(conv.weight[list(kept)].clone())
            if layer.bias is not None and conv.bias is not None:
                layer.bias.copy_(conv.bias)
                layer.bias.requires_grad_(conv.bias.requires_grad)
        layer.basis.weight.requires_grad_(conv.weight.requires_grad)
        layer.transforms.requires_grad_(conv.weight.requires_grad)
        return layer.train(conv.training)

    def wiring(self) -> tuple[Tensor, Tensor]:
        """Give `sources` (P, S) and `order` (out_channels,) as `expand` wants them, on the CPU."""
        kept = {channel: b for b, channel in enumerate(self.kept)}
        rebuilt = [channel for channel in range(self.out_channels) if channel not in kept]
        entry = kept | {channel: len(kept) + p for p, channel in enumerate(rebuilt)}
        per_channel = len(self.rebuilt_from[0]) if rebuilt else 1
        positions = [kept[channel] for row in self.rebuilt_from for channel in row]
        order = [entry[channel] for channel in range(self.out_channels)]
        return (
            torch.tensor(positions, dtype=torch.int64, device="cpu").view(-1, per_channel),
            torch.tensor(order, dtype=torch.int64, device="cpu"),
        )

    def reset_parameters(self) -> None:
        """Give all parameters their initial values, and the buffers theirs."""
        self.basis.reset_parameters()
        for part in [] if self.between is None else self.between.modules():
            if callable(reset := getattr(part, "reset_parameters", None)):
                reset()
        self.reset_own_parameters()
        self.wire()

    def wire(self) -> None:
        """Give `sources` and `order` their values, where the transformations are.

        Loading a state dict, which does not have them, does so too: a layer that was made on the
        meta device, or is fresh from `to_empty`, has no values in them.
        """
        positions, order = self.wiring()
        device = self.transforms.device
        if self.sources.device == device:
            self.sources.copy_(positions)
            self.order.copy_(order)
        else:
            self.sources, self.order = positions.to(device), order.to(device)

    @torch.no_grad()
    def reset_own_parameters(self) -> None:
        """Give transforms and bias, but not the basis, their initial values."""
        middle = self.transform_size // 2
        self.transforms.zero_()
        self.transforms[:, :, middle, middle] = 1 / math.sqrt(self.transforms.shape[1])
        if self.bias is not None:
            fan_in = self.in_channels // self.groups * math.prod(self.kernel_size)
            bound = 1 / math.sqrt(fan_in) if fan_in > 0 else 0.0
            self.bias.uniform_(-bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H', W'), as nn.Conv2d, in its layout.

        Without gradients it is one operator, with them two: the basis features are kept for the
        backward pass. With something between basis and transformations there are always two, and in
        a traced or exported graph, which must not depend on the mode it was recorded in. The
        argument is called as nn.Conv2d's is: callers may name it.
        """
        if self._is_one_operator(input):
            pad = pad_of(self.basis)
            return sbf_conv2d(
                input if pad is None else pad(input),
                self.basis.weight,
                self.transforms,
                self.sources,
                self.order,
                self.bias,
                stride=self.stride,  # type: ignore[arg-type]
                padding=self.padding,  # type: ignore[arg-type]
                dilation=self.dilation,  # type: ignore[arg-type]
                groups=self.groups,
            )
        z = self.basis(input)
        if self.between is None:
            return expand(z, self.transforms, self.sources, self.order, self.bias)
        entries = torch.arange(len(self.order), device=input.device)
        rebuilt = expand(self.between(z), self.transforms, self.sources, entries)
        y = torch.cat([z, rebuilt[:, len(self.kept) :]], dim=1)[:, self.order]
        return y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]

    def _is_one_operator(self, x: Tensor) -> bool:
        hooked = self.basis._forward_hooks or self.basis._forward_pre_hooks
        kind = x.device.type
        return not (
            torch.is_grad_enabled()
            or is_recorded()
            or (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind))
            or self.padding_mode != "zeros"
            or isinstance(self.padding, str)
            or x.dtype != self.transforms.dtype
            or self.between is not None
            or hooked  # which wait for the basis features
        )

    @torch.no_grad()
    def effective_filter(self) -> Tensor:
        """Give the dense filter that equals the layer wherever its support meets no border.

        Returns (out_channels, in_channels, k + s(m-1), k + s(m-1)) for filters of size k and
        stride s (per axis). A convolution with it needs s(m-1)/2 more padding than the layer's.
        Raises ValueError if dilation or groups is not 1, or if something is between basis and
        transformations.
        """
        if self.between is not None:
            raise ValueError(f"no filter equals a layer with {self.between} between its parts")
        if self.dilation != (1, 1) or self.groups != 1:
            raise ValueError(
                f"effective_filter needs dilation 1 and groups 1, got dilation {self.dilation} "
                f"and groups {self.groups}"
            )
        weight, m = self.basis.weight, self.transform_size
        (k_h, k_w), (s_h, s_w) = self.kernel_size, self.stride
        kept, *_ = weight.shape
        shape = (self.in_channels, k_h + s_h * (m - 1), k_w + s_w * (m - 1))
        entries = weight.new_zeros((self.out_channels, *shape))
        top, left = s_h * (m - 1) // 2, s_w * (m - 1) // 2
        entries[:kept, :, top : top + k_h, left : left + k_w] = weight
        filters = weight[self.sources]
        for a in range(m):
            for b in range(m):
                entries[kept:, :, a * s_h : a * s_h + k_h, b * s_w : b * s_w + k_w] += torch.einsum(
                    "ps,ps...->p...", self.transforms[:, :, a, b], filters
                )
        return entries[self.order]

    def extra_repr(self) -> str:
        """Tell the layer's shape as nn.Conv2d does, and what of it is rebuilt."""
        rebuilt, per_channel = self.sources.shape
        parts = [
            f"{self.in_channels}, {self.out_channels}",
            f"kept={len(self.kept)}",
            f"rebuilt={rebuilt}",
            f"sources={per_channel}",
            f"transform_size={self.transform_size}",
        ]
        if self.bias is None:
            parts.append("bias=False")
        return ", ".join(parts)


def _first_channels(out_channels: int, groups: int, count: int) -> list[int]:
    """Return the first of each group's output channels, `count` in all."""
    if groups < 1 or count % groups or not 1 <= count <= out_channels:
        raise ValueError(
            f"kept is {count}: it must be a multiple of groups, {groups}, from 1 to the "
            f"{out_channels} of out_channels"
        )
    own = out_channels // groups
    return [group * own + place for group in range(groups) for place in range(count // groups)]


def _by_turns(out_channels: int, kept: Sequence[int], count: int) -> list[list[int]]:
    """Return `count` of the kept channels for each of the others, each as often as the next."""
    if not 1 <= count <= len(kept):
        raise ValueError(
            f"sources is {count}: it must lie in [1, {len(kept)}], those that are kept"
        )
    return [
        [kept[(rebuilt + place) % len(kept)] for place in range(count)]
        for rebuilt in range(out_channels - len(kept))
    ]


def _wire_loaded(layer: nn.Module, _: object) -> None:
    assert isinstance(layer, SBFConv2d)
    layer.wire()


def is_recorded() -> bool:
    """Tell whether torch.jit.trace or torch.export is running: what runs now runs ever after."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def check_wiring(
    out_channels: int,
    groups: int,
    kept: Sequence[int],
    sources: Sequence[Sequence[int]],
    transform_size: int,
) -> None:
    """Raise ValueError, naming argument and value, unless these describe an SBFConv2d."""
    if transform_size < 1 or transform_size % 2 == 0:
        raise ValueError(f"transform_size is {transform_size}: it must be odd and positive")
    if groups < 1 or out_channels % groups != 0:
        raise ValueError(
            f"out_channels is {out_channels}: it must be a multiple of groups, {groups}"
        )
    if list(kept) != sorted(set(kept)) or not kept:
        raise ValueError(f"kept is {list(kept)}: it must name channels in ascending order")
    if kept[0] < 0 or kept[-1] >= out_channels:
        raise ValueError(f"kept is {list(kept)}: its channels must lie in [0, {out_channels})")
    per_group = [0] * groups
    for channel in kept:
        per_group[channel * groups // out_channels] += 1
    if len(set(per_group)) > 1:
        raise ValueError(f"kept has {per_group} channels in its groups: they must be equally many")
    rebuilt = out_channels - len(kept)
    if len(sources) != rebuilt:
        raise ValueError(
            f"sources has {len(sources)} rows: there must be one for each of the {rebuilt} "
            "channels that are not kept"
        )
    lengths = sorted({len(row) for row in sources})
    if lengths and (len(lengths) > 1 or lengths[0] == 0):
        raise ValueError(
            f"sources has rows of lengths {lengths}: all must be equally long, and at least 1"
        )
    strangers = sorted({source for row in sources for source in row} - set(kept))
    if strangers:
        raise ValueError(f"sources names channels {strangers}: they are not in kept")
