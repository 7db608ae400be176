"""Optimized networks, exported or traced, take batches of other sizes."""

import warnings

import pytest
import torch
from torch import nn

from sbf_dist.export.optimize import optimize
from sbf_dist.layers import SBFConv2d


class Residual(nn.Module):
    """A dense convolution, an SBF layer with `sources` features a channel, and a classifier."""

    def __init__(self, sources):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24)
        conv = nn.Conv2d(24, 24, 3, padding=1)
        size = 1 if sources == 12 else 3
        self.sbf = SBFConv2d.from_conv(conv, range(12), [list(range(sources))] * 12, size)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        return self.head(torch.relu(self.sbf(x) + x).mean((2, 3)))


def exported(network, x):
    batch = {0: torch.export.Dim.DYNAMIC}
    return torch.export.export(network, (x,), dynamic_shapes=(batch,)).module()


@pytest.mark.parametrize("record", [exported, torch.jit.trace])
@pytest.mark.parametrize("grad_enabled", [True, False])
@pytest.mark.parametrize("sources", [2, 12])  # 12 of 12: the matrix product, by two ways
def test_any_batch_gives_what_the_network_gives(sources, grad_enabled, record):
    network = optimize(Residual(sources).eval())
    with torch.set_grad_enabled(grad_enabled), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace is deprecated
        recorded = record(network, torch.randn(2, 3, 8, 8))
    with torch.no_grad():
        for batch in (1, 2, 300):
            x = torch.randn(batch, 3, 8, 8)
            torch.testing.assert_close(recorded(x), network(x), rtol=1e-4, atol=1e-5)
