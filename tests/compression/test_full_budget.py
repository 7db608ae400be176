"""At the full budget nothing changes, also where nothing could be converted."""

import pytest
import torch
from small_networks import Small, pictures, small
from torch import Tensor, nn

import sbf_dist
from sbf_dist.settings import Compression


class FrozenBackbone(Small):
    """All but the head runs without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.norm1(self.conv1(self.stem(x).relu())).relu()
            x = self.norm2(self.conv2(x)).relu()
        return self.head(x.mean((2, 3)))


class WithoutGradients(Small):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x).mean((2, 3)))


@pytest.mark.parametrize("kind", [FrozenBackbone, WithoutGradients, Stem])
@pytest.mark.parametrize(
    "settings",
    [{"macs": 1.0}, {"params": 1.0, "criterion": "taylor"}, {"macs": 1.0, "removal": 1.0}],
)
def test_a_network_in_which_nothing_can_be_converted_stays_as_it_is(
    kind: type[nn.Module], settings: dict
) -> None:
    torch.manual_seed(0)
    network, images = kind(), pictures(24)
    if isinstance(network, Small):
        network.load_state_dict(small().state_dict())
    network.eval()
    student, plan = sbf_dist.compress(network, images, Compression(**settings))
    assert plan.macs_after == plan.macs_before
    assert torch.equal(student(images), network(images))
