import io

import pytest
from rich.console import Console

from sbf_dist.compression.plan import DenseLayer, Plan, Removed, SBFLayer
from sbf_dist.report.plan_table import plan_table, plan_text, show_plan


def plan(names=("stem", "layer1.0.conv1", "layer1.0.conv2"), explanation=("Because.",), cut=None):
    sbf = SBFLayer(
        channels=8,
        kept=[0, 2, 4],
        sources=[[0, 2]] * 5,
        transform_size=3,
        macs_before=40_000_000,
        macs_after=10_000_000,
        error=0.1234,
        reason="3 of 8 filters kept by l1, 2 sources; 40 -> 10 M; adds about 0.5 to the loss",
    )
    dense = DenseLayer(reason="the stem; it reads", macs=10_000_000, convertible=False)
    return Plan(
        model="small",
        classes=5,
        input_shape=(3, 8, 8),
        budget={"macs": 0.5},
        macs_before=90_000_000,
        macs_after=30_000_000,
        params_before=100,
        params_after=50,
        removed=cut or {},
        explanation=list(explanation),
        layers={name: dense if i == 0 else sbf for i, name in enumerate(names)},
    )


def test_each_convolution_has_a_row_and_the_footer_has_the_totals():
    lines = plan_text(plan(), 120).splitlines()
    rows = {line.split()[0]: line.split() for line in lines if line}
    assert rows["layer1.0.conv1"][1:] == [
        "8", "3", "2", "3", "40.00", "10.00", "25", "%", "0.1234",
        "adds", "about", "0.5", "to", "the", "loss",
    ]  # fmt: skip
    assert rows["stem"][1:] == [
        "-", "-", "-", "-", "10.00", "10.00", "100", "%", "-", "the", "stem",
    ]  # fmt: skip
    assert rows["3"][1:] == ["convolutions", "16", "6", "90.00", "30.00", "33", "%"]
    assert lines[-1] == "- Because."


def test_removed_channels_are_counted():
    cut = {"stem": Removed(out=[1, 3]), "layer1.0.conv1": Removed(out=[0], inp=[1, 3])}
    lines = plan_text(plan(cut=cut), 120).splitlines()
    rows = {line.split()[0]: line.split() for line in lines if line}
    assert rows["stem"][5] == "2"
    assert rows["layer1.0.conv1"][5] == "1"
    assert rows["3"][1:5] == ["convolutions", "16", "6", "3"]


@pytest.mark.parametrize("width", [80, 120])
def test_the_page_fits_the_terminal_and_long_names_and_sentences_are_wrapped_not_cut(width):
    name = "features.denseblock4.denselayer16.conv2"
    sentence = "word " * 60 + "end."
    text = plan_text(plan(names=("stem", name), explanation=[sentence]), width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in text
    assert name in "".join(line.split(" ")[0] for line in lines)
    assert text.split("- ")[-1].split() == sentence.split()
    assert ("adds about 0.5" in text) == (width == 120)


def test_a_terminal_gets_colours_and_a_file_plain_text():
    plain, colourful = io.StringIO(), io.StringIO()
    show_plan(plan(), Console(file=plain, width=100))
    show_plan(plan(), Console(file=colourful, width=100, force_terminal=True, color_system="256"))
    assert "\x1b" not in plain.getvalue()
    assert "\x1b" in colourful.getvalue()


def test_the_table_alone_is_a_rich_table():
    table = plan_table(plan(), reasons=False)
    assert table.row_count == 3
    assert "reason" not in [column.header for column in table.columns]


def test_names_in_brackets_are_not_taken_for_markup():
    assert "[red]x" in plan_text(plan(names=("[red]x",), explanation=["[bold]y"]), 100)
    assert "[bold]y" in plan_text(plan(names=("[red]x",), explanation=["[bold]y"]), 100)


def test_the_text_is_the_same_in_a_notebook(monkeypatch):
    text = plan_text(plan())
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert plan_text(plan()) == text
