"""Random problems for the operators, and their errors against float64 on poisoned memory."""

from collections.abc import Iterable

import torch
from torch import Tensor

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 3e-3,
    torch.bfloat16: 2e-2,
}


def name_of(dtype: torch.dtype) -> str:
    """Give the name of a dtype without its module."""
    return str(dtype).removeprefix("torch.")


def random_wiring(
    channels: int, basis: int, per_channel: int, device: str, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Make `sources` and `order` of an SBF layer that keeps `basis` of its channels at random."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.zeros(channels, dtype=torch.bool)
    kept[torch.randperm(channels, generator=generator)[:basis]] = True
    # As SBFConv2d has it: kept and rebuilt channels each in ascending order.
    order = torch.where(kept, kept.cumsum(0) - 1, basis + (~kept).cumsum(0) - 1)
    sources = torch.randint(0, basis, (channels - basis, per_channel), generator=generator)
    return sources.to(device), order.to(device)


def random_features(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: str, seed: int = 0
) -> Tensor:
    """Make normally distributed features in a layout."""
    generator = torch.Generator(device).manual_seed(seed)
    features = torch.randn(shape, generator=generator, device=device).to(dtype)
    return features.contiguous(memory_format=LAYOUTS[layout])


def random_transforms(
    rebuilt: int, per_channel: int, size: int, dtype: torch.dtype, device: str
) -> Tensor:
    """Make transformations that keep the variance of what they are applied to."""
    generator = torch.Generator().manual_seed(1)
    scale = (per_channel * size * size) ** -0.5
    shape = (rebuilt, per_channel, size, size)
    return (scale * torch.randn(shape, generator=generator)).to(device, dtype)


# ---------------------------------------------------------------- correctness


def poison(*sizes: int, dtype: torch.dtype, device: str) -> None:
    """Fill what the allocator will hand out next with NaN."""
    blocks = [torch.full((size,), float("nan"), dtype=dtype, device=device) for size in sizes * 2]
    del blocks


def error_of(got: Tensor, exact: Tensor) -> float:
    """Give the largest error relative to the largest value; infinite where `got` is not finite."""
    if got.shape != exact.shape:
        raise AssertionError(f"the shape is {tuple(got.shape)}, not {tuple(exact.shape)}")
    if got.numel() == 0:
        return 0.0
    if not torch.isfinite(got).all():
        return float("inf")
    scale = exact.abs().max().clamp_min(1)
    return ((got.to(exact) - exact).abs().max() / scale).item()


def check_case(
    shape: tuple[int, int, int, int, int],
    per_channel: int,
    size: int,
    layout: str,
    dtype: torch.dtype,
    activation: str,
    device: str,
) -> dict[str, float]:
    """Run every operator on one problem and give its error against float64.

    shape: batch, basis, rebuilt, height, width.
    """
    from sbf_dist.ops import expand, expand_reference, sbf_conv2d, sbf_conv2d_reference

    batch, basis, rebuilt, height, width = shape
    channels = basis + rebuilt
    sources, order = random_wiring(channels, basis, per_channel, device)
    transforms = random_transforms(rebuilt, per_channel, size, dtype, device)
    bias = random_features((channels, 1, 1, 1), dtype, "contiguous", device).flatten()
    z = random_features((batch, basis, height, width), dtype, layout, device)
    grad = random_features((batch, channels, height, width), dtype, layout, device, seed=2)
    outputs = (grad.numel(), z.numel(), transforms.numel())

    mine = [t.clone().requires_grad_() for t in (z, transforms, bias)]
    exact = [t.detach().double().requires_grad_() for t in (z, transforms, bias)]
    poison(*outputs, dtype=dtype, device=device)
    y = expand(mine[0], mine[1], sources, order, mine[2])
    y_exact = expand_reference(exact[0], exact[1], sources, order, exact[2])
    errors = {"expand": error_of(y, y_exact)}
    y_exact.backward(grad.double())
    poison(*outputs, dtype=dtype, device=device)
    y.backward(grad)
    for name, got, wanted in zip(
        ("grad_z", "grad_transforms", "grad_bias"), mine, exact, strict=True
    ):
        assert got.grad is not None and wanted.grad is not None
        errors[name] = error_of(got.grad, wanted.grad)

    # A 1 x 1 convolution with one input for each output adds no rounding of its own.
    weight = torch.eye(basis, dtype=dtype, device=device).view(basis, basis, 1, 1)
    residual = random_features(grad.shape, dtype, layout, device, seed=3)
    poison(*outputs, dtype=dtype, device=device)
    y = sbf_conv2d(z, weight, transforms, sources, order, bias, residual, activation=activation)
    wanted = sbf_conv2d_reference(
        z.double(),
        weight.double(),
        transforms.double(),
        sources,
        order,
        bias.double(),
        residual.double(),
        activation=activation,
    )
    return errors | {"conv2d": error_of(y, wanted)}


def check_cases(quick: bool) -> Iterable[tuple]:
    """Give arguments for check_case: odd shapes, every layout, dtype and activation."""
    shapes = [
        (2, 19, 33, 9, 13),
        (3, 37, 70, 15, 14),
        (1, 1, 1, 1, 1),
        (2, 64, 64, 56, 56),
        (5, 24, 40, 7, 7),
        (2, 128, 384, 28, 28),
        (1, 2048, 16, 5, 4),
    ]
    activations = ("none", "relu", "relu6", "silu", "hardswish")
    count = 0
    for shape in shapes[: 4 if quick else None]:
        for per_channel, size in ((1, 3), (4, 3), (2, 5), (1, 1)):
            for layout in LAYOUTS:
                for dtype in TOLERANCES:
                    yield shape, per_channel, size, layout, dtype, activations[count % 5]
                    count += 1


def check_all(device: str, cases: Iterable[tuple]) -> dict:
    """Check all cases; give their number, the worst errors and what was wrong."""
    worst: dict[str, float] = {}
    failures, count = [], 0
    for case in cases:
        dtype = case[4]
        count += 1
        for name, error in check_case(*case, device=device).items():
            key = f"{name}/{name_of(dtype)}"
            worst[key] = max(worst.get(key, 0.0), error)
            # Not `error > tolerance`: a NaN must fail.
            if not error <= TOLERANCES[dtype]:
                failures.append(f"{name} {case}: error {error:.3g}")
    return {"cases": count, "worst": worst, "failures": failures}
