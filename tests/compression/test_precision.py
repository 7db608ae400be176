"""Networks in other floating-point types than float32."""

import pytest
import torch
from small_networks import pictures, small
from torch import nn

from sbf_dist.compression.joint import plan_jointly
from sbf_dist.compression.one_shot import compress
from sbf_dist.compression.progressive import shrink
from sbf_dist.errors import UserError
from sbf_dist.layers import SBFConv2d
from sbf_dist.settings import Compression

NAME = "small"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("images_too", [False, True])
def test_a_student_has_its_network_s_type_and_is_fitted_as_in_float32(dtype, images_too):
    images = pictures(64).to(dtype if images_too else torch.float32)
    student, plan = compress(small().to(dtype), images, macs=0.6, name=NAME)
    assert {x.dtype for x in student.parameters()} == {dtype}
    assert any(isinstance(module, SBFConv2d) for module in student.modules())
    wanted, as_float = compress(small().to(dtype).float(), images.float(), macs=0.6, name=NAME)
    assert plan.macs_after == as_float.macs_after
    given = student(images.to(dtype)).float()
    tolerance = 0.1 if dtype is not torch.float64 else 1e-3
    torch.testing.assert_close(given, wanted(images.float()), rtol=tolerance, atol=tolerance)


def test_half_precision_goes_through_removal_and_later_rounds():
    network = small().bfloat16()
    student, plan = plan_jointly(
        network, pictures(64), Compression(macs=0.7, removal=0.5), name=NAME
    )
    assert {x.dtype for x in student.parameters()} == {torch.bfloat16}
    smaller, _ = shrink(student, plan, pictures(64), Compression(macs=0.6))
    assert {x.dtype for x in smaller.parameters()} == {torch.bfloat16}
    assert smaller(pictures(4).bfloat16()).isfinite().all()


class Mixed(nn.Module):
    """The first convolution and the head are in float32, the rest in bfloat16."""

    def __init__(self):
        super().__init__()
        self.net = small().bfloat16()
        self.net.stem.float()
        self.net.head.float()
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x):
        net, kind = self.net, self.net.norm1.weight.dtype
        x = net.stem(x * self.scale).relu().to(kind)
        x = net.norm1(net.conv1(x)).relu()
        x = net.norm2(net.conv2(x)).relu()
        return net.head(x.mean((2, 3)).to(net.head.weight.dtype))


@pytest.mark.parametrize("removal", [0.0, 0.5])
def test_each_tensor_of_a_student_has_its_networks_type(removal):
    model, images = Mixed().eval(), pictures(64)
    student, plan = compress(model, images, Compression(macs=0.7, removal=removal), name=NAME)
    smaller, _ = shrink(student, plan, images, Compression(macs=0.6))
    types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    for made in (student, smaller):
        assert any(isinstance(module, SBFConv2d) for module in made.modules())
        for name, tensor in made.state_dict().items():
            is_half = name.startswith(("net.conv", "net.norm")) and tensor.is_floating_point()
            assert tensor.dtype == types.get(name, torch.bfloat16 if is_half else None), name
        assert made(images).dtype == torch.float32


def test_half_precision_cannot_be_fitted_to_a_time_which_would_be_another_s():
    with pytest.raises(UserError, match=r"latency = 0.5: the network is in torch.float16"):
        compress(small().half(), pictures(8), latency=0.5, name=NAME)


def test_extra_state_that_is_no_tensor_is_no_matter():
    class Versioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small()

        def forward(self, x):
            return self.net(x)

        def get_extra_state(self):
            return {"version": 3}

        def set_extra_state(self, state):
            assert state == {"version": 3}

    student, _ = compress(Versioned().eval(), pictures(64), macs=0.6, name=NAME)
    assert student.state_dict()["_extra_state"] == {"version": 3}
