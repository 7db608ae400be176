import errno
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sbf_dist.compression.planning import latency_table
from sbf_dist.compression.planning.latency import Form
from sbf_dist.compression.planning.latency_table import GRID, LatencyTable, default_path
from sbf_dist.errors import UserError

CONV = nn.Conv2d(8, 16, 3, padding=1)
FORMS = [Form(16), *(Form(kept, sources, 3) for sources in (1, 2, 4) for kept in range(4, 16))]


def steps(form: Form) -> float:
    """Milliseconds with steps in B, to which sources add what is linear in B."""
    added = form.sources * form.transform_size * (1 - form.kept / 50)
    return 1.0 + -(-form.kept // 5) + added


class Stopwatch:
    """Stands for `layer_latencies`: notes what is measured."""

    def __init__(self, time=steps):
        self.time = time
        self.measured: list[Form] = []

    def __call__(self, conv, input_size, forms, *, batch):
        self.measured += forms
        return [batch * self.time(form) for form in forms]


@pytest.fixture
def stopwatch(monkeypatch):
    watch = Stopwatch()
    monkeypatch.setattr(latency_table, "layer_latencies", watch)
    return watch


def entries(path: Path) -> dict[str, dict[str, float]]:
    """All entries of a table that knows one machine, by layer and form."""
    (layers,) = json.loads(path.read_text())["milliseconds"].values()
    return layers


@settings(deadline=None)
@given(
    base=st.dictionaries(st.integers(1, 60), st.floats(0.01, 100), min_size=1),
    added=st.dictionaries(
        st.integers(2, 8), st.tuples(st.floats(0, 5), st.floats(0, 0.1)), max_size=3
    ),
    size=st.sampled_from([1, 3]),
)
def test_steps_in_kept_are_measured_and_what_sources_add_is_interpolated(
    tmp_path_factory, base, added, size
):
    def time(form):
        if form.sources == 0:
            return 7.0
        at_least, slope = added.get(form.sources, (0.0, 0.0))
        return base[form.kept] + at_least + slope * form.kept

    path = tmp_path_factory.mktemp("table") / "latency.json"
    forms = [Form(64), *(Form(kept, s, size) for s in (1, *added) for kept in base)]
    watch = Stopwatch(time)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency_table, "layer_latencies", watch)
        estimates = LatencyTable(path).estimate(nn.Conv2d(8, 64, 3), (9, 9), forms)
    assert estimates == pytest.approx([time(form) for form in forms])
    assert len(set(watch.measured)) == len(watch.measured)
    assert len(watch.measured) <= 1 + len(base) + GRID * len(added)


@settings(deadline=None)
@given(noise=st.lists(st.floats(0.1, 10), min_size=len(FORMS), max_size=len(FORMS)))
def test_noise_makes_no_form_faster_than_its_like_with_fewer_sources(tmp_path_factory, noise):
    times = dict(zip(FORMS, noise, strict=True))
    path = tmp_path_factory.mktemp("table") / "latency.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency_table, "layer_latencies", Stopwatch(times.__getitem__))
        estimates = dict(zip(FORMS, LatencyTable(path).estimate(CONV, (9, 9), FORMS), strict=True))
    assert all(
        ms >= estimates[Form(form.kept, min(form.sources, 1), form.transform_size)]
        for form, ms in estimates.items()
        if form.sources
    )


def test_what_is_in_the_table_is_not_measured_again(stopwatch, tmp_path):
    path = tmp_path / "new" / "folder" / "latency.json"
    first = LatencyTable(path).estimate(CONV, (9, 9), FORMS)
    assert stopwatch.measured
    stopwatch.measured.clear()
    again = nn.Conv2d(8, 16, 3, padding=1, bias=False)  # another layer of the same shape
    assert LatencyTable(path).estimate(again, (9, 9), FORMS) == first
    assert stopwatch.measured == []
    LatencyTable(path).estimate(CONV, (9, 9), [*FORMS, Form(3, 1, 3)])
    assert stopwatch.measured == [Form(3, 1, 3)]


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(9, 16, 3, padding=1),
        nn.Conv2d(8, 17, 3, padding=1),
        nn.Conv2d(8, 16, 1, padding=1),
        nn.Conv2d(8, 16, 3, padding=0),
        nn.Conv2d(8, 16, 3, padding=1, stride=2),
        nn.Conv2d(8, 16, 3, padding=1, dilation=2),
        nn.Conv2d(8, 16, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(8, 16, 3, padding=1, dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_other_layers_are_measured_for_themselves(stopwatch, tmp_path, conv):
    table = LatencyTable(tmp_path / "latency.json")
    forms = [Form(4, 1, 3)]
    table.estimate(CONV, (9, 9), forms)
    table.estimate(conv, (9, 9), forms)
    assert stopwatch.measured == forms * 2


@pytest.mark.parametrize("what", ["size", "batch", "threads", "processor", "torch", "extension"])
def test_other_circumstances_are_measured_for_themselves(stopwatch, tmp_path, monkeypatch, what):
    path, forms = tmp_path / "latency.json", [Form(4, 1, 3)]
    LatencyTable(path).estimate(CONV, (9, 9), forms)
    size, batch = (9, 9), 1
    if what == "size":
        size = (9, 10)
    elif what == "batch":
        batch = 2
    elif what == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    elif what == "processor":
        monkeypatch.setattr(latency_table, "_cpu_name", lambda: "Difference Engine")
    elif what == "torch":
        monkeypatch.setattr(torch, "__version__", "99.0")
    else:
        monkeypatch.setattr(latency_table, "_extension_digest", lambda: "0123456789ab")
    LatencyTable(path, batch=batch).estimate(CONV, size, forms)
    assert stopwatch.measured == forms * 2


def test_a_person_can_read_the_file(stopwatch, tmp_path):
    path = tmp_path / "latency.json"
    LatencyTable(path, batch=2).estimate(CONV, (9, 10), [Form(16), Form(4, 1, 3)])
    (machine,) = json.loads(path.read_text())["milliseconds"]
    assert re.search(
        rf", {torch.get_num_threads()} threads, torch {re.escape(torch.__version__)}, "
        r"extension [0-9a-f]{12}, float32, channels_last$",
        machine,
    )
    assert entries(path) == {
        "2 x 8 x 9 x 10 -> 16, kernel (3, 3), stride (1, 1), padding (1, 1) zeros, dilation (1, 1),"
        " groups 1": {"dense": 2 * steps(Form(16)), "B=4 S=1 m=3": 2 * steps(Form(4, 1, 3))}
    }


def test_several_writers_lose_nothing_of_each_other(stopwatch, tmp_path):
    path = tmp_path / "latency.json"
    widths = range(1, 41)

    def work(width):
        return LatencyTable(path).estimate(nn.Conv2d(width, 16, 3), (9, 9), FORMS)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, widths))
    assert all(result == results[0] for result in results)
    assert len(entries(path)) == len(widths)
    assert {len(forms) for forms in entries(path).values()} == {1 + 12 + 2 * GRID}


def test_a_write_that_is_cut_leaves_the_old_file(stopwatch, tmp_path, monkeypatch):
    path = tmp_path / "latency.json"
    LatencyTable(path).estimate(CONV, (9, 9), FORMS[:1])
    before = path.read_bytes()

    def full(self, text):
        self.write_bytes(text.encode()[:9])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"latency.json cannot be written: No space left on"):
        LatencyTable(path).estimate(CONV, (9, 9), FORMS)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b'{"format": 1, "milliseconds": {"m": {"l": {"dense": 1.0',
        b'{"format": 2, "milliseconds": {}}',
        b'{"format": 1, "milliseconds": {}, "more": 1}',
        b'{"format": 1, "milliseconds": {"m": {"l": {"dense": -1.0}}}}',
        b'{"format": 1, "milliseconds": {"m": {"l": {"dense": "fast"}}}}',
        b'{"format": 1, "milliseconds": {"m": {"l": {"dense": NaN}}}}',
        b'{"format": 1, "milliseconds": {"m": {"l": [1]}}}',
    ],
)
def test_a_damaged_file_is_named_and_how_to_mend_it(stopwatch, tmp_path, content):
    path = tmp_path / "latency.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        LatencyTable(path).estimate(CONV, (9, 9), FORMS)
    assert str(error.value).startswith(f"latency table {path} is damaged (")
    assert "delete it" in str(error.value)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == content
    assert stopwatch.measured == []


def test_a_place_that_holds_no_file_is_refused(stopwatch, tmp_path):
    with pytest.raises(UserError, match=r"cannot be read: Is a directory"):
        LatencyTable(tmp_path).estimate(CONV, (9, 9), FORMS)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be read: Not a directory"):
        LatencyTable(tmp_path / "file" / "latency.json").estimate(CONV, (9, 9), FORMS)


@pytest.mark.parametrize(
    ("cache", "place"),
    [
        ("/var/cache/me", "/var/cache/me"),
        ("relative/cache", "/home/me/.cache"),
        ("", "/home/me/.cache"),
        (None, "/home/me/.cache"),
    ],
)
def test_the_table_is_in_the_users_cache_folder(monkeypatch, cache, place):
    monkeypatch.setenv("HOME", "/home/me")
    if cache is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
    assert default_path() == Path(place) / "sbf-dist" / "latency.json"
    assert LatencyTable().path == default_path()
