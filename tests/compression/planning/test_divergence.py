"""Divergences to second order, against those that are measured with the layer in place."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from batch_streams import Stream
from small_networks import pictures, small

from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.convert import replace
from sbf_dist.compression.fitting.layerwise import gather_layers
from sbf_dist.compression.fitting.statistics import run_until
from sbf_dist.compression.fitting.transforms import fit_transforms, rank_channels
from sbf_dist.compression.outputs import TEMPERATURE
from sbf_dist.compression.plan import SBFLayer
from sbf_dist.compression.planning.divergence import Trial, divergences

IMAGES = pictures(48)


def trials_of(model, name, size, amounts):
    ((_, moments),) = gather_layers(model, {name: size}, Calibration.of(IMAGES))
    ranking = rank_channels(moments, torch.ones(16, dtype=torch.double))
    trials = []
    for kept in amounts:
        chosen = sorted(ranking[:kept])
        trials.append(
            Trial(chosen, fit_transforms(moments.restrict(chosen), sorted(ranking[kept:]), 2))
        )
    return trials


def in_place(model, name, trial, size):
    """The network with the trial's layer, made by the plan."""
    student = copy.deepcopy(model)
    sources = [[trial.kept[b] for b in row] for row in trial.fit.sources.tolist()]
    layer = SBFLayer(
        channels=16,
        kept=trial.kept,
        sources=sources,
        transform_size=size,
        macs_before=1,
        macs_after=1,
        error=0,
        reason="",
    )
    sbf = replace(student, name, layer)
    rebuilt = sorted(set(range(16)) - set(trial.kept))
    sbf.transforms.copy_(trial.fit.transforms)
    bias = model.get_submodule(name).bias
    if bias is not None:
        sbf.bias.copy_(bias)
    sbf.bias[rebuilt] = trial.fit.bias.float()
    return student


@torch.no_grad()
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("size", [1, 3])
def test_errors_are_those_of_the_layer_in_place(norm, size):
    model = small(norm=norm)
    (trial,) = trials_of(model, "conv2", size, [6])
    outputs = run_until(model, "conv2", IMAGES, output=True)
    error, rebuilt = trial.error(outputs, model.conv2.bias)
    made = run_until(in_place(model, "conv2", trial, size), "conv2", IMAGES, output=True)
    torch.testing.assert_close(error, (made - outputs)[:, rebuilt], rtol=1e-3, atol=1e-4)
    assert rebuilt == sorted(set(range(16)) - set(trial.kept))


@torch.no_grad()
def test_divergences_are_those_of_small_errors():
    """Of a hundredth of a trial's error, measured in place and scaled back."""
    model = small().double()
    images = IMAGES.double()
    trials = {name: trials_of(small(), name, 3, [8, 14]) for name in ("conv1", "conv2")}
    found = divergences(model, trials, images.split(16), seed=0, draws=60)
    expected = (model(images) / TEMPERATURE).log_softmax(1)
    for name, row in trials.items():
        for trial, divergence in zip(row, found[name], strict=True):

            def disturb(_, __, outputs, trial=trial):
                error, rebuilt = trial.error(outputs, None)
                disturbed = outputs.clone()
                disturbed[:, rebuilt] += 0.01 * error
                return disturbed

            handle = model.get_submodule(name).register_forward_hook(disturb)
            changed = (model(images) / TEMPERATURE).log_softmax(1)
            handle.remove()
            measured = F.kl_div(changed, expected, reduction="batchmean", log_target=True)
            wanted = 1e4 * TEMPERATURE**2 * float(measured)
            assert divergence == pytest.approx(wanted, rel=0.25)
        assert found[name][1] < found[name][0]  # more channels kept


@torch.no_grad()
def test_divergences_depend_on_the_seed_only():
    model = small()
    trials = {"conv1": trials_of(model, "conv1", 3, [8])}
    first = divergences(model, trials, IMAGES.split(16), seed=0)
    assert divergences(model, trials, IMAGES.split(16), seed=0) == first
    assert divergences(model, trials, IMAGES.split(16), seed=1) != first
    assert all(p.grad is None for p in model.parameters())
    assert not model.conv1._forward_hooks


@torch.no_grad()
def test_a_batch_and_its_graph_are_gone_when_the_next_comes():
    model = small()
    trials = {"conv1": trials_of(model, "conv1", 3, [8])}
    stream = Stream([4] * 6)
    gc.disable()  # which frees what is held in a circle some time later, if it can
    try:
        divergences(model, trials, iter(stream), seed=0)
        assert stream.most <= 2
        assert stream.alive == 0
    finally:
        gc.enable()
