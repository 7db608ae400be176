"""`sbf plan show`: a plan as a table, from wherever it lies."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from launchers import cli
from sbf_dist.compression.plan import DenseLayer, Plan, SBFLayer
from sbf_dist.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    layers = {
        "stem": DenseLayer(reason="the stem: it reads the image itself", macs=9, convertible=False),
        "body": SBFLayer(
            channels=3,
            kept=[0, 2],
            sources=[[2]],
            transform_size=1,
            macs_before=30,
            macs_after=21,
            error=0.125,
            reason="2 of 3 filters kept",
        ),
    }
    plan = Plan(
        model="small",
        classes=5,
        input_shape=(3, 8, 8),
        budget={"macs": 0.8},
        macs_before=39,
        macs_after=30,
        params_before=40,
        params_after=31,
        explanation=["asked for 0.8 of the multiply-adds"],
        layers=layers,
    )
    plan.save(tmp_path / "plan.json")
    return tmp_path


@pytest.mark.parametrize("place", ["", "plan.json"])
def test_a_plan_is_shown_with_its_layers_and_its_explanation(folder: Path, place: str) -> None:
    result = CliRunner().invoke(cli.app, ["plan", "show", str(folder / place)])
    assert result.exit_code == 0, result.output
    body = next(line for line in result.output.splitlines() if line.startswith("body"))
    assert body.split()[1:5] == ["3", "2", "1", "1"]
    assert "70 %" in body
    assert "asked for 0.8 of the multiply-adds" in result.output


@pytest.mark.parametrize(
    ("place", "message"),
    [("nowhere", "plan .*nowhere does not exist"), ("empty", "folder .*empty has no plan.json")],
)
def test_a_place_without_a_plan_is_reported_in_one_line(
    folder: Path, place: str, message: str
) -> None:
    (folder / "empty").mkdir()
    result = CliRunner().invoke(cli.app, ["plan", "show", str(folder / place)])
    assert isinstance(result.exception, UserError)
    with pytest.raises(UserError, match=message):
        raise result.exception
