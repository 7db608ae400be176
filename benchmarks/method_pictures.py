"""Draws the pictures of docs/method.md from a network that is really trained and compressed.

    python benchmarks/method_pictures.py docs/pictures

The network is that of `fitting.py errors`: a ResNet-14 that tells ten photographs by 32 px patches.
It is compressed to half of the multiply-adds, with at most three sources and 3 x 3 transformations.
"""

import argparse
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import matplotlib
import numpy as np
import torch
from fitting import patches, train
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.fitting.layerwise import gather_layers
from sbf_dist.compression.fitting.statistics import Moments
from sbf_dist.compression.fitting.transforms import fit_transforms, rank_channels
from sbf_dist.compression.one_shot import compress
from sbf_dist.compression.plan import Plan, SBFLayer
from sbf_dist.hooks import registered
from sbf_dist.layers import SBFConv2d
from sbf_dist.settings import Compression

NETWORK, MACS, SOURCES = "cifar_resnet14", 0.5, 3
PHOTOGRAPH, CROP = "astronaut.png", (130, 10, 322, 202)  # left, upper, right, lower
SIGNED, MAP = "PuOr_r", "viridis"


def photograph() -> tuple[np.ndarray, Tensor]:
    """Return a photograph as pixels (H, W, 3) and as the network takes it (1, 3, H, W)."""
    with Image.open(str(files("skimage.data") / PHOTOGRAPH)) as opened:
        pixels = np.asarray(opened.convert("RGB").crop(CROP))
    scaled = torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1)
    return pixels, scaled.permute(2, 0, 1)[None].contiguous()


def example(student: nn.Module) -> str:
    """Return the layer that is shown: the first with several sources and 3 x 3 kernels."""
    for name, module in student.named_modules():
        if (
            isinstance(module, SBFConv2d)
            and module.transform_size == 3
            and module.stride == (1, 1)
            and module.sources.shape[1] > 1
        ):
            return name
    raise SystemExit("no layer has several sources and 3 x 3 transformations")


@torch.inference_mode()
def seen(network: nn.Module, name: str, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return the input and the output (C, H, W) of a layer for an image."""
    found: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.extend((inputs[0][0], output[0]))

    with registered([network.get_submodule(name).register_forward_hook(keep)]):
        network(image)
    return found[0], found[1]


def lost(dense: nn.Module, student: nn.Module, name: str, image: Tensor) -> Tensor:
    """Return the share of each channel's variance that is lost, for an image."""
    (_, now), (_, before) = seen(student, name, image), seen(dense, name, image)
    return (before - now).square().mean((1, 2)) / before.var((1, 2))


def of_three(errors: Tensor) -> list[int]:
    """Return the places of the smallest, the median and the largest error."""
    order = errors.argsort().tolist()
    return [order[0], order[len(order) // 2], order[-1]]


def blank(axes: Axes, title: str = "") -> None:
    """Leave out ticks; a title in small letters."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)


def signed(axes: Axes, values: np.ndarray, most: float, title: str) -> None:
    """Draw numbers of both signs; white is zero."""
    axes.imshow(values, cmap=SIGNED, vmin=-most, vmax=most, interpolation="nearest")
    blank(axes, title)


def word(axes: Axes, text: str) -> None:
    """Write a sign between two pictures."""
    axes.axis("off")
    axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=15)


def draw_rebuilding(path: Path, dense: nn.Module, student: nn.Module, name: str) -> None:
    """Draw how three channels are rebuilt: sources, transformations, sum, dense channel."""
    pixels, image = photograph()
    layer = student.get_submodule(name)
    assert isinstance(layer, SBFConv2d)
    inputs, rebuilt_maps = seen(student, name, image)
    _, dense_maps = seen(dense, name, image)
    with torch.inference_mode():
        basis = layer.basis(inputs[None])[0]
    rebuilt = [c for c in range(layer.out_channels) if c not in layer.kept]
    errors = lost(dense, student, name, image)
    places = of_three(errors[rebuilt])
    count = layer.sources.shape[1]
    widths = [1.0, *[0.16, 1.0, 0.1, 0.42] * count, 0.16, 1.0, 0.25, 1.0]
    figure, rows = plt.subplots(3, len(widths), figsize=(11, 5.2), width_ratios=widths)
    for row, place in zip(rows, places, strict=True):
        channel = rebuilt[place]
        cells = iter(row)
        first = next(cells)
        if place == places[0]:
            first.imshow(pixels)
            blank(first, "image")
        else:
            first.axis("off")
        most = float(layer.transforms[place].detach().abs().max())
        for number, source in enumerate(layer.sources[place].tolist()):
            word(next(cells), "" if number == 0 else "+")
            axes = next(cells)
            axes.imshow(basis[source], cmap=MAP)
            blank(axes, f"kept channel {layer.kept[source]}")
            word(next(cells), "⋆")
            kernel = layer.transforms[place, number].detach().numpy()
            signed(next(cells), kernel, most, "3 x 3")
        low, high = float(dense_maps[channel].min()), float(dense_maps[channel].max())
        word(next(cells), "=")
        for maps, title in (
            (rebuilt_maps, f"channel {channel}, rebuilt"),
            (dense_maps, f"dense; {errors[channel]:.1%} lost"),
        ):
            axes = next(cells)
            axes.imshow(maps[channel], cmap=MAP, vmin=low, vmax=high)
            blank(axes, title)
            if maps is rebuilt_maps:
                word(next(cells), "≈")
    save(figure, path)


def draw_filters(path: Path, dense: nn.Module, student: nn.Module, name: str) -> None:
    """Draw the filters of the same three channels: Σ t ⋆ W beside the dense filter."""
    layer, conv = student.get_submodule(name), dense.get_submodule(name)
    assert isinstance(layer, SBFConv2d) and isinstance(conv, nn.Conv2d)
    _, image = photograph()
    errors = lost(dense, student, name, image)
    rebuilt = [c for c in range(layer.out_channels) if c not in layer.kept]
    whole = layer.effective_filter()
    old = F.pad(conv.weight.detach(), (1, 1, 1, 1))
    strongest = old[rebuilt].square().sum((0, 2, 3)).argsort(descending=True)[:6].sort().values
    count = layer.sources.shape[1]
    widths = [*[1.0, 0.12, 0.42, 0.14] * count, 1.0, 0.25, 1.0]
    figure, rows = plt.subplots(3, len(widths), figsize=(11, 4.2), width_ratios=widths)
    for row, place in zip(rows, of_three(errors[rebuilt]), strict=True):
        channel = rebuilt[place]
        cells = iter(row)
        most = float(old[channel].abs().max())
        weights = layer.basis.weight.detach()
        largest = float(layer.transforms[place].detach().abs().max())
        for number, source in enumerate(layer.sources[place].tolist()):
            title = f"filter {layer.kept[source]}"
            signed(next(cells), tiles(weights[source, strongest]), most, title)
            word(next(cells), "*")
            kernel = layer.transforms[place, number].detach().numpy()
            signed(next(cells), kernel, largest, "3 x 3")
            word(next(cells), "+" if number < count - 1 else "=")
        signed(next(cells), tiles(whole[channel, strongest]), most, f"filter {channel}, rebuilt")
        next(cells).axis("off")
        signed(next(cells), tiles(old[channel, strongest]), most, f"filter {channel}, dense")
    save(figure, path)


def tiles(weights: Tensor) -> np.ndarray:
    """Lay the kernels (6, k, k) of six input channels out as 2 x 3 tiles."""
    framed = F.pad(weights.detach(), (0, 1, 0, 1), value=float("nan"))
    sheet = framed.view(2, 3, *framed.shape[1:]).permute(0, 2, 1, 3)
    return sheet.reshape(2 * framed.shape[1], -1)[:-1, :-1].numpy()


def draw_losses(path: Path, moments: Moments, filter_size: int, name: str) -> None:
    """Draw what a layer loses over what it costs, for numbers of sources and sizes."""
    channels = len(moments.yy)
    figure, axes = plt.subplots(figsize=(6.4, 3.8))
    for sources, size, style in ((1, 1, ":"), (1, 3, "--"), (2, 3, "-."), (4, 3, "-")):
        inner = moments.centre(size)
        ranking = rank_channels(inner, torch.ones(channels, dtype=torch.double))
        costs, losses = [], []
        for count in range(max(2, sources), channels, 2):
            kept = sorted(ranking[:count])
            others = [c for c in range(channels) if c not in kept]
            fit = fit_transforms(inner.restrict(kept), others, sources)
            macs = count * filter_size + len(others) * sources * size**2
            costs.append(macs / (channels * filter_size))
            losses.append(float(fit.error[:, -1].sum() / moments.yy.sum()))
        axes.plot(costs, losses, style, label=f"S = {sources}, m = {size}", color="#3949ab")
    axes.set_yscale("log")
    axes.set_xlabel("multiply-adds, share of the dense layer's")
    axes.set_ylabel("share of the variance lost")
    axes.set_title(name, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save(figure, path)


def draw_plan(path: Path, plan: Plan) -> None:
    """Draw how many channels of each layer are kept and rebuilt, and what it costs."""
    rows = [(name, layer) for name, layer in plan.layers.items() if isinstance(layer, SBFLayer)]
    figure, axes = plt.subplots(figsize=(8, 0.28 * len(rows) + 1.1))
    places = range(len(rows))
    kept = [len(layer.kept) for _, layer in rows]
    rebuilt = [layer.channels - len(layer.kept) for _, layer in rows]
    axes.barh(places, kept, color="#3949ab", label="kept")
    axes.barh(places, rebuilt, left=kept, color="#ffb74d", label="rebuilt")
    for place, (_, layer) in zip(places, rows, strict=True):
        share = layer.macs_after / layer.macs_before
        text = f" S = {len(layer.sources[0])}, m = {layer.transform_size}, {share:.0%} of the cost"
        axes.text(layer.channels, place, text, va="center", fontsize=7)
    axes.set_yticks(list(places), [name for name, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45 * max(layer.channels for _, layer in rows))
    axes.set_xlabel("channels")
    axes.legend(frameon=False, loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    """Write a picture on white, so that it is seen in light and dark pages."""
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=130, facecolor="white", metadata={"Software": None})
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, compress, draw."""
    parser = argparse.ArgumentParser(description="Draw the pictures of docs/method.md.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder
    images, labels = patches(400, seed=0, lower=False)
    dense = train(NETWORK, images, labels)
    calibration = Calibration.of(images[:512])
    settings = Compression(macs=MACS, sources=SOURCES, mixtures=False)
    student, plan = compress(dense, calibration, settings, name=NETWORK)
    print(plan.summary())
    name = example(student)
    folder.mkdir(parents=True, exist_ok=True)
    draw_rebuilding(folder / "rebuilding.png", dense, student, name)
    draw_filters(folder / "filters.png", dense, student, name)
    ((_, moments),) = gather_layers(dense, {name: 3}, calibration)
    conv = dense.get_submodule(name)
    assert isinstance(conv, nn.Conv2d)
    draw_losses(folder / "losses.png", moments, conv.weight[0].numel(), name)
    draw_plan(folder / "plan.png", plan)


if __name__ == "__main__":
    main()
