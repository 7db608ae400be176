"""Training curves out of a run's journals."""

import math
from pathlib import Path

import pytest

from sbf_dist.report.curve_charts import curve_charts, read_curves
from sbf_dist.tracking.journal import Journal, metrics_entry


@pytest.fixture
def tracking(tmp_path: Path) -> Path:
    first = Journal(tmp_path / "distill")
    first.append({"kind": "begin", "time": 1, "name": "distill"})
    for step in (10, 20):
        first.append(metrics_entry({"student/loss": 1 / step, "student/lr": 0.1}, step))
    second = Journal(tmp_path / "distill")  # of the attempt after a resume
    second.append(metrics_entry({"student/loss": 0.02, "student/divergence": 0.01}, 30))
    second.append(metrics_entry({"student/loss": math.inf}, 40))
    with second.path.open("a") as file:
        file.write('{"kind": "metrics", "step": 50')  # cut by a kill
    Journal(tmp_path / "evaluate").append(metrics_entry({"student/loss": 9.0}, 0))
    return tmp_path


def test_a_training_goes_on_over_its_journals_and_other_stages_say_nothing_of_it(tracking: Path):
    (curve,) = read_curves(tracking)
    assert curve.network == "student"
    steps, values = curve.series["loss"]
    assert steps == [10, 20, 30, 40]
    assert values[:3] == [0.1, 0.05, 0.02]
    assert math.isnan(values[3])
    assert curve.series["divergence"] == ([30], [0.01])


def test_what_is_not_finite_is_a_gap_in_the_line(tracking: Path):
    loss, *_ = curve_charts([("", read_curves(tracking))])
    assert loss.figure.data[0].y == (0.1, 0.05, 0.02, None)


def test_what_no_training_logged_has_no_chart(tracking: Path):
    speed = Journal(tracking / "teachers")
    curves = read_curves(tracking)
    names = ["training-loss", "training-divergence"]
    assert [chart.name for chart in curve_charts([("", curves)])] == names
    speed.append(metrics_entry({"t/loss": 1.0, "t/images_per_s": 9.0, "t/top1": 0.5}, 1))
    names.append("training-speed")
    assert [chart.name for chart in curve_charts([("", read_curves(tracking))])] == names
    speed.append(metrics_entry({"t/top1": 0.6}, 2))
    names.append("training-accuracy")
    assert [chart.name for chart in curve_charts([("", read_curves(tracking))])] == names


def test_a_long_training_is_thinned_by_means(tmp_path: Path):
    journal = Journal(tmp_path / "teachers")
    for step in range(1, 1001):
        journal.append(metrics_entry({"teacher/loss": float(step)}, step))
    (curve,) = read_curves(tmp_path)
    steps, values = curve.series["loss"]
    assert len(steps) == 334
    assert (steps[0], values[0]) == (3, 2.0)
    assert (steps[-1], values[-1]) == (1000, 1000.0)


def test_runs_without_journals_have_no_curves(tmp_path: Path):
    assert read_curves(tmp_path / "nothing") == []
