"""Arguments of sbf_conv2d, drawn at random, and its reference."""

from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch

from sbf_dist.ops import pack_filters, sbf_conv2d, sbf_conv2d_reference

LAYOUTS = [torch.contiguous_format, torch.channels_last]


# Largest error allowed, relative to the largest value.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 3e-3,
    torch.bfloat16: 2e-2,
}


@dataclass
class Drawn:
    """What a problem is beside its channels and its map."""

    batch: int = 2
    kernel: tuple[int, int] = (1, 1)
    per_channel: int = 1
    size: int = 3
    dtype: torch.dtype = torch.float32
    layout: torch.memory_format = torch.contiguous_format
    seed: int = 0
    with_bias: bool = True
    with_residual: bool = False


def problem(channels, basis, rebuilt, height, width, *, groups=1, **other):
    """Draw positional arguments and settings of sbf_conv2d; the basis features have variance 1.

    `other` are the fields of Drawn, and settings.
    """
    names = {field.name for field in fields(Drawn)}
    drawn = Drawn(**{key: value for key, value in other.items() if key in names})
    settings = {key: value for key, value in other.items() if key not in names}
    dtype, layout, kernel = drawn.dtype, drawn.layout, drawn.kernel
    generator = torch.Generator().manual_seed(drawn.seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    depth = channels // groups * kernel[0] * kernel[1]
    x = draw(drawn.batch, channels, height, width)
    weight = draw(basis, channels // groups, *kernel) / depth**0.5
    transforms = draw(rebuilt, drawn.per_channel, drawn.size, drawn.size)
    sources = torch.randint(0, basis, (rebuilt, drawn.per_channel), generator=generator)
    order = torch.randperm(basis + rebuilt, generator=generator)
    bias = draw(basis + rebuilt).to(dtype) if drawn.with_bias else None
    x = x.to(dtype).contiguous(memory_format=layout)
    settings["groups"] = groups
    args = [x, weight.to(dtype), transforms.to(dtype), sources, order, bias, None]
    if drawn.with_residual:
        shape = sbf_conv2d_reference(*args, **settings).shape
        args[6] = draw(*shape).to(dtype).contiguous(memory_format=layout)
    return args, settings


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_double(args):
    return [t.double() if t is not None and t.is_floating_point() else t for t in args]


def assert_close(got, exact, dtype):
    assert got.shape == exact.shape and got.dtype == dtype
    assert torch.isfinite(got).all()
    scale = max(1.0, exact.abs().max().item()) if exact.numel() else 1.0
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=TOLERANCES[dtype] * scale)


def assert_like_reference(args, settings):
    """Compare with the reference in double; where filters are packed, packed as well."""
    x, weight, *_ = args
    exact = sbf_conv2d_reference(*in_double(args), **settings)
    y = sbf_conv2d(*args, **settings)
    assert_close(y, exact, x.dtype)
    ambiguous = x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    if x.numel() and not ambiguous:
        assert y.is_contiguous(memory_format=torch._prims_common.suggest_memory_format(x))
    if x.dtype == torch.float32 and settings["groups"] == 1:
        packed = sbf_conv2d(*args, **settings, packed=pack_filters(weight))
        # Large filters take another path if they are not packed.
        if weight.numel() * 4 <= 640 * 1024:
            assert torch.equal(packed, y)
        assert_close(packed, exact, x.dtype)
