"""Moments of many layers from few passes, against those of one layer with all in memory."""

import pytest
import torch
from small_networks import pictures, small

from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.fitting import layerwise
from sbf_dist.compression.fitting.finding_cuts import find_cuts
from sbf_dist.compression.fitting.layerwise import Draw, Targets, draws, gather_layers, visit
from sbf_dist.compression.fitting.reference import Reference
from sbf_dist.compression.fitting.resuming import Passes
from sbf_dist.compression.fitting.shelf import Shelf
from sbf_dist.compression.fitting.statistics import gather_moments, neighbourhoods, run_until

SIZES = {"conv1": 3, "conv2": 1}


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("budget", [1, 2**30], ids=["a pass per layer", "one pass"])
@pytest.mark.parametrize("norm", [True, False], ids=["no bias", "bias"])
def test_moments_are_those_of_each_layer_alone(budget, norm, monkeypatch):
    monkeypatch.setattr(layerwise, "SUMS", budget)
    model, images = small(norm=norm), pictures(30)
    gathered = dict(gather_layers(model, SIZES, Calibration.of(images, batch=8)))
    assert list(gathered) == list(SIZES)
    for name, size in SIZES.items():
        y = run_until(model, name, images, output=True)
        bias = model.get_submodule(name).bias
        z = y if bias is None else y - bias[:, None, None]
        wanted = gather_moments([(z.double(), y.double())], size)
        for field in ("zz", "zy", "yy", "z_mean", "y_mean"):
            torch.testing.assert_close(
                getattr(gathered[name], field), getattr(wanted, field), rtol=1e-4, atol=1e-5
            )


def test_as_many_passes_as_the_memory_for_matrices_asks_for(monkeypatch):
    model, calibration = small(), Calibration.of(pictures(8))
    passes = []
    model.stem.register_forward_hook(lambda *_: passes.append(1))
    for budget, expected in ((2**30, 1), (1, 2)):
        monkeypatch.setattr(layerwise, "SUMS", budget)
        passes.clear()
        list(gather_layers(model, SIZES, calibration))
        assert len(passes) - 1 == expected  # one more, of one image, to see the layers' sizes


def test_a_pass_ends_at_the_last_layer_that_is_looked_at():
    model, seen = small(), []
    model.conv2.register_forward_hook(lambda *_: pytest.fail("conv2 was computed"))
    visit(model, pictures(2), {"conv1": lambda inputs, output: seen.append(output.shape[1])})
    assert seen == [16]


@pytest.mark.parametrize(
    ("width", "positions", "images", "expected"),
    [
        (576, 28 * 28, 512, (223, 131)),  # narrow: many positions
        (576, 56 * 56, 512, (128, 228)),  # a large map: more of it, and so fewer images
        (4608, 28 * 28, 512, (128, 128)),  # wide: fewer
        (4608, 7 * 7, 512, (335, 49)),  # small maps: more images
        (4608, 56 * 56, 8, (8, 2048)),  # few images: more of each
        (64, 10 * 10, 30, (30, 100)),  # all that there is
        (576, 56 * 56, 10**6, (128, 228)),  # no more images than needed
    ],
)
def test_positions_are_drawn_as_the_width_of_the_layer_needs(width, positions, images, expected):
    draw = Draw.of("layer", width, positions, images)
    assert (draw.images, draw.per_image) == expected


def test_drawn_rows_are_different_positions_and_the_same_each_time():
    features = torch.arange(3 * 36.0).view(3, 1, 6, 6)
    draw = Draw("layer", images=5, per_image=7)
    rows = draw.rows(features, 1, 3)  # images 3 and 4 are of the draw, image 5 is not
    assert rows.shape == (14, 1)
    assert len(rows.unique()) == 14
    assert (rows[:7] < 36).all()
    assert ((rows[7:] >= 36) & (rows[7:] < 72)).all()
    assert torch.equal(draw.rows(features, 1, 3), rows)
    assert not torch.equal(Draw("other", 5, 7).rows(features, 1, 3), rows)
    # With shifts: the same positions, each with its neighbours.
    assert torch.equal(draw.rows(features, 3, 3)[:, 4:5], rows)
    whole = neighbourhoods(features[:2], 3)
    drawn = rows[:, 0].long()
    assert torch.equal(draw.rows(features, 3, 3), whole[drawn])


def test_a_sample_of_positions_gives_nearly_the_moments_of_all(monkeypatch):
    model, images = small(), pictures(200)
    whole = dict(gather_layers(model, SIZES, Calibration.of(images)))
    for name, value in {"LEAST": 2**12, "MOST": 2**12, "PER_IMAGE": 20}.items():
        monkeypatch.setattr(layerwise, name, value)
    calibration = Calibration.of(images)
    assert draws(model, SIZES, calibration)["conv1"].per_image < 100
    drawn = dict(gather_layers(model, SIZES, calibration))
    for name in SIZES:
        scale = whole[name].zz.diagonal().mean()
        torch.testing.assert_close(
            drawn[name].zz / scale, whole[name].zz / scale, rtol=0, atol=0.25
        )


def test_targets_are_the_references_outputs_at_the_drawn_positions(monkeypatch):
    model, images = small(), pictures(12)
    for name, value in {"LEAST": 100, "MOST": 100, "PER_IMAGE": 10}.items():
        monkeypatch.setattr(layerwise, name, value)
    monkeypatch.setattr("sbf_dist.compression.calibration.PIXELS", 500)
    calibration = Calibration.of(images, batch=5)
    assert [len(part) for part in calibration.parts(calibration.part)] == [4, 4, 4]
    chosen = draws(model, SIZES, calibration)
    reference = Reference(model, {"conv1": [4, 2, 9]})
    for budget in (1, 2**30):
        monkeypatch.setattr(layerwise, "TARGETS", budget)
        cuts = find_cuts(model, images[:3], list(SIZES))
        targets = Targets(reference, chosen, Passes(model, calibration, cuts, Shelf(2**20)))
        for name, channels in (("conv1", [4, 2, 9]), ("conv2", list(range(16)))):
            outputs = run_until(model, name, images, output=True)[:, channels]
            rows = targets.pop(name)
            parts = [
                chosen[name].rows(part, 1, start)
                for start, part in zip((0, 4, 8), outputs.split(4), strict=True)
                if start < chosen[name].images
            ]
            torch.testing.assert_close(rows, torch.cat(parts))
