import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbf_dist.compression.plan import DenseLayer, Latency, Plan, Removed, SBFLayer
from sbf_dist.errors import UserError


def sbf_layer(**changes):
    return SBFLayer(
        **(
            {
                "channels": 4,
                "kept": [0, 2],
                "sources": [[0, 2], [2, 0]],
                "transform_size": 3,
                "macs_before": 100,
                "macs_after": 60,
                "error": 0.125,
                "reason": "test",
            }
            | changes
        )
    )


def plan(layers):
    return Plan(
        model="cifar_resnet8",
        classes=10,
        input_shape=(3, 32, 32),
        budget={"macs": 0.5},
        macs_before=200,
        macs_after=160,
        params_before=20,
        params_after=16,
        layers=layers,
    )


@st.composite
def layers(draw):
    channels = draw(st.integers(1, 9))
    kept = sorted(draw(st.sets(st.integers(0, channels - 1), min_size=1)))
    count = draw(st.integers(1, 3))
    rows = [
        [draw(st.sampled_from(kept)) for _ in range(count)] for _ in range(channels - len(kept))
    ]
    return sbf_layer(
        channels=channels,
        kept=kept,
        sources=rows,
        transform_size=draw(st.sampled_from([1, 3, 5])),
        error=draw(st.floats(0, 1)),
        reason=draw(st.text(max_size=9) | st.text("[1, ]\n", max_size=9)),
    )


@settings(deadline=None)
@given(st.dictionaries(st.text("abc.01", min_size=1), layers(), max_size=3))
def test_a_saved_and_loaded_plan_is_the_same(tmp_path_factory, made):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    before = plan({**made, "stem": DenseLayer(reason="the stem", macs=40, convertible=False)})
    before.save(path)
    after = Plan.load(path)
    assert after == before
    assert list(after.layers) == list(before.layers)
    assert after.digest() == before.digest()


def test_a_person_can_read_and_edit_the_file(tmp_path: Path):
    path = tmp_path / "plan.json"
    made = plan({"conv": sbf_layer()})
    made.save(path)
    text = path.read_text()
    assert '"kept": [ 0, 2 ],\n' in text
    assert "        [ 2, 0 ]\n" in text
    path.write_text(text.replace("[ 0, 2 ],\n        [ 2, 0 ]", "[ 2, 0 ],\n        [ 2, 0 ]"))
    edited = Plan.load(path)
    assert edited.layers["conv"].sources == [[2, 0], [2, 0]]
    assert edited.digest() != made.digest()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kept": [2, 0]}, "kept must be ascending channels out of 4"),
        ({"kept": [0, 0]}, "kept must be ascending"),
        ({"kept": [0, 4]}, "kept must be ascending channels out of 4"),
        ({"kept": [-1, 2]}, "kept must be ascending"),
        ({"kept": []}, "kept must be ascending"),
        ({"sources": [[0, 2]]}, "sources has 1 rows for 2 rebuilt channels"),
        ({"sources": [[0], [0, 2]]}, "equally many sources"),
        ({"sources": [[], []]}, "a rebuilt channel must have a source"),
        ({"sources": [[1, 0], [0, 2]]}, "a source must be a kept channel"),
        ({"transform_size": 2}, "transform_size = 2 must be odd"),
        ({"transform_size": -1}, "transform_size = -1 must be odd"),
        ({"channels": 0}, "channels: .*greater than 0"),
        ({"kepd": [1]}, "kepd: Extra inputs are not permitted"),
        ({"error": None}, "error: .*number"),
    ],
)
def test_an_edit_that_makes_no_layer_is_refused_in_one_line_that_names_it(
    tmp_path: Path, changes, message
):
    path = tmp_path / "plan.json"
    content = json.loads(plan({"stages.0.dense": sbf_layer()}).model_dump_json())
    content["layers"]["stages.0.dense"] |= changes
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        Plan.load(path)
    assert str(error.value).startswith(f"plan {path}: layers.stages.0.dense")
    assert "\n" not in str(error.value)


def test_a_layer_rebuilt_from_its_whole_basis_is_one_word_in_the_file(tmp_path: Path):
    layer = sbf_layer(sources=[[0, 2], [0, 2]])
    plan({"body": layer}).save(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["layers"]["body"]["sources"] == "all"
    assert Plan.load(tmp_path / "plan.json").layers["body"] == layer
    without = plan({"body": sbf_layer(kept=[0, 1, 2, 3], sources=[])})
    assert json.loads(without.model_dump_json())["layers"]["body"]["sources"] == []


@pytest.mark.parametrize("changes", [{"kept": "all"}, {"kept": [0, 9]}, {"channels": "four"}])
def test_the_whole_basis_of_a_layer_that_is_none_is_refused(tmp_path: Path, changes):
    content = json.loads(plan({"body": sbf_layer()}).model_dump_json())
    content["layers"]["body"] |= {"sources": "all"} | changes
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"layers\.body") as error:
        Plan.load(tmp_path / "plan.json")
    assert "\n" not in str(error.value)


def test_a_layer_that_is_called_like_a_kind_is_named(tmp_path: Path):
    content = json.loads(plan({"dense": sbf_layer()}).model_dump_json())
    content["layers"]["dense"]["kept"] = "all"
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"layers\.dense\.kept: "):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not json", "file: Invalid JSON"),
        (b"\xff\xfe", "is not a plan"),
        (b"{}", "model: Field required"),
        (b"[]", "file: "),
    ],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, content, message):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        Plan.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_plan_that_is_missing_or_a_folder_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        Plan.load(tmp_path / "plan.json")
    with pytest.raises(UserError, match="is not a plan"):
        Plan.load(tmp_path)


def test_a_plan_of_another_format_is_refused(tmp_path: Path):
    content = json.loads(plan({}).model_dump_json()) | {"format": 3}
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="format: Input should be 1 or 2"):
        Plan.load(tmp_path / "plan.json")


def timed_plan():
    made = plan(
        {
            "conv": sbf_layer(ms_before=0.5, ms_after=0.25),
            "stem": DenseLayer(reason="the stem", macs=40, convertible=False, ms=0.1),
        }
    )
    times = Latency(machine="a machine, 2 threads", batch=1, ms_before=1.234, ms_after=0.617)
    return made.model_copy(update={"budget": {"latency": 0.5}, "latency": times})


def test_times_are_kept_where_they_were_measured_and_not_mentioned_elsewhere(tmp_path: Path):
    path = tmp_path / "plan.json"
    timed_plan().save(path)
    assert Plan.load(path) == timed_plan()
    assert Plan.load(path).digest() == timed_plan().digest()
    plan({"conv": sbf_layer(), "stem": DenseLayer(reason="x", macs=4, convertible=True)}).save(path)
    assert '"ms' not in path.read_text()
    assert "latency" not in path.read_text()
    assert "null" not in path.read_text()


def test_plans_from_before_times_were_measured_keep_their_digest(tmp_path: Path):
    # Of a student that was exported then; load_student compares it.
    digest = "203142748c3a507457b15af622790748920182b37880e74cd86645d91f3073a7"
    old = plan({"conv": sbf_layer()}).model_copy(update={"format": 1})
    assert old.digest() == digest
    path = tmp_path / "plan.json"
    old.save(path)
    assert "removed" not in path.read_text()
    assert Plan.load(path).digest() == digest


def removing(**changes):
    """A plan that removes channels of conv and of what reads it."""
    removed = {
        "conv": Removed(out=[1, 3], inp=[]),
        "norm": Removed(out=[1, 3]),
        "head": Removed(inp=[1, 3]),
    }
    described = {"criterion": "fisher", "explanation": ["half of the saving comes from removal"]}
    return plan({"conv": sbf_layer()}).model_copy(
        update={"removed": removed, **described, **changes}
    )


def test_removals_are_saved_loaded_and_part_of_the_digest(tmp_path: Path):
    path = tmp_path / "plan.json"
    removing().save(path)
    assert '"conv": {\n      "out": [ 1, 3 ],\n' in path.read_text()
    assert Plan.load(path) == removing()
    assert Plan.load(path).digest() == removing().digest() != plan({"conv": sbf_layer()}).digest()
    path.write_text(path.read_text().replace("[ 1, 3 ]", "[ 1, 2 ]"))
    assert Plan.load(path).removed["head"].inp == [1, 2]


def test_the_summary_counts_removed_channels_of_convolutions_once():
    assert removing().summary().endswith("M multiply-adds, 2 channels removed")


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ({"conv": {"out": [3, 1]}}, r"removed\.conv: .*out must be channels, ascending, each once"),
        ({"conv": {"inp": [1, 1]}}, r"removed\.conv: .*inp must be channels, ascending, each once"),
        ({"conv": {"out": [-1]}}, r"removed\.conv: .*out must be channels"),
        ({"conv": {}}, r"removed\.conv: .*out or inp must name a channel"),
        ({"conv": {"out": ["a"]}}, r"removed\.conv\.out\.0: .*integer"),
        ({"conv": {"outs": [1]}}, r"removed\.conv\.outs: Extra inputs are not permitted"),
    ],
)
def test_a_removal_that_was_edited_wrongly_is_refused_in_one_line(tmp_path: Path, removed, message):
    path = tmp_path / "plan.json"
    content = json.loads(removing().model_dump_json()) | {"removed": removed}
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        Plan.load(path)
    assert "\n" not in str(error.value)


def test_format_1_cannot_remove(tmp_path: Path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(json.loads(removing().model_dump_json()) | {"format": 1}))
    with pytest.raises(UserError, match="a plan of format 1 has no criterion"):
        Plan.load(path)


def test_the_summary_tells_what_was_saved():
    dense = DenseLayer(reason="the stem", macs=40, convertible=False)
    of_macs = plan({"conv": sbf_layer(), "stem": dense}).model_copy(
        update={"macs_before": 10_410_000, "macs_after": 5_210_000}
    )
    expected = "1 of 2 convolutions converted, 10.41 → 5.21 M multiply-adds"
    assert of_macs.summary() == expected
    of_time = of_macs.model_copy(update={"latency": timed_plan().latency})
    assert of_time.summary() == f"{expected}, 1.23 → 0.62 ms"
