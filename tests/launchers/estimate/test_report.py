import io
from pathlib import Path

import pytest
from rich.console import Console

from launchers.display import Display
from launchers.estimate.report import describe, images_of_known_set
from launchers.run.folder import RunFolder
from sbf_dist import recipe as recipes
from sbf_dist.errors import UserError

RECIPES = Path(__file__).parents[3] / "recipes"


def printed(recipe: str, *overrides: str, machine="p5.48xlarge", price=None, runs=Path()) -> str:
    loaded = recipes.load(RECIPES / recipe, overrides)
    text = io.StringIO()
    display = Display(Console(file=text, width=100))
    describe(loaded, RunFolder(runs, loaded.name), machine, price, display)
    return text.getvalue()


def test_an_ilsvrc_recipe_is_described_with_memory_and_hours(tmp_path):
    text = printed("ilsvrc-resnet50.yaml", price=20.0, runs=tmp_path)
    assert "recipe ilsvrc-resnet50 is valid" in text
    row = next(line for line in text.splitlines() if line.startswith("resnet50 "))
    assert row.split()[1:5] == ["4.089", "25.56", "112,603", "1,024"]
    student = next(line for line in text.splitlines() if line.startswith("sbf-distilled"))
    assert float(student.split()[1]) == pytest.approx(4.089 / 2, rel=0.01)
    assert "activations" in text
    hours = {line.split()[0]: line.split() for line in text.splitlines() if line[:1].isdigit()}
    assert list(hours) == ["8", "16", "64", "256", "512"]
    assert float(hours["16"][2]) < float(hours["8"][2])
    assert "USD" in text


def test_without_gpus_hours_are_not_estimated(tmp_path):
    text = printed("digits.yaml", runs=tmp_path)
    assert "MB" in text
    assert "this recipe has workers.gpus = 0" in text


def test_an_unknown_kind_of_machine_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"--machine abacus is not known; p5.48xlarge, .* are"):
        printed("digits.yaml", machine="abacus", runs=tmp_path)


def test_images_of_known_sets_are_counted_without_them():
    def images(*overrides: str) -> dict[str, int] | None:
        loaded = recipes.load(RECIPES / "ilsvrc-resnet50.yaml", overrides)
        return images_of_known_set(loaded.data)

    assert images() == {"labelled": 1_281_167, "unlabelled": 0}
    assert images("data.labelled_per_class=0.1") == {"labelled": 128_117, "unlabelled": 1_153_050}
    assert images("data.labelled_per_class=10") == {"labelled": 10_000, "unlabelled": 1_271_167}
    assert images("data.split=list.txt") is None


def test_classes_are_counted_in_a_folder_that_is_there(tmp_path):
    images = tmp_path / "photos"
    for kind in ("cat", "dog", "owl"):
        (images / kind).mkdir(parents=True)
        for number in range(5):
            (images / kind / f"{number}.jpg").write_bytes(b"not read")
    root = f"data.root={images}"
    known = printed("folder-laptop.yaml", root, runs=tmp_path)
    assert "the number of classes is not known yet" not in known
    parameters = float(next(x for x in known.splitlines() if x.startswith("resnet18")).split()[2])
    assert parameters == pytest.approx(11.18, abs=0.005)  # 11.69 with 1,000 classes
    with pytest.raises(UserError, match=r"has one class only, 'x'"):
        (tmp_path / "one" / "x").mkdir(parents=True)
        for number in range(5):
            (tmp_path / "one" / "x" / f"{number}.jpg").write_bytes(b"not read")
        printed("folder-laptop.yaml", f"data.root={tmp_path / 'one'}", runs=tmp_path)


def test_of_a_range_of_workers_the_largest_that_divides_the_batches_is_described(tmp_path):
    text = printed("digits.yaml", "workers.count=[1, 7]", runs=tmp_path)
    assert "Memory of one of 4 workers" in text


def test_teachers_that_are_given_are_predicted_with_and_compressed(tmp_path):
    given = "teachers=[{name: resnet50, model: 'timm:resnet50', weights: w.safetensors}]"
    text = printed("ilsvrc-resnet50.yaml", given, runs=tmp_path)
    assert "\nresnet50 " not in text
    row = next(line for line in text.splitlines() if line.startswith("8 "))
    assert float(row.split()[2]) > 0.5


def test_live_teachers_are_in_the_memory_and_stored_ones_are_not(tmp_path):
    def teachers(*overrides: str) -> float:
        text = printed("digits.yaml", *overrides, runs=tmp_path)
        row = next(line for line in text.splitlines() if line.startswith("teachers"))
        (header,) = (line.split() for line in text.splitlines() if line.startswith("MB"))
        return float(row.split()[header.index("sbf-distilled")])

    assert teachers("distill.targets=live") > 1
    assert teachers("distill.targets=stored") == 0
    assert teachers("distill.targets=auto") == teachers("distill.targets=live")


def test_what_the_teachers_are_asked_is_chosen_as_in_the_run(tmp_path):
    assert "live teachers: live predictions cost" in printed("digits.yaml", runs=tmp_path)
    deep = "teachers.1.model=cifar_resnet110"
    assert "sbf-distilled: stored teachers: live predictions cost" in printed(
        "digits.yaml", deep, runs=tmp_path
    )
    said = printed("digits.yaml", deep, "workers.gpus=1", runs=tmp_path)
    assert "sbf-distilled: live teachers: with live predictions the training takes" in said
    assert "teachers:" not in printed("digits.yaml", "distill.targets=live", runs=tmp_path)
