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
