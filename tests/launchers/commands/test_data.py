import re
from pathlib import Path

import pytest
from archive_makers import cifar10_python, imagenet

from launchers.commands.data import _Progress
from launchers.commands.run import check_models
from launchers.display import Display
from pipelines.sources.preparation import _ARCHIVES
from sbf_dist import recipe as recipes

RECIPES = Path(__file__).parents[3] / "recipes"
OF_SETS = {
    "cifar10-resnet56": "cifar10",
    "cifar10-vgg16": "cifar10",
    "cifar100-resnet56": "cifar100",
    "tiny-imagenet-resnet18": "tiny-imagenet",
    "ilsvrc-resnet50": "imagenet",
    "ilsvrc-resnet50-300": "imagenet",
    "ilsvrc-resnet50-10percent": "imagenet",
}


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archives")
    cifar10_python(folder)
    imagenet(folder)
    return folder


def test_a_set_is_prepared_checked_and_divided(sbf, archives, tmp_path):
    out = tmp_path / "cifar10"
    order = ("data", "prepare", "cifar10", "--archives", archives, "--out", out, "--no-checksum")
    code, output, _ = sbf(*order)
    assert code == 0
    assert f"{out}: cifar10, 10 classes, 50 images in train, 10 in val\n" in output
    code, output, _ = sbf(*order)
    assert code == 0
    assert output.endswith("10 in val; prepared before\n")
    code, output, _ = sbf("data", "check", out)
    assert code == 0
    assert output.endswith(f"{out}: 60 files are unchanged\n")
    split = tmp_path / "split.txt"
    code, output, _ = sbf("data", "split", out, "--labelled", "0.4", "--out", split)
    assert code == 0
    assert output == f"{split}: 20 of 50 training images, 10 classes\n"
    few = tmp_path / "few.txt"
    assert sbf("data", "split", out, "--labelled", "1", "--seed", "0", "--out", few)[0] == 0
    lines = split.read_text().splitlines()
    assert lines[0] == "# labelled images: 0.4 per class, seed 0"
    assert set(few.read_text().splitlines()[1:]) < set(lines[1:])
    assert all((out / name).is_file() for name in lines[1:])


def test_a_damaged_set_is_reported_file_by_file_and_in_one_line(sbf, archives, tmp_path):
    out = tmp_path / "imagenet"
    order = ("--archives", archives, "--out", out, "--no-checksum", "--format", "webdataset")
    assert sbf("data", "prepare", "imagenet", *order)[0] == 0
    (out / "val-000000.tar").unlink()
    (out / "train-000000.idx").write_text("v1.2 0\n")
    (out / "more.txt").write_text("")
    code, output, error = sbf("data", "check", out)
    assert code == 2
    for line in (
        "missing  val-000000.tar",
        "changed  train-000000.idx",
        "superfluous  more.txt",
    ):
        assert line in output.splitlines()
    assert error == (
        f"sbf: data {out}: 1 missing, 1 changed, 1 superfluous of 4 files; remove the folder and "
        "prepare the set again\n"
    )


def test_mistakes_are_one_line_and_leave_nothing(sbf, archives, tmp_path):
    out, write = tmp_path / "out", tmp_path / "list.txt"
    prepare = ("data", "prepare")
    both = ("--archives", archives, "--out", out)
    for arguments, message in (
        ((*prepare, "cifar10", *both), "is not the published c58f30108f718f92721af3b95e74349a"),
        ((*prepare, "cifar100", *both), "cifar-100-python.tar.gz: is missing; put cifar-100-pyth"),
        ((*prepare, "mnist", *both), "'mnist'"),
        ((*prepare, "cifar10", *both, "--format", "zip"), "'zip'"),
        ((*prepare, "cifar10", *both, "--seed", "-1"), "'--seed'"),
        (("data", "check", tmp_path), "has no manifest.json"),
        (("data", "split", archives, "--labelled", "1", "--out", write), "has no class folders"),
        (("data", "split", archives, "--labelled", "1", "--out", out), "is a folder; name a file"),
    ):
        code, _, error = sbf(*arguments)
        assert code == 2
        assert error.startswith("sbf: ")
        assert error.count("\n") == 1
        assert message in error
    assert {path.parts[len(out.parts)] for path in out.rglob("*")} <= {".preparing"}
    assert not write.exists()


@pytest.mark.parametrize("labelled", ["x", "0", "1.5", "6"])
def test_a_number_of_labels_that_is_impossible_is_reported(sbf, tmp_path, labelled):
    write = tmp_path / "split.txt"
    for name in ("ant", "bee"):
        (tmp_path / "root" / name).mkdir(parents=True)
        for k in range(5):
            (tmp_path / "root" / name / f"{k}.png").write_bytes(b"")
    code, _, error = sbf("data", "split", tmp_path / "root", "--labelled", labelled, "--out", write)
    assert code == 2
    assert error.count("\n") == 1
    assert labelled in error
    assert not write.exists()


def test_help_says_of_every_set_which_archives_it_needs(sbf, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, output, error = sbf("data", "prepare", "--help")
    assert (code, error) == (0, "")
    assert max(map(len, output.splitlines())) <= 80
    table = output[: output.index("For example")]
    for name, needed in _ARCHIVES.items():
        lines = table[table.index(f"  {name} ") :]
        for archive in (archive for alternatives in needed for archive in alternatives):
            assert archive.name in lines
    assert re.search(r"^ +sbf data prepare cifar10 --archives \S+ --out \S+$", output, re.MULTILINE)


def test_progress_says_rate_and_time_left_in_plain_lines(capsys, monkeypatch):
    now = 100.0
    monkeypatch.setattr("launchers.commands.data.time.monotonic", lambda: now)
    display = Display()
    progress = _Progress(display)
    progress("images", 50, 1000, "images")
    now = 110.0
    progress("images", 550, 1000, "images")
    assert capsys.readouterr().out == "  images: 550/1000  50 images/s  9 s left\n"


def test_recipes_that_are_shipped_are_valid_without_the_data(tmp_path, monkeypatch):
    shipped = [path for path in RECIPES.glob("*.yaml") if not path.stem.startswith("compare-")]
    assert {path.stem for path in shipped} >= OF_SETS.keys()
    monkeypatch.chdir(tmp_path)
    for path in shipped:
        recipe = recipes.load(path)
        check_models(recipe)
        assert recipe.data.expected == OF_SETS.get(path.stem)
    assert list(tmp_path.iterdir()) == []


# One of each kind of networks; an estimate takes seconds.
@pytest.mark.parametrize("name", ["cifar10-vgg16", "folder", "ilsvrc-resnet50"])
def test_recipes_that_are_shipped_are_described_without_the_data(sbf, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    code, output, error = sbf("run", RECIPES / f"{name}.yaml", "--dry-run")
    assert (code, error) == (0, "")
    assert f"recipe {name} is valid" in output
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_its_set_says_so_before_it_begins(sbf, tmp_path, monkeypatch):
    path = RECIPES / "cifar10-resnet56.yaml"
    monkeypatch.chdir(tmp_path)
    code, _, error = sbf("run", path)
    assert code == 2
    assert error == f"sbf: data {tmp_path}/data/cifar10: is not a folder\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [("split", "."), ("prepare", "imagenet", "--archives", ".")])
def test_a_seed_that_has_more_bits_than_its_generator_is_refused(sbf, words):
    labelled = ("--labelled", "1") if words[0] == "split" else ()
    code, out, err = sbf("data", *words, *labelled, "--out", "x", "--seed", 2**63)
    assert (code, out) == (2, "")
    assert "--seed" in err
    assert "9223372036854775807" in err.replace(",", "")
