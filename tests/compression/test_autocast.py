"""Networks that run under autocast, their own or the caller's."""

import pytest
import torch
from small_networks import pictures, small
from torch import nn

from sbf_dist.compression.one_shot import compress
from sbf_dist.compression.progressive import shrink
from sbf_dist.compression.reconstruct import rebuild
from sbf_dist.layers import SBFConv2d
from sbf_dist.settings import Compression

IMAGES = pictures(64)


class Own(nn.Module):
    """Its forward pass runs in bfloat16, and gives float32 if it is asked to."""

    def __init__(self, *, whole: bool) -> None:
        super().__init__()
        self.net = small()
        self.whole = whole

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.net(x)
        return y.float() if self.whole else y


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("settings", [{}, {"transform_size": 3}, {"removal": 0.5}], ids=str)
def test_a_network_with_an_autocast_of_its_own_is_fitted_nearly_as_without(whole, settings):
    model = Own(whole=whole).eval()
    wanted = Compression(macs=0.6, **settings)
    student, plan = compress(model, IMAGES, wanted, name="own")
    assert any(isinstance(module, SBFConv2d) for module in student.modules())
    assert {x.dtype for x in student.parameters()} == {torch.float32}
    _, plain = compress(model.net, IMAGES, wanted, name="small")
    assert plan.fidelity.kl == pytest.approx(plain.fidelity.kl, rel=0.3, abs=0.005)


def test_the_callers_autocast_changes_nothing():
    model = small()

    def students():
        dense, plan = rebuild(model, IMAGES, Compression(macs=0.8), name="small")
        yield compress(model, IMAGES, Compression(macs=0.7, removal=0.5), name="small")[0]
        yield shrink(dense, plan, IMAGES, Compression(macs=0.6))[0]

    without = list(students())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = list(students())
        assert torch.is_autocast_enabled("cpu")
    for one, other in zip(without, found, strict=True):
        assert torch.equal(one(IMAGES), other(IMAGES))


def test_the_callers_autocast_keeps_no_weights_that_are_changed():
    model = Own(whole=True).eval()
    student, _ = compress(model, IMAGES, macs=0.6, name="own")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, _ = compress(model, IMAGES, macs=0.6, name="own")
    assert torch.equal(student(IMAGES), again(IMAGES))
