"""The page on runs: what it says of what is there, and of what is not."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from sbf_dist.compression.plan import DenseLayer, Plan, SBFLayer
from sbf_dist.report.contents import (
    Curve,
    Example,
    Layers,
    LayerView,
    Missing,
    Predictions,
    RebuiltChannel,
    RunContents,
    Source,
    Stage,
)
from sbf_dist.report.page import render

ROWS = [
    {"name": "one", "network": "one", "top1": 0.9, "macs": 4e6, "params": 2000, "latency_ms": 2.0},
    {
        "name": "student",
        "network": "sbf-distilled",
        "top1": 0.875,
        "macs": 2e6,
        "params": 1000,
        "latency_ms": None,
        "agreement": 0.95,
        "kl": 0.0123,
        "count": 40,
    },
]
NASTY = "</script><b>&{{ 7 }}"
PICTURE = np.zeros((8, 8, 3), np.uint8)
ONES = np.ones((3, 3), np.float32)


def plan() -> Plan:
    sbf = SBFLayer(
        channels=3,
        kept=[0, 2],
        sources=[[2]],
        transform_size=1,
        macs_before=30,
        macs_after=21,
        error=0.125,
        reason="why the body is as it is",
    )
    stem = DenseLayer(reason="the stem", macs=9, convertible=False)
    return Plan(
        model="small",
        classes=2,
        input_shape=(3, 8, 8),
        budget={"macs": 0.8},
        macs_before=39,
        macs_after=30,
        params_before=40,
        params_after=31,
        explanation=["asked for 0.8"],
        layers={"stem": stem, "body": sbf},
    )


def whole(name: str = "digits") -> RunContents:
    labels = {
        "teachers": ["one", "two"],
        "classes": ["cat", NASTY],
        "parts": [
            {
                "part": "unlabelled",
                "images": 10,
                "confidence": 0.875,
                "agreement": 0.75,
                "accuracy": None,
                "ece": None,
            }
        ],
        "per_class": {"predicted": [6, 4], "used": [5, 4]},
        "confidence": {"unlabelled": [2, 8], "used": [1, 8]},
        "reliability": {"labelled": [{"images": 5, "confidence": 0.9, "accuracy": 1.0}]},
        "agreement": [{"agreement": 1.0, "images": 10, "accuracy": None}],
    }
    channel = RebuiltChannel(
        1, [Source(2, ONES[:1, :1])], 0, ONES[None], ONES[None], ONES, ONES, 0.25
    )
    return RunContents(
        name=name,
        place=f"runs/{name}",
        rows=ROWS,
        compressed="one",
        students=("sbf-one-shot", "sbf-distilled"),
        plan=plan(),
        layers=Layers(
            "SBF one-shot",
            [LayerView("body", {0: ONES[None], 2: ONES[None]}, 2, [channel], 1, 1)],
            PICTURE,
        ),
        curves=[Curve("sbf-distilled", {"loss": ([1, 2], [0.5, 0.25])})],
        labels=labels,
        predictions=Predictions(
            "student",
            ["cat", NASTY],
            np.array([[3, 1], [0, 4]]),
            8,
            8,
            [Example(0, 1, 0.75, PICTURE)],
        ),
        recipe={"name": name, "seed": 0, "teachers": [{"name": "one"}]},
        stages=[Stage("prepare", True, 1.5, {"torch": "2.0"}), Stage("export", False, None, {})],
    )


class _Text(HTMLParser):
    """Collects what a reader sees, the cells of tables, and the scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.scripts: list[str] = []
        self.addresses: list[str] = []
        self._in = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._in = tag if tag in ("script", "style") else ""
        self.addresses += [v for k, v in attrs if k in ("src", "href") and v is not None]

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in == "script":
            self.scripts.append(data)
        elif not self._in and data.strip():
            self.seen.append(" ".join(data.split()))


def read(page: str) -> _Text:
    text = _Text()
    text.feed(page)
    return text


@pytest.fixture(scope="module")
def page() -> str:
    return render([whole()])


def test_the_table_has_the_figures_of_the_rows(page: str) -> None:
    seen = read(page).seen
    start = seen.index("time (ms)")
    assert seen[start + 1 : start + 17] == [
        *("1", "one", "90.0", "-", "-", "4.00", "2.0", "2.00"),
        *("2", "student", "87.5", "95.0", "0.012", "2.00", "1.0", "-"),
    ]
    assert "one, 90.0 % right, became “student”, 87.5 % right, with 50 % of its multiply-adds." in (
        seen
    )


def test_nothing_is_fetched_and_nothing_given_is_markup(page: str) -> None:
    text = read(page)
    assert all(address.startswith(("data:", "#")) for address in text.addresses)
    assert NASTY in text.seen  # as it is, and no tag
    figures = json.loads(next(s for s in text.scripts if s.startswith('{"figures"')))["figures"]
    assert figures["run0-confusion"]["layout"]["yaxis"]["ticktext"][1].startswith("</script>")
    charts = re.findall(r'data-chart="([^"]+)"', page)
    assert sorted(charts) == sorted(figures)
    assert len(charts) == len(set(charts)) == 10


def test_each_part_that_is_missing_is_named_with_its_reason() -> None:
    parts = ("rows", "plan", "layers", "curves", "labels", "predictions", "recipe")
    nothing = replace(whole(), **{part: Missing(f"No {part} yet.") for part in parts})
    seen = read(render([nothing])).seen
    for part in parts:
        assert f"No {part} yet." in seen
    assert "Not finished: done so far: prepare." in seen
    assert "not done when this page was written" in seen


def test_a_picture_that_is_missing_leaves_the_filters() -> None:
    run = whole()
    assert isinstance(run.layers, Layers)
    page = render([replace(run, layers=replace(run.layers, picture=Missing("Gone.")))])
    assert "Gone." in read(page).seen
    assert 'alt="filter of channel 2"' in page


def test_of_runs_side_by_side_the_recipes_differences_come_first() -> None:
    other = replace(whole("other"), recipe={"name": "other", "seed": 3})
    page = render([whole(), other])
    different = page[page.index("What differs") : page.index("Stages")].replace("<wbr>", "")
    rows = re.findall(r"<code>([^<]+)</code></th><td>([^<]*)</td><td>([^<]*)</td>", different)
    assert rows == [
        ("name", "digits", "other"),
        ("seed", "0", "3"),
        ("teachers.0.name", "one", "-"),
    ]
    assert page.count("plotly.js v") == 1
