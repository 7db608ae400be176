"""Compression of networks on a CUDA device."""

from collections.abc import Iterator

import pytest
import torch
from small_networks import pictures, small
from torch import nn

import sbf_dist
from sbf_dist.compression.one_shot import compress
from sbf_dist.layers import SBFConv2d
from sbf_dist.settings import Compression

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _without_tf32() -> Iterator[None]:
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


def differences(dense: nn.Module, student: nn.Module, images: torch.Tensor) -> float:
    with torch.inference_mode():
        wanted, given = dense(images), student(images)
    return ((wanted - given).square().mean() / wanted.var()).item()


@pytest.mark.parametrize("removal", [0.0, 0.5])
def test_a_network_on_the_gpu_is_compressed_there_as_well_as_on_the_cpu(removal):
    network, settings = small(), Compression(macs=0.6, removal=removal)
    images, unseen = pictures(192).split([128, 64])
    on_cpu, plan = compress(network, images, settings, name="small")
    error = differences(network, on_cpu, unseen)
    network = network.cuda()
    student, plan_there = compress(network, images.cuda(), settings, name="small")
    assert {x.device.type for x in (*student.parameters(), *student.buffers())} == {"cuda"}
    assert any(isinstance(module, SBFConv2d) for module in student.modules())
    assert plan_there.macs_after <= 0.6 * plan_there.macs_before * 1.0001
    assert abs(plan_there.macs_after - plan.macs_after) <= 0.01 * plan.macs_before
    assert differences(network, student, unseen.cuda()) <= 1.2 * error + 1e-3
    optimized = sbf_dist.optimize(student)
    with torch.inference_mode():
        torch.testing.assert_close(
            optimized(unseen.cuda()), student(unseen.cuda()), rtol=1e-3, atol=1e-4
        )


def test_a_student_made_on_the_gpu_is_loaded_on_the_cpu(tmp_path):
    network, images = small().cuda(), pictures(64).cuda()
    student, _ = compress(network, images, macs=0.6, name="small")
    sbf_dist.save(student, tmp_path / "student")
    loaded = sbf_dist.load(tmp_path / "student", build=small)
    with torch.inference_mode():
        given, wanted = loaded(pictures(8)), student(pictures(8).cuda()).cpu()
    torch.testing.assert_close(given, wanted, rtol=1e-3, atol=1e-4)
