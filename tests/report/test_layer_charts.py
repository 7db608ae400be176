"""Charts of layers: every convolution of the plan, as the plan has it."""

from sbf_dist.compression.plan import DenseLayer, Plan, Removed, SBFLayer
from sbf_dist.report.layer_charts import layer_charts

SBF = SBFLayer(
    channels=4,
    kept=[0, 2, 3],
    sources=[[2]],
    transform_size=3,
    macs_before=30_000,
    macs_after=21_000,
    error=0.1,
    reason="",
)
STEM = DenseLayer(reason="the stem", macs=9000, convertible=False)


def plan(layers: dict, removed: dict | None = None) -> Plan:
    return Plan(
        model="small",
        classes=0,
        input_shape=(3, 6, 6),
        budget={"macs": 0.5},
        macs_before=2,
        macs_after=1,
        params_before=2,
        params_after=1,
        removed=removed or {},
        layers=layers,
    )


def test_bars_are_the_plans_numbers_in_forward_order():
    name = "a.very.long.name.of.a.layer.conv1"
    removed = {"stem": Removed(out=[1, 5])}
    channels, macs = layer_charts(plan({"stem": STEM, name: SBF}, removed), "run0")
    assert {bar.name: list(bar.x) for bar in channels.figure.data} == {
        "kept": [0, 3],
        "rebuilt": [0, 1],
        "removed": [2, 0],
    }
    assert {bar.name: list(bar.x) for bar in macs.figure.data} == {
        "left": [0.009, 0.021],
        "saved": [0.0, 0.009],
    }
    assert macs.figure.layout.yaxis.ticktext == ("stem", "a.very.long…layer.conv1")
    assert list(macs.figure.data[0].customdata) == ["stem", name]


def test_a_plan_that_changes_nothing_has_no_chart_of_channels():
    assert [chart.name for chart in layer_charts(plan({"stem": STEM}), "x")] == ["x-layer-cost"]
