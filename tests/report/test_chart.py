import itertools

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from sbf_dist.report.chart import accuracy_and_cost, accuracy_over_macs

ROWS = [
    {"name": "teacher-1", "network": "teacher-1", "top1": 0.951, "macs": 14.3e6},
    {"name": "teacher-2", "network": "teacher-2", "top1": 0.949, "macs": 22.1e6},
    {"name": "ensemble", "network": "ensemble", "top1": 0.962, "macs": 36.4e6},
    {"name": "dense student, labels only", "network": "dense-labels", "top1": 0.95, "macs": 14.3e6},
    {"name": "channels zeroed, no training", "network": "zeroed", "top1": 0.7, "macs": 7.1e6},
    {"name": "SBF one-shot, no training", "network": "sbf-one-shot", "top1": 0.94, "macs": 7.2e6},
    {"name": "SBF student, distilled", "network": "sbf-distilled", "top1": 0.955, "macs": 7.2e6},
]


def drawn(rows):
    """A figure with its renderer."""
    figure = accuracy_and_cost(rows)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return figure, canvas.get_renderer()


def test_each_row_is_a_line_of_the_picture_from_the_top_on():
    figure, _ = drawn(ROWS)
    accuracy, cost = figure.axes
    places = range(len(ROWS))
    points = accuracy.collections[-1].get_offsets()
    assert [tuple(point) for point in points] == [
        pytest.approx((100 * row["top1"], place)) for place, row in enumerate(ROWS)
    ]
    assert [label.get_text() for label in accuracy.get_yticklabels()] == [r["name"] for r in ROWS]
    assert [bar.get_width() for bar in cost.patches] == [
        pytest.approx(row["macs"] / 1e6) for row in ROWS
    ]
    heights = [accuracy.transData.transform((90, place))[1] for place in places]
    assert heights == sorted(heights, reverse=True)
    beside = [cost.transData.transform((0, bar.get_y() + bar.get_height() / 2))[1]
              for bar in cost.patches]  # fmt: skip
    assert beside == pytest.approx(heights)


def test_the_numbers_stand_beside_what_they_are_of_with_their_units():
    figure, _ = drawn(ROWS)
    accuracy, cost = figure.axes
    assert [text.get_text() for text in accuracy.texts] == [
        "95.1", "94.9", "96.2", "95.0", "70.0", "94.0", "95.5",
    ]  # fmt: skip
    assert [text.get_text() for text in cost.texts] == [
        "14.3", "22.1", "36.4", "14.3", "7.1", "7.2", "7.2",
    ]  # fmt: skip
    assert accuracy.get_xlabel() == "top-1 accuracy (%)"
    assert cost.get_xlabel() == "multiply-adds per image (M)"


def test_sbf_networks_have_a_colour_of_their_own():
    figure, _ = drawn(ROWS)
    colours = {
        row["network"]: to_rgb(bar.get_facecolor())
        for row, bar in zip(ROWS, figure.axes[1].patches, strict=True)
    }
    sbf = {colour for name, colour in colours.items() if name.startswith("sbf")}
    others = {colour for name, colour in colours.items() if not name.startswith("sbf")}
    assert len(sbf) == len(others) == 1
    assert sbf != others


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        ROWS[:1],
        [row | {"top1": 1.0} for row in ROWS],
        [row | {"top1": top1} for row, top1 in zip(ROWS, (0.0, 1.0), strict=False)],
        [row | {"top1": 0.0, "macs": 4e9} for row in ROWS[:2]],
    ],
    ids=["a run", "one row", "all perfect", "extremes", "none right"],
)
def test_no_text_covers_another_or_leaves_the_picture(rows):
    figure, renderer = drawn(rows)
    found = []
    for axes in figure.axes:
        texts = [*axes.texts, *(t for t in axes.get_yticklabels() if t.get_visible())]
        found += [text for text in texts if text.get_text()]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in found]
    assert len(boxes) >= 3 * len(rows)
    for name, box in boxes:
        assert 0 <= box.x0 <= box.x1 <= figure.bbox.width, name
        assert 0 <= box.y0 <= box.y1 <= figure.bbox.height, name
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        assert not a.overlaps(b), f"{one} and {other}"


def comparison(*, shares=(0.75, 0.5, 0.33, 0.25), lengths=(0, 60, 300), methods=None, spread=0.05):
    """Rows of a comparison in which the methods differ by `spread`."""
    methods = methods or ("magnitude", "depgraph", "depgraph-global", "ghost", "low-rank", "sbf")
    rows = []
    for steps in lengths:
        common = {"trained_steps": steps, "top1_std": 0.01}
        rows.append(
            common | {"method": "dense", "title": "dense", "reached": 1.0, "top1_mean": 0.9}
        )
        for place, method in enumerate(methods):
            title = "SBF" if method == "sbf" else method
            for share in shares:
                top1 = 0.6 + 0.2 * share + spread * place
                row = {"method": method, "title": title, "reached": share, "top1_mean": top1}
                rows.append(common | row)
    return rows


def compared(rows):
    figure = accuracy_over_macs(rows)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return figure, canvas.get_renderer()


def test_a_comparison_has_a_panel_for_each_training_and_a_line_for_each_method():
    figure, _ = compared(comparison())
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "not trained",
        "trained for 60 steps",
        "trained for 300 steps",
    ]
    for axes in figure.axes:
        assert len(axes.containers) == 6  # lines with error bars
        for place, container in enumerate(axes.containers):
            costs, top1 = container.lines[0].get_data()
            assert list(costs) == [75, 50, 33, 25]
            assert top1[0] == pytest.approx(100 * (0.6 + 0.15 + 0.05 * place))
        left, right = axes.get_xlim()
        assert left > 75
        assert right < 25
        assert {text.get_text() for text in axes.texts} == {
            "magnitude", "depgraph", "depgraph-global", "ghost", "low-rank", "SBF", "dense, 90.0",
        }  # fmt: skip


@pytest.mark.parametrize(
    "rows",
    [
        comparison(),
        comparison(spread=0.0),
        comparison(spread=0.0, lengths=(0,)),
        comparison(shares=(0.5,), methods=("sbf",)),
        [row | {"top1_mean": 1.0, "top1_std": 0.0} for row in comparison()],
        [row | {"top1_mean": 0.1} for row in comparison() if row["method"] != "dense"],
        [*comparison(), {"method": "ghost", "title": "Ghost", "macs": 0.1, "refused": "no"}],
    ],
    ids=["usual", "all alike", "one panel", "one point", "all perfect", "no dense", "refused"],
)
def test_the_names_of_a_comparison_neither_overlap_nor_leave_the_picture(rows):
    figure, renderer = compared(rows)
    for axes in figure.axes:
        assert axes.texts
        for text in axes.texts:
            box = Text.get_window_extent(text, renderer)  # without the line to its point
            assert 0 <= box.x0 <= box.x1 <= figure.bbox.width, text.get_text()
            assert 0 <= box.y0 <= box.y1 <= figure.bbox.height, text.get_text()
        labels = sorted(
            (axes.transData.transform(text.xyann)[1], text.get_fontsize()) for text in axes.texts
        )
        for (low, size), (high, _) in itertools.pairwise(labels):
            assert high - low >= size * figure.dpi / 72 * 0.95


def test_ours_is_the_boldest_line_of_a_comparison():
    figure, _ = compared(comparison())
    widths = [container.lines[0].get_linewidth() for container in figure.axes[0].containers]
    assert widths.index(max(widths)) == 5
    assert widths.count(max(widths)) == 1
