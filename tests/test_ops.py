import os
import subprocess
import sys

import pytest
import torch
from conv2d_problems import LAYOUTS, TOLERANCES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from sbf_dist import _C
from sbf_dist.extension import check_build
from sbf_dist.ops import expand, expand_reference

GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    ],
)
DEVICES = ["cpu", GPU]
SHAPES = [(2, 6, 5, 4, 7), (1, 1, 1, 1, 1), (0, 3, 2, 4, 4), (2, 4, 0, 3, 3)]


def arguments(
    batch,
    basis,
    rebuilt,
    height,
    width,
    *,
    per_channel=1,
    size=3,
    seed=0,
    **form,
):
    """Draw arguments of expand; `form` has dtype, layout and device."""
    dtype, device = form.get("dtype", torch.float32), form.get("device", "cpu")
    layout = form.get("layout", torch.contiguous_format)
    assert form.keys() <= {"dtype", "device", "layout"}
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, basis, height, width, generator=generator)
    transforms = torch.randn(rebuilt, per_channel, size, size, generator=generator)
    sources = torch.randint(0, basis, (rebuilt, per_channel), generator=generator)
    order = torch.randperm(basis + rebuilt, generator=generator)
    bias = torch.randn(basis + rebuilt, generator=generator)
    z = z.to(device, dtype).contiguous(memory_format=layout)
    return (
        z,
        transforms.to(device, dtype),
        sources.to(device),
        order.to(device),
        bias.to(device, dtype),
    )


def assert_close(got, exact, dtype):
    got, exact = got.detach().cpu().double(), exact.detach().cpu().double()
    assert got.shape == exact.shape
    assert torch.isfinite(got).all()
    scale = max(1.0, exact.abs().max().item()) if exact.numel() else 1.0
    torch.testing.assert_close(got, exact, rtol=0, atol=TOLERANCES[dtype] * scale)


def layout_of(tensor):
    last = tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def assert_like_reference(z, transforms, sources, order, bias):
    """Compare output and all gradients with the reference in double on the CPU."""
    mine = [t.detach().clone().requires_grad_() for t in (z, transforms, bias)]
    exact = [t.detach().cpu().double().requires_grad_() for t in (z, transforms, bias)]
    y = expand(mine[0], mine[1], sources, order, mine[2])
    y_exact = expand_reference(exact[0], exact[1], sources.cpu(), order.cpu(), exact[2])
    assert y.dtype == z.dtype and y.device == z.device
    assert_close(y, y_exact, z.dtype)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y)
    grad = grad.contiguous(memory_format=layout_of(y))
    y.backward(grad)
    y_exact.backward(grad.cpu().double())
    for got, wanted in zip(mine, exact, strict=True):
        # With nothing to rebuild, the reference does not touch the transforms.
        unused = wanted.numel() == 0 and wanted.grad is None
        assert_close(got.grad, wanted if unused else wanted.grad, z.dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1, 3, 5, 7])
@pytest.mark.parametrize("per_channel", [1, 3])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_and_gradients_equal_the_reference(layout, dtype, per_channel, size, device):
    case = arguments(
        2, 19, 33, 9, 13, per_channel=per_channel, size=size, dtype=dtype, layout=layout
    )
    assert_like_reference(*(t.to(device) for t in case))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_of_several_row_blocks_equal_the_reference(layout):
    # Tall and with many channels: the CPU cuts each image into blocks, whose borders must meet.
    assert_like_reference(*arguments(2, 96, 160, 37, 41, per_channel=2, layout=layout))


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(0, 3),
    basis=st.integers(1, 20),
    rebuilt=st.integers(0, 20),
    height=st.integers(1, 10),
    width=st.integers(1, 10),
    per_channel=st.integers(1, 3),
    size=st.sampled_from([1, 3, 5]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 1000),
)
def test_any_shape_equals_the_reference(batch, basis, rebuilt, height, width, **rest):
    assert_like_reference(*arguments(batch, basis, rebuilt, height, width, **rest))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_the_output_and_of_the_gradient_is_that_of_z(layout, device):
    z, transforms, sources, order, bias = arguments(2, 8, 8, 6, 6, layout=layout, device=device)
    z.requires_grad_()
    y = expand(z, transforms, sources, order, bias)
    assert y.is_contiguous(memory_format=layout)
    y.square().sum().backward()
    assert z.grad.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_kept_channels_are_copied_exactly(dtype):
    z, transforms, sources, order, _ = arguments(2, 5, 3, 6, 7, dtype=dtype)
    # Infinities and NaN survive a copy, not a multiplication with a filter's zeros.
    z[0, 1, 2, 3], z[1, 2, 0, 0] = float("inf"), float("nan")
    y = expand(z, transforms, sources, order)
    kept = torch.argsort(order)[: z.shape[1]]
    assert torch.equal(y[:, kept].nan_to_num(nan=9.0), z.nan_to_num(nan=9.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_sums_are_accumulated_in_float_and_rounded_once(dtype):
    z, transforms, sources, order, bias = arguments(1, 4, 6, 8, 8, per_channel=4, dtype=dtype)
    exact = expand_reference(z.float(), transforms.float(), sources, order, bias.float())
    error = (expand(z, transforms, sources, order, bias).float() - exact).abs()
    half_ulp = torch.finfo(dtype).eps / 2
    assert (error <= half_ulp * exact.abs() + 1e-5).all()


def test_non_contiguous_arguments_are_understood():
    z, transforms, sources, order, bias = arguments(2, 12, 10, 6, 14, size=3)
    wide = torch.zeros(2, 12, 6, 28)
    wide[..., ::2] = z
    strided = (
        wide[..., ::2],
        transforms.transpose(2, 3).contiguous().transpose(2, 3),
        sources.repeat(1, 2)[:, :1],
        order.repeat_interleave(2)[::2],
        bias.repeat_interleave(2)[::2],
    )
    assert not any(t.is_contiguous() for t in strided[:1] + strided[3:])
    assert torch.equal(expand(*strided), expand(z, transforms, sources, order, bias))


def test_gradient_in_the_other_layout_is_understood():
    z, transforms, sources, order, bias = arguments(2, 6, 5, 7, 8)
    grad = torch.randn(2, 11, 7, 8)
    grads = []
    for layout in LAYOUTS:
        leaves = [z.clone().requires_grad_(), transforms.clone().requires_grad_()]
        expand(*leaves, sources, order, bias).backward(grad.contiguous(memory_format=layout))
        grads.append([leaf.grad for leaf in leaves])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_without_bias_nothing_is_added():
    z, transforms, sources, order, bias = arguments(2, 6, 5, 7, 8)
    z.requires_grad_()
    y = expand(z, transforms, sources, order)
    torch.testing.assert_close(y, expand(z, transforms, sources, order, torch.zeros_like(bias)))
    y.sum().backward()
    assert z.grad is not None


def test_frozen_transforms_keep_no_features_for_the_backward_pass():
    z, transforms, sources, order, _ = arguments(2, 6, 5, 7, 8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        expand(z.requires_grad_(), transforms, sources, order)
    assert z.shape not in [t.shape for t in saved]


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_equal_finite_differences_to_second_order(layout, device, size):
    z, transforms, sources, order, bias = arguments(
        2, 3, 4, 5, 3, per_channel=2, size=size, dtype=torch.float64, layout=layout, device=device
    )
    for leaf in (z, transforms, bias):
        leaf.requires_grad_()
    inputs = (z, transforms, sources, order, bias)
    assert torch.autograd.gradcheck(expand, inputs)
    assert torch.autograd.gradgradcheck(expand, inputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_operators_keep_their_contract_with_pytorch(shape, layout, device):
    z, transforms, sources, order, bias = arguments(
        *shape, per_channel=2, layout=layout, device=device
    )
    grad = torch.randn_like(expand(z, transforms, sources, order))
    for leaf in (z, transforms, bias, grad):
        leaf.requires_grad_()
    torch.library.opcheck(torch.ops.sbf.expand, (z, transforms, sources, order, bias))
    torch.library.opcheck(torch.ops.sbf.expand, (z, transforms, sources, order, None))
    torch.library.opcheck(torch.ops.sbf.expand_grad_input, (grad, transforms, sources, order))
    torch.library.opcheck(torch.ops.sbf.expand_grad_transforms, (grad, z, sources, order, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_results_do_not_depend_on_the_number_of_threads(dtype):
    # One image with few rows: the work is cut differently for one thread and for seven.
    z, transforms, sources, order, bias = arguments(
        1, 40, 50, 15, 17, per_channel=2, dtype=dtype, layout=torch.channels_last
    )
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in (z, transforms)]
            y = expand(*leaves, sources, order, bias)
            (y * y.detach()).sum().backward()
            results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_flops_are_two_per_multiply_add():
    z, transforms, sources, order, _ = arguments(2, 4, 6, 5, 7, per_channel=3, size=5)
    z.requires_grad_(), transforms.requires_grad_()
    forward = 2 * 2 * 5 * 7 * 6 * 3 * 25
    with FlopCounterMode(display=False) as counter:
        y = expand(z, transforms, sources, order)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * forward


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z, t, s, o, b: (z[0], t, s, o, b), r"z must have 4 dimensions"),
        (lambda z, t, s, o, b: (z.long(), t.long(), s, o, None), r"z must be floating point"),
        (lambda z, t, s, o, b: (z, t[..., :2], s, o, b), r"transforms must have shape"),
        (lambda z, t, s, o, b: (z, t[..., :2, :2], s, o, b), r"m odd, got m = 2"),
        (lambda z, t, s, o, b: (z, t[:3], s, o, b), r"transforms must begin with .* \[4, 2\]"),
        (lambda z, t, s, o, b: (z, t, s.int(), o, b), r"sources must be int64, got dtype Int"),
        (lambda z, t, s, o, b: (z, t, s + 2, o, b), r"sources must lie in \[0, 3\).*, got \d"),
        (lambda z, t, s, o, b: (z, t, s - 3, o, b), r"sources must lie in \[0, 3\).*, got -\d"),
        (lambda z, t, s, o, b: (z, t, s, o[:-1], b), r"order must have length B \+ P = 7 .*got 6"),
        (lambda z, t, s, o, b: (z, t, s, o + 1, b), r"order must be a permutation of 0..6, got"),
        (lambda z, t, s, o, b: (z, t, s, o * 0, b), r"permutation of 0..6, got 0 twice"),
        (lambda z, t, s, o, b: (z, t, s, o, b[:-1]), r"bias must have shape \(7,\), got \[6\]"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    z, transforms, _, order, bias = arguments(2, 3, 4, 5, 5, per_channel=2)
    sources = torch.tensor([[0, 1], [1, 2], [2, 2], [0, 2]])
    args = change(z, transforms, sources, order, bias)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sbf.expand(*args)


def test_other_dtypes_are_named_by_the_operator_and_cast_by_expand():
    z, transforms, sources, order, bias = arguments(2, 3, 4, 5, 5)
    with pytest.raises(RuntimeError, match="transforms must have the dtype of z, BFloat16"):
        torch.ops.sbf.expand(z.bfloat16(), transforms, sources, order, None)
    y = expand(z.bfloat16(), transforms, sources, order, bias)
    assert y.dtype == torch.bfloat16


@pytest.mark.skipif(_C.build_info()["cuda"], reason="the extension is built with CUDA")
@pytest.mark.parametrize("name", ["expand", "expand_grad_input"])
def test_cuda_tensors_without_a_cuda_build_are_refused_with_the_remedy(name):
    z, transforms, sources, order, _ = arguments(1, 2, 2, 3, 3)
    args = {
        "expand": (z, transforms, sources, order, None),
        "expand_grad_input": (z, transforms, sources, order),
    }[name]
    # What the dispatcher would call for CUDA tensors; there need be no device to call it.
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(NotImplementedError, match=r"built without CUDA.*SBF_DIST_CUDA=1 pip"):
        getattr(torch.ops.sbf, name).default.redispatch(keys, *args)


def test_build_information_says_what_was_built():
    info = _C.build_info()
    assert set(info) == {"cuda", "cuda_archs", "compiler", "torch", "cpu_lanes"}
    assert bool(info["cuda_archs"]) == info["cuda"]


def test_build_against_another_minor_version_of_pytorch_is_refused():
    check_build("2.14.1", "2.14.0+cu130")
    for other in ("2.13.1", "3.14.1", "2.1.4"):
        with pytest.raises(ImportError, match=r"built against PyTorch 2\.14\.1.*rebuild it"):
            check_build("2.14.1", other)


def test_missing_extension_is_reported_with_the_remedy():
    script = (
        "import sys; sys.modules['sbf_dist._C'] = None\n"
        "try:\n    import sbf_dist.ops\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert "build it with pip install --no-build-isolation" in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestCuda:
    @pytest.mark.parametrize("dtype", TOLERANCES)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("size", [1, 3, 5])
    def test_every_output_is_written(self, size, layout, dtype):
        case = arguments(
            3, 37, 70, 15, 14, per_channel=2, size=size, dtype=dtype, layout=layout, device="cuda"
        )
        z, transforms, sources, order, bias = case
        exact = expand_reference(
            z.double().cpu(),
            transforms.double().cpu(),
            sources.cpu(),
            order.cpu(),
            bias.double().cpu(),
        )
        # What is left over in the allocator's memory must not look like a result.
        poison = torch.full((3, 107, 15, 14), float("nan"), device="cuda", dtype=dtype)
        del poison
        assert_close(expand(*case), exact, dtype)
        assert_like_reference(*case)

    def test_forward_and_backward_can_be_captured_in_a_graph(self):
        z, transforms, sources, order, bias = arguments(
            4, 16, 16, 14, 14, layout=torch.channels_last, device="cuda"
        )
        leaves = [t.requires_grad_() for t in (z, transforms, bias)]

        def step():
            y = expand(leaves[0], leaves[1], sources, order, leaves[2])
            return (y, *torch.autograd.grad(y, leaves, torch.ones_like(y)))

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            z.mul_(2)
            transforms.add_(1)
        graph.replay()
        for got, wanted in zip(captured, step(), strict=True):
            torch.testing.assert_close(got, wanted)

    def test_results_are_the_same_every_time(self):
        z, _, sources, order, _ = arguments(8, 64, 64, 28, 28, device="cuda")
        grad = torch.randn(8, 128, 28, 28, device="cuda")
        results = [
            torch.ops.sbf.expand_grad_transforms(grad, z, sources, order, 3) for _ in range(5)
        ]
        assert all(torch.equal(results[0], other) for other in results[1:])
