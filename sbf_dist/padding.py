"""Zero padding that nn.Conv2d has no setting for: uneven, or computed from the input's size."""

from torch import Tensor, nn
from torch.nn import functional as F

Pair = tuple[int, int]


class SamePadding(nn.Module):
    """Zeros around (N, C, H, W), so that a convolution gives ceil(H / stride) x ceil(W / stride).

    As TensorFlow's "SAME": the number follows from the input's size, and an odd zero is put at the
    end (below and to the right).
    """

    def __init__(self, kernel_size: Pair, stride: Pair, dilation: Pair) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = stride
        self.dilation = dilation

    def amounts(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the zeros to the left, right, above and below of an input of this size."""
        sides = zip((height, width), self.kernel_size, self.stride, self.dilation, strict=True)
        totals = [max(0, (-(-n // s) - 1) * s + d * (k - 1) + 1 - n) for n, k, s, d in sides]
        (top, bottom), (left, right) = ((total // 2, total - total // 2) for total in totals)
        return left, right, top, bottom

    def forward(self, x: Tensor) -> Tensor:
        """Pad the last two axes."""
        return F.pad(x, self.amounts(x.shape[-2], x.shape[-1]))

    def extra_repr(self) -> str:
        """Tell what the amounts follow from."""
        return f"kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}"


class PaddedConv2d(nn.Conv2d):
    """An nn.Conv2d, with no padding of its own, of what the module `pad` makes of its input.

    It takes over the parts of `conv`, which must not be used afterwards.
    """

    pad: nn.Module

    def __init__(self, conv: nn.Conv2d, pad: nn.Module) -> None:
        assert tuple(conv.padding) == (0, 0) and conv.padding_mode == "zeros"
        self.__dict__.update(conv.__dict__)
        self.pad = pad

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(self.pad(input), weight, bias)


def pad_of(conv: nn.Module) -> nn.Module | None:
    """Return what pads the input of a convolution beside its own padding, if anything does."""
    return conv.pad if isinstance(conv, PaddedConv2d) else None
