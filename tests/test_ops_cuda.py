"""The CUDA kernels against float64 on the CPU: every layout, dtype, epilogue and path."""

import pytest
import torch
from conv2d_problems import LAYOUTS, TOLERANCES

from sbf_dist.ops import (
    ACTIVATIONS,
    expand,
    expand_reference,
    sbf_conv2d,
    sbf_conv2d_reference,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def layer(channels, basis, per_channel, size, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rebuilt = channels - basis
    transforms = torch.randn(rebuilt, per_channel, size, size, generator=generator)
    sources = torch.randint(0, basis, (rebuilt, per_channel), generator=generator)
    order = torch.randperm(channels, generator=generator)
    bias = torch.randn(channels, generator=generator)
    scale = (per_channel * size * size) ** -0.5
    return (
        (scale * transforms).to("cuda", dtype),
        sources.cuda(),
        order.cuda(),
        bias.to("cuda", dtype),
    )


def features(shape, dtype, layout, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to("cuda", dtype)
    return x.contiguous(memory_format=layout)


def exact(tensor):
    return None if tensor is None else tensor.detach().cpu().double()


def poison(*like):
    for tensor in like:
        # Freed at once: the allocator hands it out again for a tensor of this size.
        torch.full_like(tensor, float("nan"))


def assert_close(got, wanted):
    assert torch.isfinite(got).all()
    scale = max(1.0, wanted.abs().max().item())
    atol = TOLERANCES[got.dtype] * scale
    torch.testing.assert_close(got.detach().cpu().double(), wanted, rtol=0, atol=atol)


def assert_expand_and_gradients(z, transforms, sources, order, bias):
    mine = [t.clone().requires_grad_() for t in (z, transforms, bias)]
    true = [exact(t).requires_grad_() for t in (z, transforms, bias)]
    y_true = expand_reference(true[0], true[1], sources.cpu(), order.cpu(), true[2])
    grad = torch.randn(y_true.shape, generator=torch.Generator().manual_seed(5)).to(z)
    poison(grad)
    y = expand(mine[0], mine[1], sources, order, mine[2])
    assert_close(y, y_true.detach())
    poison(z, transforms)
    y.backward(grad)
    y_true.backward(exact(grad))
    for got, wanted in zip(mine, true, strict=True):
        assert_close(got.grad, wanted.grad)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_conv2d_with_every_epilogue(layout, dtype, with_bias, with_residual, activation):
    transforms, sources, order, bias = layer(56, 24, 2, 3, dtype)
    weight = features((24, 8, 3, 3), dtype, layout) / 9
    x = features((2, 16, 15, 13), dtype, layout, seed=1)
    residual = features((2, 56, 8, 7), dtype, layout, seed=2) if with_residual else None
    shape = {"stride": (2, 2), "padding": (1, 1), "groups": 2, "activation": activation}
    given = (bias if with_bias else None, residual)
    poison(features((2, 56, 8, 7), dtype, layout))
    y = sbf_conv2d(x, weight, transforms, sources, order, *given, **shape)
    # The basis features are rounded to the dtype, once, in the reference as well.
    z = torch.nn.functional.conv2d(exact(x), exact(weight), None, (2, 2), (1, 1), (1, 1), 2)
    identity = torch.eye(24, dtype=torch.float64).view(24, 24, 1, 1)
    wanted = sbf_conv2d_reference(
        z.to(dtype).double(),
        identity,
        exact(transforms),
        sources.cpu(),
        order.cpu(),
        *map(exact, given),
        activation=activation,
    )
    assert_close(y, wanted)
    assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("side", [7, 14, 28, 56])
@pytest.mark.parametrize("per_channel", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes_of_resnet50(layout, dtype, per_channel, side):
    channels = 64 * 56 // side * 4
    wiring = layer(channels, channels // 2, per_channel, 3, dtype)
    z = features((3, channels // 2, side, side), dtype, layout)
    assert_expand_and_gradients(z, *wiring)


@pytest.mark.parametrize("basis", [2048, 4001])
@pytest.mark.parametrize("size", [3, 7])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_channels_than_shared_memory_holds(layout, size, basis):
    wiring = layer(basis + 24, basis, 2, size, torch.float32)
    assert_expand_and_gradients(features((2, basis, 5, 6), torch.float32, layout), *wiring)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "offset"),
    [*((torch.float16, offset) for offset in (1, 2, 4)), (torch.float32, 1), (torch.float32, 2)],
)
def test_addresses_that_are_no_multiple_of_16_bytes(dtype, offset, layout):
    wiring = layer(64, 32, 1, 3, dtype)
    z = features((2, 32, 16, 16), dtype, layout)
    memory = torch.empty(z.numel() + offset, dtype=dtype, device="cuda")
    shifted = memory[offset:].as_strided(z.shape, z.stride(), storage_offset=offset)
    shifted.copy_(z)
    assert shifted.data_ptr() % 16 != 0 and shifted.is_contiguous(memory_format=layout)
    assert torch.equal(expand(shifted, *wiring), expand(z, *wiring))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_source_for_all(layout):
    transforms, sources, order, bias = layer(300, 20, 3, 3, torch.float32)
    wiring = (transforms, torch.full_like(sources, 7), order, bias)
    assert_expand_and_gradients(features((2, 20, 9, 10), torch.float32, layout), *wiring)


def test_an_empty_batch_gives_an_empty_output():
    wiring = layer(12, 5, 1, 3, torch.float32)
    z = features((0, 5, 4, 4), torch.float32, torch.channels_last)
    assert expand(z, *wiring).shape == (0, 12, 4, 4)


def test_kept_channels_are_copied_exactly():
    transforms, sources, order, _ = layer(24, 16, 1, 3, torch.float16)
    z = features((2, 16, 6, 7), torch.float16, torch.channels_last)
    z[0, 1, 2, 3], z[1, 2, 0, 0] = float("inf"), float("nan")
    kept = torch.argsort(order)[:16]
    y = expand(z, transforms, sources, order)[:, kept]
    assert torch.equal(y.nan_to_num(nan=9.0), z.nan_to_num(nan=9.0))


def test_conv2d_is_captured_in_a_graph_and_follows_its_arguments():
    transforms, sources, order, bias = layer(48, 24, 1, 3, torch.float16)
    weight = features((24, 16, 3, 3), torch.float16, torch.channels_last) / 12
    x = features((4, 16, 14, 14), torch.float16, torch.channels_last, seed=1)
    residual = features((4, 48, 14, 14), torch.float16, torch.channels_last, seed=2)

    def call():
        return sbf_conv2d(
            x,
            weight,
            transforms,
            sources,
            order,
            bias,
            residual,
            padding=(1, 1),
            activation="relu",
        )

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    x.mul_(-2)
    residual.add_(1)
    graph.replay()
    torch.testing.assert_close(captured, call())


def test_work_goes_to_the_current_stream():
    wiring = layer(48, 24, 1, 3, torch.float32)
    z = features((4, 24, 28, 28), torch.float32, torch.channels_last)
    wanted = expand(z, *wiring)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        # Long enough that another stream would read z before it is there.
        torch.cuda._sleep(20_000_000)
        late = z.clone()
        y = expand(late, *wiring)
    side.synchronize()
    assert torch.equal(y, wanted)


def test_gradients_are_the_same_every_time():
    transforms, sources, order, _ = layer(256, 64, 4, 3, torch.float16)
    z = features((8, 64, 28, 28), torch.float16, torch.channels_last)
    grad = features((8, 256, 28, 28), torch.float16, torch.channels_last, seed=1)
    for call in (
        lambda: torch.ops.sbf.expand_grad_transforms(grad, z, sources, order, 3),
        lambda: torch.ops.sbf.expand_grad_input(grad, transforms, sources, order),
    ):
        first = call()
        assert all(torch.equal(first, call()) for _ in range(4))
