"""The CPU kernels in instruction sets below this CPU's best, which other tests use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sbf_dist import _C

ROOT = Path(__file__).parents[1]
# Prints the lanes of a vector, and for each operator its largest error in units of the tolerance.
SCRIPT = """
import itertools

import torch

from sbf_dist import _C
from sbf_dist.ops import (
    ACTIVATIONS, expand, expand_reference, pack_filters, sbf_conv2d, sbf_conv2d_reference
)

print("lanes", _C.build_info()["cpu_lanes"])
torch.manual_seed(0)
worst = {}


def compare(name, got, exact, tolerance):
    assert got.shape == exact.shape, name
    scale = max(1.0, exact.abs().max().item())
    error = (got.double() - exact).abs().max().item() / scale / tolerance
    # A NaN must not be less than the largest error so far.
    worst[name] = max(worst.get(name, 0), error if error == error else float("inf"))


for dtype, layout, size, kernel in itertools.product(
    [torch.float32, torch.float16, torch.bfloat16],
    [torch.contiguous_format, torch.channels_last],
    [1, 3, 5],
    [1, 3],
):
    tolerance = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    x = torch.randn(2, 13, 11, 9).to(dtype).contiguous(memory_format=layout)
    weight = (torch.randn(21, 13, kernel, kernel) / (13 * kernel**2) ** 0.5).to(dtype)
    transforms, bias = torch.randn(26, 2, size, size).to(dtype), torch.randn(47).to(dtype)
    sources, order = torch.randint(0, 21, (26, 2)), torch.randperm(47)
    residual = torch.randn(2, 47, 11, 9).to(dtype).contiguous(memory_format=layout)
    for activation in ACTIVATIONS:
        args = (x, weight, transforms, sources, order, bias, residual)
        double = [t.double() if t.is_floating_point() else t for t in args]
        settings = {"padding": (kernel // 2, kernel // 2), "activation": activation}
        exact = sbf_conv2d_reference(*double, **settings)
        compare("conv2d", sbf_conv2d(*args, **settings), exact, tolerance)
        if dtype == torch.float32:
            packed = pack_filters(weight)
            compare("packed", sbf_conv2d(*args, **settings, packed=packed), exact, tolerance)
    z = torch.randn(2, 21, 11, 9).to(dtype).contiguous(memory_format=layout)
    leaves = [t.clone().requires_grad_() for t in (z, transforms, bias)]
    exact = [t.double().requires_grad_() for t in (z, transforms, bias)]
    y = expand(*leaves[:2], sources, order, leaves[2])
    wanted = expand_reference(*exact[:2], sources, order, exact[2])
    compare("expand", y, wanted, tolerance)
    y.backward(residual)
    wanted.backward(residual.double())
    for name, mine, its in zip(("grad_z", "grad_transforms", "grad_bias"), leaves, exact):
        compare(name, mine.grad, its.grad, tolerance)
for name, error in worst.items():
    print(name, error)
"""


@pytest.mark.parametrize(("capability", "lanes"), [("default", 4), ("avx2", 8), ("avx512", 16)])
def test_operators_in_a_lower_instruction_set_equal_the_reference(capability, lanes):
    if lanes > _C.build_info()["cpu_lanes"]:
        pytest.skip(f"PyTorch uses {torch.backends.cpu.get_cpu_capability()} here, no {capability}")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    results = dict(line.split() for line in done.stdout.splitlines())
    assert int(results.pop("lanes")) == lanes
    assert set(results) == {
        "conv2d",
        "packed",
        "expand",
        "grad_z",
        "grad_transforms",
        "grad_bias",
    }
    assert all(float(error) < 1 for error in results.values()), results
