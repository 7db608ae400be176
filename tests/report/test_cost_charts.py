"""Charts of accuracy over cost: which networks are on the line, and what is seen of the others."""

import pytest

from sbf_dist.report.cost_charts import accuracy_over_cost, pareto


def row(name, top1, macs, latency_ms=1.0):
    return {"name": name, "network": name, "top1": top1, "macs": macs, "latency_ms": latency_ms}


ROWS = [
    row("dense", 0.95, 10e6, 2.0),
    row("sbf-distilled", 0.96, 5e6),
    row("worse and dearer", 0.94, 12e6),
    row("cheapest", 0.93, 2e6, None),
    row("hopeless", 0.10, 6e6),
]


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([], []),
        ([(2.0, 90.0)], [(2.0, 90.0)]),
        ([(3.0, 90.0), (1.0, 80.0), (2.0, 95.0)], [(1.0, 80.0), (2.0, 95.0)]),
        ([(1.0, 80.0), (1.0, 85.0)], [(1.0, 85.0)]),
        ([(1.0, 80.0), (2.0, 80.0)], [(1.0, 80.0)]),
    ],
)
def test_the_line_goes_through_what_none_beats_in_both(points, front):
    assert pareto(points) == front


def test_every_row_is_a_point_with_its_number_and_its_figures():
    macs, _ = accuracy_over_cost([("", ROWS)])
    line, *points = macs.figure.data
    assert [point.text[0] for point in points] == ["1", "2", "3", "4", "5"]
    assert [point.x[0] for point in points] == [10.0, 5.0, 12.0, 2.0, 6.0]
    assert [point.customdata[0] for point in points] == pytest.approx([95, 96, 94, 93, 10])
    # The line ends where the dearest network is.
    assert list(zip(line.x, line.y, strict=True)) == [(2.0, 93.0), (5.0, 96.0), (12.0, 96.0)]


def test_a_network_far_below_the_others_stands_at_the_edge_as_a_triangle():
    macs, _ = accuracy_over_cost([("", ROWS)])
    hopeless = macs.figure.data[-1]
    assert hopeless.marker.symbol == "triangle-down"
    assert hopeless.y[0] > 80
    assert "triangle" in macs.reading


def test_what_was_not_measured_is_left_out_and_named():
    _, time = accuracy_over_cost([("", ROWS)])
    assert len(time.figure.data) == len(ROWS)  # the line, and all but one
    assert "as the machine was busy: cheapest." in time.reading


def test_runs_side_by_side_have_letters_and_colours_of_their_own():
    macs, _ = accuracy_over_cost([("A", ROWS[:1]), ("B", ROWS[:1])])
    _, first, second = macs.figure.data
    assert (first.text[0], second.text[0]) == ("A1", "B1")
    assert first.marker.color != second.marker.color


def test_names_are_no_markup_in_the_charts():
    macs, _ = accuracy_over_cost([("", [row("<b>%{x}</b>", 0.9, 1e6)])])
    assert macs.figure.data[1].hovertemplate.startswith("&lt;b>% {x}&lt;/b>")


def test_a_cost_that_is_known_of_none_has_no_chart():
    rows = [row("dense", 0.95, 10e6, None), row("sbf-distilled", 0.96, 5e6, None)]
    assert [chart.name for chart in accuracy_over_cost([("", rows)])] == ["accuracy-macs"]
