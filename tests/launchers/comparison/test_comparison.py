"""A whole comparison, as small as one can be, and what is made of its results."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from launchers.commands.compare import command
from launchers.comparison.shared_batches import SharedBatches
from launchers.comparison.statistics import comparison_table, summarise
from launchers.comparison.summary import compare
from launchers.comparison.trials import trials
from launchers.display import Display
from sbf_dist.compare_recipe import Comparison
from sbf_dist.errors import UserError

SMALL = {
    "name": "small",
    "seeds": [3],
    "model": "cifar_resnet8_w8",
    "methods": ["magnitude", "sbf"],
    "macs": [0.5],
    "images": 64,
    "data": {"source": "digits", "labelled_per_class": 10, "image_size": 12, "crop": 1.0},
    "dense": {"steps": 12},
    "recovery": {"steps": [2, 5], "batch_size": 16, "optimizer": {"lr": 0.02, "clip": 5.0}},
}


def recipe(**changes) -> Comparison:
    return Comparison.model_validate(SMALL | changes)


def quiet() -> Display:
    return Display(Console(quiet=True))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    compare(recipe(), runs, quiet())
    return runs


def test_every_method_is_measured_at_its_cost_after_every_training(runs):
    rows = json.loads((runs / "small" / "comparison.json").read_text())["rows"]
    assert [(row["method"], row["trained_steps"]) for row in rows] == [
        (method, steps) for method in ("dense", "magnitude", "sbf") for steps in (0, 2, 5)
    ]
    for row in rows:
        assert 0 <= row["top1_mean"] <= 1
        assert row["top1_std"] == 0.0
        target = 1.0 if row["method"] == "dense" else 0.5
        assert target - 0.03 <= row["reached"] <= target
    with Image.open(runs / "small" / "comparison.png") as picture:
        assert min(picture.size) > 300


def test_what_is_done_is_not_done_again_and_what_is_added_is_done(runs):
    folder = runs / "small"
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("seed-*")}
    output = Console(record=True, width=120)
    rows = compare(recipe(), runs, Display(output))["rows"]
    assert "dense network" not in output.export_text()
    more = compare(recipe(methods=["magnitude", "sbf", "ghost"]), runs, quiet())["rows"]
    assert more[: len(rows)] == rows
    assert [row["method"] for row in more[len(rows) :]] == ["ghost"] * 3
    results = [p for p in before if p.suffix]
    assert {p: p.stat().st_mtime_ns for p in results} == {p: before[p] for p in results}


def test_a_trial_whose_result_is_damaged_is_done_anew(runs):
    path = next((runs / "small" / "results").rglob("magnitude*.json"))
    before = json.loads(path.read_text())
    path.write_text("")
    output = Console(record=True, width=300)
    compare(recipe(), runs, Display(output))
    text = output.export_text()
    assert f"warning: {path} is damaged: " in text
    assert "the trial is done anew" in text
    assert json.loads(path.read_text())["top1"] == before["top1"]


def test_the_same_comparison_gives_the_same_figures(runs, tmp_path):
    again = compare(recipe(methods=["sbf"]), tmp_path, quiet())["rows"]
    first = json.loads((runs / "small" / "comparison.json").read_text())["rows"]
    by_key = {(row["method"], row["trained_steps"]): row["top1_mean"] for row in first}
    for row in again:
        # Threads may add in another order: a picture in a hundred may fall to another side.
        expected = by_key[row["method"], row["trained_steps"]]
        assert row["top1_mean"] == pytest.approx(expected, abs=0.05)


def test_the_command_shows_the_table_and_says_where_things_are(runs, tmp_path, capsys):
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(SMALL))  # JSON is YAML
    threads = torch.get_num_threads()
    try:
        command(path, ["methods=[sbf]"], runs)
    finally:
        torch.set_num_threads(threads)
    output = capsys.readouterr().out
    assert "SBF" in output
    assert "top-1 %" in output
    assert str(runs / "small") in output.replace("\n", "")


def test_a_folder_of_other_settings_is_refused(runs):
    with pytest.raises(UserError, match=r"was written with model = 'cifar_resnet8_w8', the recipe"):
        compare(recipe(model="cifar_resnet14"), runs, quiet())


def test_the_folder_of_a_run_is_refused(tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "recipe.json").write_text('{"distill": {}}')
    with pytest.raises(UserError, match=r"holds a run \(sbf run\); give another name"):
        compare(recipe(), tmp_path, quiet())


def test_an_unknown_model_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UserError, match="model 'cifar_resnet9'"):
        compare(recipe(model="cifar_resnet9"), tmp_path, quiet())
    assert list(tmp_path.iterdir()) == []


def result(method: str, seed: int, *top1: float, macs: float = 0.5) -> dict:
    return {
        "method": method,
        "macs": macs,
        "seed": seed,
        "refused": None,
        "reached": macs - 0.01 * seed,
        "top1": dict(zip(("0", "60"), top1, strict=True)),
        "agreement": {"0": 0.75 + 0.01 * seed, "60": 0.9},
        "kl": {"0": 0.25, "60": 0.1},
    }


def test_seeds_become_means_and_deviations():
    rows = summarise([result("sbf", 0, 0.5, 0.8), result("sbf", 1, 0.7, 0.9)])
    assert [row["trained_steps"] for row in rows] == [0, 60]
    assert rows[0]["top1_mean"] == pytest.approx(0.6)
    assert rows[0]["top1_std"] == pytest.approx(0.1414, abs=1e-4)
    assert rows[0]["reached"] == pytest.approx(0.495)
    assert {row["seeds"] for row in rows} == {2}
    assert rows[0]["agreement_mean"] == pytest.approx(0.755)
    assert rows[1]["kl_mean"] == pytest.approx(0.1)


def test_results_of_a_version_that_did_not_compare_with_the_dense_network_are_shown():
    old = {k: v for k, v in result("sbf", 0, 0.5, 0.8).items() if k not in ("agreement", "kl")}
    (before, _) = rows = summarise([old])
    assert not before.keys() & {"agreement_mean", "kl_mean"}
    assert len(comparison_table(rows).rows) == 1


def test_the_table_shows_figures_with_deviations_and_who_could_not_get_there():
    refused = {"method": "ghost", "macs": 0.5, "seed": 0, "refused": "too small"}
    rows = summarise(
        [result("sbf", 0, 0.5, 0.8), result("sbf", 1, 0.7, 0.9), refused, refused | {"seed": 1}]
    )
    console = Console(record=True, width=100, quiet=True)
    console.print(comparison_table(rows))
    text = Console(record=True, width=100)
    with text.capture() as shown:
        text.print(comparison_table(rows))
    lines = shown.get().splitlines()
    (ours,) = [line for line in lines if "SBF" in line]
    assert "60.0 ± 14.1" in ours
    assert "85.0 ± 7.1" in ours
    assert "49.5" in ours
    assert "75.5" in ours and "0.250" in ours, "agreement and KL before training"
    (theirs,) = [line for line in lines if "Ghost" in line]
    assert theirs.count("—") == 4


def test_trials_are_all_pairs_of_each_seed_with_the_dense_network_first():
    found = trials(recipe(seeds=[0, 1], macs=[0.5, 0.25]))
    assert len(found) == 2 * (1 + 2 * 2)
    assert found[0].name == "dense"
    assert [trial.name for trial in found[1:5]] == [
        "magnitude-0.5",
        "sbf-0.5",
        "magnitude-0.25",
        "sbf-0.25",
    ]


class Counted:
    """A deterministic stream that knows how often it was begun."""

    def __init__(self) -> None:
        self.begun = 0

    def __call__(self):
        self.begun += 1
        generator = torch.Generator().manual_seed(0)
        while True:
            yield {"image": torch.rand(4, generator=generator)}


@pytest.mark.parametrize(("memory", "begun"), [(1000, 1), (40, 3)])
def test_batches_are_the_same_each_time_and_loaded_once_where_they_fit(memory, begun):
    stream = Counted()
    batches = SharedBatches(stream, 5, memory)
    short = [batch["image"] for _, batch in zip(range(2), batches, strict=False)]
    whole = [batch["image"] for batch in batches]
    again = [batch["image"] for batch in batches]
    assert len(whole) == 5
    assert all(torch.equal(a, b) for a, b in zip(short, whole, strict=False))
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    assert stream.begun == begun + (memory == 1000)
