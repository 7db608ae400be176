"""Rebuilding a network within a budget of time."""

import re

import pytest
import torch
from small_networks import Small, pictures, small

from sbf_dist.budget import Budget
from sbf_dist.compression import reconstruct
from sbf_dist.compression.convert import convert
from sbf_dist.compression.cost import count
from sbf_dist.compression.plan import DenseLayer
from sbf_dist.compression.planning import latency, latency_budget, latency_table
from sbf_dist.compression.planning.latency_table import LatencyTable, Timing
from sbf_dist.compression.reconstruct import rebuild
from sbf_dist.errors import UserError
from sbf_dist.export.fold import fold_batchnorm
from sbf_dist.settings import Compression


def shrink_to(budget, model, table, *, progress=None, for_inference=None, sources=4):
    settings = Compression(**budget.given(), sources=sources)
    timing = Timing(table) if for_inference is None else Timing(table, for_inference)
    return rebuild(model, pictures(), settings, name="small", progress=progress, timing=timing)


@pytest.fixture
def clockwork(monkeypatch):
    """A machine on which a network takes a microsecond a parameter, and a layer half of that."""

    def networks(models, shape, *, batch):
        return [1e-3 * sum(p.numel() for p in model.parameters()) for model in models]

    def layers(conv, input_size, forms, *, batch):
        forms = [latency.build_form(conv, form) for form in forms]
        return [ms / 2 for ms in networks(forms, None, batch=1)]

    monkeypatch.setattr(latency_table, "layer_latencies", layers)
    for module in (latency_budget, reconstruct):
        monkeypatch.setattr(module, "latencies", networks)


@pytest.mark.parametrize("budget", [Budget(latency=0.6), Budget(latency_ms=2.5)], ids=str)
def test_a_budget_of_time_is_met_and_the_plan_tells_the_times(clockwork, tmp_path, budget):
    model, table = small(), LatencyTable(tmp_path / "latency.json", batch=2)
    student, plan = shrink_to(budget, model, table)
    dense_ms = 1e-3 * count(model, (3, 10, 10)).params
    assert plan.budget == budget.given()
    assert plan.latency.ms_before == pytest.approx(dense_ms, abs=1e-4)
    assert plan.latency.ms_after == pytest.approx(1e-3 * plan.params_after, abs=1e-4)
    assert 0.9 * budget.limit(dense_ms) < plan.latency.ms_after <= 1.02 * budget.limit(dense_ms)
    assert plan.latency.batch == 2
    assert plan.latency.machine in table.path.read_text()
    converted = {name: layer for name, layer in plan.layers.items() if layer.kind == "sbf"}
    assert converted
    for name, layer in converted.items():
        parameters = sum(p.numel() for p in student.get_submodule(name).parameters())
        assert layer.ms_after == pytest.approx(parameters / 2e3, abs=1e-4)
        assert layer.ms_after < layer.ms_before
        assert f"; {layer.ms_before:.4g} -> {layer.ms_after:.4g} ms, " in layer.reason
    assert plan.layers["stem"].ms is None
    assert torch.equal(convert(Small(), plan).conv2.sources, student.conv2.sources)


def test_a_layer_that_is_measured_no_faster_stays_dense_and_says_so(
    clockwork, tmp_path, monkeypatch
):
    fast = latency_table.layer_latencies

    def slow_conv1(conv, input_size, forms, *, batch):
        times = fast(conv, input_size, forms, batch=batch)
        slow = 5 if conv.in_channels == 8 else 0
        return [ms + slow * (form.sources > 0) for form, ms in zip(forms, times, strict=True)]

    monkeypatch.setattr(latency_table, "layer_latencies", slow_conv1)
    _, plan = shrink_to(Budget(latency=0.8), small(), LatencyTable(tmp_path / "latency.json"))
    layer = plan.layers["conv1"]
    assert isinstance(layer, DenseLayer)
    assert layer.reason.startswith("no SBF form of it was measured faster; ")
    assert layer.convertible
    assert plan.layers["conv2"].kind == "sbf"


def test_a_time_that_cannot_be_reached_names_the_smallest_that_works(clockwork, tmp_path):
    table = LatencyTable(tmp_path / "latency.json")
    with pytest.raises(UserError, match=r"latency = 0\.05 of the dense network's") as told:
        shrink_to(Budget(latency=0.05), small(), table)
    smallest = float(re.search(r"smallest that works is (\S+)$", str(told.value))[1])
    _, plan = shrink_to(Budget(latency=smallest), small(), table)
    assert plan.latency.ms_after <= 1.02 * smallest * plan.latency.ms_before


def test_real_times_are_measured_and_recorded(tmp_path, monkeypatch):
    # What they are is not for a test to say, nor whether the machine is busy.
    monkeypatch.setattr(latency, "UNDISTURBED", float("inf"))
    table = LatencyTable(tmp_path / "latency.json")
    told, made = [], []

    def for_inference(model):
        made.append(model)
        return fold_batchnorm(model)

    student, plan = shrink_to(
        Budget(latency=1.0),
        small(),
        table,
        sources=2,
        progress=lambda *record: told.append(record),
        for_inference=for_inference,
    )
    assert plan.latency.ms_before > 0
    assert plan.latency.ms_after > 0
    assert made[-1] is student
    assert all(layer.ms > 0 for layer in plan.layers.values() if layer.reason != STEM)
    assert [record for record in told if record[0] == "measure latency"] == [
        ("measure latency", 1, 2),
        ("measure latency", 2, 2),
    ]
    measured = table.path.read_text()
    shrink_to(Budget(latency=1.0), small(), table, sources=2)
    assert table.path.read_text() == measured


STEM = "the stem: it reads the image itself"
