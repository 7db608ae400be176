"""What an SBF layer is folded into where a batch norm all but silences a basis filter."""

from torch import Tensor, nn

from sbf_dist.ops import expand


class UnscaledSBFConv2d(nn.Module):
    """An SBF layer with some basis features that are no outputs themselves (inference only).

    `fold_batchnorm` gives it where a kept channel's batch-norm factor is zero or tiny: its basis
    feature stays as it is for the channels that are rebuilt from it, and the kept channel is
    itself rebuilt (a centre tap). `expand` then yields out_channels + hidden channels, of which
    the last are the hidden basis features and are cut off, as a view.

    basis: the convolution (N, C_in, H, W) -> (N, B, H', W'); transforms (P, S, m, m), sources
    (P, S) and order (B + P,) as for `sbf_dist.ops.expand`; bias (B + P,).
    """

    sources: Tensor
    order: Tensor

    def __init__(
        self,
        basis: nn.Conv2d,
        *,
        transforms: Tensor,
        sources: Tensor,
        order: Tensor,
        bias: Tensor,
        out_channels: int,
    ) -> None:
        super().__init__()
        self.basis = basis
        self.transforms = nn.Parameter(transforms)
        self.bias = nn.Parameter(bias)
        self.register_buffer("sources", sources, persistent=False)
        self.register_buffer("order", order, persistent=False)
        self.out_channels = out_channels

    def forward(self, input: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, out_channels, H', W')."""
        y = expand(self.basis(input), self.transforms, self.sources, self.order, self.bias)
        return y[:, : self.out_channels]
