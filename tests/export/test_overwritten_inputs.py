"""What a fused residual may overwrite."""

import operator
from collections.abc import Callable

import pytest
import torch
from fused_networks import check_agreement, fused, random_sbf_layer
from torch import Tensor, nn
from torch.nn import functional as F

from sbf_dist.export.optimize import optimize


class WritesItsInput(nn.Module):
    """Between the convolution and the addition, its input is overwritten."""

    def __init__(self, write: Callable) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = random_sbf_layer(nn.Conv2d(8, 8, 3, padding=1))
        self.relu = nn.ReLU(inplace=True)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        y = self.conv(x)
        return y + self.write(self, x)


@pytest.mark.parametrize(
    "write",
    [
        lambda model, x: model.relu(x),
        lambda model, x: F.relu(x, True),
        lambda model, x: F.silu(x, inplace=True),
        lambda model, x: x.relu_(),
        lambda model, x: torch.relu_(x),
        lambda model, x: operator.iadd(x, 1),
    ],
)
def test_input_that_is_overwritten_before_the_addition_is_read_before_it(write: Callable) -> None:
    model = WritesItsInput(write).eval()
    check_agreement(optimize(model), model, torch.randn(2, 8, 9, 7))


@pytest.mark.parametrize("sbf", [True, False])
def test_residual_is_overwritten_by_its_last_reader_only(sbf: bool) -> None:
    class Blocks(nn.Module):
        """Two residual blocks; the input of the second is read again after it, or not."""

        def __init__(self, again: Callable) -> None:
            super().__init__()
            torch.manual_seed(0)
            convolutions = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)]
            if sbf:
                convolutions[1] = random_sbf_layer(convolutions[1])
            self.first, self.second, self.third, self.last = convolutions
            self.again = again

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.first(x))
            y = F.relu(self.third(F.relu(self.second(x))) + x)
            return self.last(y) + y + self.again(x)

    def overwrites(again: Callable, name: str) -> bool:
        model = Blocks(again).eval()
        optimized = optimize(model)
        x = torch.randn(2, 8, 9, 7)
        check_agreement(optimized, model, x)
        check_agreement(optimized, model, x.contiguous(memory_format=torch.channels_last))
        return fused(optimized, name).overwrites_residual

    assert overwrites(lambda x: 0, "third")
    assert not overwrites(lambda x: 0, "last")  # its image is its residual
    assert not overwrites(lambda x: x, "third")
    assert not overwrites(lambda x: x.flatten(2).view_as(x), "third")


def test_input_of_the_network_is_never_overwritten() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x) + x
            return F.relu(self.second(y) + y.view(y.shape))

    optimized = optimize(Residual().eval())
    x = torch.randn(2, 4, 9, 7).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    with torch.inference_mode():
        optimized(x)
    assert torch.equal(x, before)
