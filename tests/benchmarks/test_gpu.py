"""The GPU benchmark's functions take a device and a timer, so that most of it runs on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sbf_dist.ops import expand_reference

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


# As for a script, its folder is where it finds its own modules.
sys.path.insert(0, str(BENCHMARKS))
import gpu  # noqa: E402
import gpu_networks  # noqa: E402
import gpu_problems  # noqa: E402


class Clock:
    """A timer that runs each call once and tells how many there were."""

    def __init__(self):
        self.calls = 0

    def __call__(self, call):
        call()
        self.calls += 1
        return float(self.calls)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("command", [["gpu.py"], ["gpu_build.py", "folder"]])
def test_without_a_device_it_says_so_in_one_line_and_exits_with_2(command, tmp_path):
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / command[0]), *command[1:]],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "needs a CUDA device" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_figures_so_far_are_written_after_each_part(tmp_path, monkeypatch):
    def fails(report, quick):
        raise RuntimeError("out of memory")

    def works(report, quick):
        report["kernels"] = [1.5]

    monkeypatch.setattr(gpu, "environment", lambda: {"gpu": "none"})
    monkeypatch.setattr(gpu, "PARTS", {"kernels": works, "layers": fails})
    target = tmp_path / "results" / "gpu.json"
    with pytest.raises(RuntimeError, match="out of memory"):
        gpu.measure(["kernels", "layers"], True, target)
    report = json.loads(target.read_text())
    assert report["kernels"] == [1.5] and report["gpu"] == "none"
    assert set(report["seconds"]) == {"kernels"}


def test_it_needs_nothing_of_the_package_but_what_torch_alone_can_import():
    program = (
        "import sys, torch, torchvision\nbefore = set(sys.modules)\n"
        "import sbf_dist.ops, sbf_dist.layers\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    strangers = set(done.stdout.split()) - {"sbf_dist", "torch"} - sys.stdlib_module_names
    assert not strangers


def test_wiring_is_that_of_a_layer_that_keeps_random_channels():
    sources, order = gpu_problems.random_wiring(40, 15, 3, "cpu")
    assert sources.shape == (25, 3) and sources.min() >= 0 and sources.max() < 15
    assert order.sort().values.tolist() == list(range(40))
    for entries in (order[order < 15], order[order >= 15]):
        assert entries.tolist() == sorted(entries.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_checks_pass_where_the_operators_are_right(dtype):
    cases = [((2, 5, 7, 4, 6), 2, 3, layout, dtype, "silu") for layout in gpu_problems.LAYOUTS]
    report = gpu_problems.check_all("cpu", cases)
    assert report["failures"] == [] and report["cases"] == 2
    assert {name.split("/")[0] for name in report["worst"]} == {
        "expand",
        "grad_z",
        "grad_transforms",
        "grad_bias",
        "conv2d",
    }


def test_checks_fail_where_an_operator_is_wrong(monkeypatch):
    def slightly_wrong(*args):
        y = expand_reference(*args).clone()
        y.data.flatten()[-1] += 0.01
        return y

    monkeypatch.setattr("sbf_dist.ops.expand", slightly_wrong)
    case = ((2, 5, 7, 4, 6), 2, 3, "contiguous", torch.float32, "none")
    (failure,) = gpu_problems.check_all("cpu", [case])["failures"]
    assert failure.startswith("expand ")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_an_infinite_error(value):
    exact = torch.ones(3)
    assert gpu_problems.error_of(torch.tensor([1.0, value, 1.0]), exact) == float("inf")


def test_every_layout_dtype_and_activation_is_checked():
    for quick in (True, False):
        cases = list(gpu_problems.check_cases(quick))
        assert {case[3] for case in cases} == set(gpu_problems.LAYOUTS)
        assert {case[4] for case in cases} == set(gpu_problems.TOLERANCES)
        assert len({case[5] for case in cases}) == 5


def test_rows_of_kernels_compare_with_a_copy_of_the_same_bytes():
    variants = [(torch.float32, layout, 0.5, 2) for layout in gpu_problems.LAYOUTS]
    rows = gpu.expand_rows(Clock(), "cpu", 2, [(8, 5)], variants)
    assert [row["operator"] for row in rows[:3]] == ["expand", "grad_input", "grad_transforms"]
    assert len(rows) == 6
    moved = 2 * (8 + 4) * 25 * 4
    for row in rows:
        assert row["of_copy"] == row["copy_ms"] / row["ms"]
        assert row["gb_per_s"] == pytest.approx(moved / row["ms"] / 1e6)
    json.dumps(rows)


def test_rows_of_layers_time_dense_basis_and_sbf_in_inference_and_training():
    clock = Clock()
    rows = gpu_networks.layer_rows(
        clock,
        "cpu",
        torch.float32,
        2,
        [(8, 16, 5, 3), (8, 16, 5, 1)],
        dense=[gpu_networks.PlainConvolution],
    )
    assert [(row["shape"][3], row["ratio"]) for row in rows] == [
        (3, 0.5),
        (3, 0.25),
        (1, 0.5),
        (1, 0.25),
    ]
    assert clock.calls == 2 * 2 + 4 * 3
    json.dumps(rows)


def test_networks_are_the_same_but_for_their_convolutions():
    rows = gpu_networks.network_rows(
        Clock(),
        "cpu",
        torch.float32,
        [1],
        side=32,
        names=("dense", "SBF"),
        modes={"eager": lambda call: call},
    )
    dense, sbf = (row["macs"] for row in rows)
    spatial = gpu_networks.multiply_adds(gpu_networks.NETWORKS["SBF, 3 x 3 only"], side=32)
    # All but the stem at half the multiply-adds, rounded to eight channels each.
    assert 0.45 < sbf / dense < 0.55
    assert sbf < spatial < dense
    json.dumps(rows)


def test_cudnns_fused_operators_are_counted_as_what_they_compute():
    plain, fused = (
        gpu_networks.multiply_adds(gpu_networks.NETWORKS[name], side=32)
        for name in ("dense", "dense, cuDNN fused")
    )
    assert plain == fused


def test_speedups_compare_with_the_fastest_dense_network_of_the_same_kind():
    def row(network, batch, ms):
        return {"network": network, "dtype": "float16", "batch": batch, "mode": "graph", "ms": ms}

    rows = [
        row("dense", 1, 4.0),
        row("dense, cuDNN fused", 1, 3.0),
        row("SBF", 1, 2.0),
        row("dense", 8, 9.0),
        row("SBF", 8, 12.0),
    ]
    ratios = [(r["network"], r["batch"], r["speedup"]) for r in gpu_networks.speedups(rows)]
    assert ratios == [("SBF", 1, 1.5), ("SBF", 8, 0.75)]


def test_the_dense_network_is_torchvisions():
    from torchvision.models import resnet50

    torch.manual_seed(0)
    expected = resnet50(weights=None).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            gpu_networks.ResNet50(gpu_networks.NETWORKS["dense"])(x),
            expected(x),
            rtol=1e-4,
            atol=1e-4,
        )


def test_a_table_has_a_line_for_each_row():
    text = gpu.table("title", [{"shape": [1, 2], "ms": 0.123456}, {"shape": [3, 4], "ms": 10.0}])
    assert text.splitlines()[1:] == ["title", "shape      ms", "  1x2  0.1235", "  3x4      10"]
