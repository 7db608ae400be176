"""Input that cannot be used, as a user meets it: one line that names it, exit code 2, no work."""

import fcntl
import io
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from launchers.on_ray.cluster_file import mlflow_of
from launchers.run import execution
from pipelines.inspection import inspect_image
from sbf_dist import models
from sbf_dist.compression.plan import Plan
from sbf_dist.errors import UserError
from sbf_dist.weights import load_weights

RECIPE = """
name: tiny
data: {source: folder, root: photos, validation: 2, image_size: 16}
teachers: [{name: one, model: cifar_resnet8_w4, training: {steps: 10}}]
compress: {teacher: one, macs: 0.5}
distill: {training: {steps: 10}}
"""
COMPARED = """
name: compared
data: {source: folder, root: photos, validation: 2, image_size: 16}
model: cifar_resnet8_w4
dense: {steps: 10}
recovery: {steps: [10]}
"""
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
Sbf = Callable[..., tuple[int, str, str]]


@pytest.fixture
def sbf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sbf: Sbf) -> Sbf:
    """The command line in a user's folder: exit code, stdout, stderr. No run is begun."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(execution, "execute", lambda *_: None)
    Path("tiny.yaml").write_text(RECIPE)
    Path("compared.yaml").write_text(COMPARED)
    Path("file").write_text("a file")
    for name in ("cat", "dog"):
        write_images(Path("photos") / name)

    return sbf


def write_images(folder: Path) -> None:
    folder.mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (20, 20), (10 * number, 0, 0)).save(folder / f"{number}.png")


def assert_refused(answer: tuple[int, str, str], message: str) -> None:
    code, out, err = answer
    assert (code, out) == (2, ""), (out, err)
    assert err.startswith("sbf: ")
    assert err.count("\n") == 1, err
    assert message in err


def test_what_all_others_differ_from_is_right(sbf: Sbf) -> None:
    assert sbf("run", "tiny.yaml") == (0, "", "")
    assert sbf("run", "tiny.yaml", "--dry-run")[0] == 0


@pytest.mark.parametrize(
    "command", [("label", "tiny.yaml"), ("run", "tiny.yaml", "--until", "pseudo-labels")]
)
def test_a_stage_to_repeat_that_the_command_does_not_come_to(
    sbf: Sbf, command: tuple[str, ...]
) -> None:
    assert_refused(
        sbf(*command, "--again", "distill"),
        "--again distill: the command ends at stage pseudo-labels, before it; its results would "
        "be removed and not made again",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RECIPE + "extra: &a [*a]\n", "recipe bad.yaml has an alias of itself in line 7"),
        ("[" * 900 + "]" * 900, "recipe bad.yaml is nested deeper than 32 levels"),
        (BOMB, "recipe bad.yaml has aliases that stand for more than 100000 values"),
        (RECIPE + "name: other\n", "recipe bad.yaml says 'name' a second time in line 7"),
        ("#" * 1_000_001, "recipe bad.yaml is larger than 1000000 bytes"),
        ("\udcff", "recipe bad.yaml is not YAML: 'utf-8' codec can't decode byte 0xff"),
    ],
    ids=["self-reference", "deep", "bomb", "duplicate key", "long", "bytes"],
)
def test_a_text_that_is_no_recipe(sbf: Sbf, text: str, message: str) -> None:
    Path("bad.yaml").write_text(text, errors="surrogateescape")
    assert_refused(sbf("run", "bad.yaml", "--dry-run"), message)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("photos", "recipe photos is not YAML: it is a folder"),
        ("/dev/zero", "recipe /dev/zero is larger than 1000000 bytes"),
        ("x" * 300, "cannot be read: File name too long"),
        ("file/below", "recipe file/below cannot be read: Not a directory"),
    ],
)
def test_a_place_that_holds_no_recipe(sbf: Sbf, place: str, message: str) -> None:
    assert_refused(sbf("run", place), message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"name={'x' * 300}", "name = 'xxx"),
        (f"name={'x' * 300}", "must have at most 100 characters"),
        ("name=data", "name = 'data' must not be a reserved name under runs/"),
        ("name=mlflow.db", "name = 'mlflow.db' must not be a reserved name under"),
        ("name=mlflow.db.lock", "must not be a reserved name under runs/"),
        ("name=MLflow-Artifacts", "must not be a reserved name under runs/"),
        (f"seed={2**64}", f"seed = {2**64} must be less than or equal to {2**63 - 1}"),
        ("data.image_size=100000", "image_size = 100000 must be less than or equal to 4096"),
        ("teachers.0.image_size=100000", "image_size = 100000 must be less than or equal to"),
        ("distill.training.optimizer.betas=[0.9,1.0]", "betas: [0.9, 1.0] must be two numbers in"),
        ("distill.training.optimizer.betas=[-0.1,0.9]", "betas: [-0.1, 0.9] must be two numbers"),
        (
            "distill.training.batch_size=1000000000",
            "distill.training.batch_size = 1000000000 must be at most 1048576",
        ),
        ("compress.latency_batch=1000000", "latency_batch = 1000000 must be less than or eq"),
        (
            "teachers.0.model=cifar_resnet60000002",
            "model 'cifar_resnet60000002': the depth must be 6n + 2 (8, 14, 20, 26, … 1202)",
        ),
        (f"teachers.0.model=cifar_resnet{'2' * 5000}", "the depth must be 6n + 2"),
        ("teachers.0.model=cifar_resnet8_w99999", "the width must be from 1 to 512"),
        (
            "teachers.0.training.freeze=[stage.*]",
            "teachers.0.training.freeze: no parameter matches 'stage.*'; similar are stages",
        ),
        ("teachers.0.training.freeze=['*']", "freeze: ['*'] matches all parameters, so none is"),
        ("teachers.0.training.optimizer.body_lr_share=2", "body_lr_share = 2 must be less than or"),
        ("teachers.0.pretrained=true", "pretrained = True needs a model of timm or torchvision"),
        ("teachers.0.weights=x", "give either training or weights; a training that starts from"),
        ("teachers.0.weights_key=ema", "weights_key or weights_prefix = 'ema' needs a file of"),
        ("teachers.0.views=0", "teachers.0.views = 0 must be 1 or 2"),
        (f"distill.training.steps={10**21}", f"steps = {10**21} must be less than or equal to 10"),
        (
            "teachers.0.training={epochs: 1e300}",
            "epochs = '1e300' must be less than or eq",
        ),
        ("seed=[", "override 'seed=[': '[' is not a YAML value"),
        (f"seed={'[' * 900}", "is not a YAML value"),
        ("tracking.uri=sqlite:foo.db", "'sqlite:foo.db': names no file after sqlite:///"),
        ("tracking.uri=http://[::1", "tracking URI 'http://[::1': Invalid IPv6 URL"),
        ("tracking.uri=http://host:port", "tracking URI 'http://host:port': Port could not be"),
        ("tracking.uri=http://me:secret@h:x", "tracking URI 'http://***@h:x': Port could not"),
        ("tracking=http://me:secret@h", "tracking = 'http://***@h' must be a mapping"),
    ],
    ids=lambda value: value[:40],
)
def test_a_value_that_cannot_be(sbf: Sbf, override: str, message: str) -> None:
    assert_refused(sbf("run", "tiny.yaml", override, "--dry-run"), message)


@pytest.mark.parametrize("name", ["sbf-round-1", "sbf-round-2-fitted", "ensemble"])
def test_a_teacher_with_the_name_of_a_network_of_the_run(sbf: Sbf, name: str) -> None:
    overrides = (f"teachers.0.name={name}", f"compress.teacher={name}")
    message = f"teachers.0.name = '{name}' must not be one of ensemble, dense-labels"
    assert_refused(sbf("run", "tiny.yaml", *overrides, "--dry-run"), message)


def test_a_teacher_whose_files_could_be_those_of_another_network(sbf: Sbf) -> None:
    overrides = ("teachers.0.name=one.targets", "compress.teacher=one.targets")
    message = "teachers.0.name = 'one.targets' must not end in .targets"
    assert_refused(sbf("run", "tiny.yaml", *overrides, "--dry-run"), message)


def test_a_pipe_that_nobody_writes_to_is_not_waited_for(sbf: Sbf) -> None:
    os.mkfifo("pipe")
    for command in ("run", "compare"):
        assert_refused(sbf(command, "pipe"), "recipe pipe is a pipe that nobody writes to; give a")
    with pytest.raises(UserError, match="weights pipe are a pipe; give a file"):
        load_weights(nn.Linear(1, 1), Path("pipe"))
    with pytest.raises(UserError, match="plan pipe: file: Invalid JSON"):
        Plan.load(Path("pipe"))
    with pytest.raises(UserError, match="cluster file pipe: must be a mapping"):
        mlflow_of(Path("pipe"))


def test_a_recipe_may_come_out_of_a_pipe(sbf: Sbf) -> None:
    reading, writing = os.pipe()

    def write_late() -> None:
        time.sleep(0.2)
        os.write(writing, RECIPE.encode())
        os.close(writing)

    writer = threading.Thread(target=write_late)
    writer.start()
    answer = sbf("run", f"/dev/fd/{reading}", "name=data", "--dry-run")
    writer.join()
    os.close(reading)
    assert_refused(answer, "name = 'data' must not be a reserved name under runs/")


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/runs"])
@pytest.mark.parametrize(
    ("option", "command"),
    [
        ("--runs", ["run", "tiny.yaml"]),
        ("--runs", ["compare", "compared.yaml"]),
        (
            "--out",
            [
                *("compress", "--model", "cifar_resnet8", "--weights", "file"),
                *("--data", "photos", "--budget", "macs=0.5"),
            ],
        ),
        ("--out", ["data", "prepare", "cifar10", "--archives", "photos"]),
    ],
    ids=["run", "compare", "compress", "prepare"],
)
def test_a_place_where_nothing_can_be_written(
    sbf: Sbf, option: str, command: list[str], place: str
) -> None:
    reason = {
        "file": "is a file; name a folder",
        "file/below": f"lies below the file {Path('file').absolute()}; name a folder",
        "/proc/runs": "cannot be written (",
    }[place]
    answer = sbf(*command, option, place)
    assert_refused(answer, reason)
    assert f"{option} " in answer[2]


def test_a_folder_for_a_list_is_refused_before_the_images_are_listed(sbf: Sbf) -> None:
    before = sorted(Path().rglob("*"))
    answer = sbf("data", "split", "nowhere", "--labelled", "1", "--out", "photos")
    assert_refused(answer, "--out photos: is a folder; name a file for the list")
    assert_refused(
        sbf("data", "split", "nowhere", "--labelled", "1", "--out", "file/x"), "is a file"
    )
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    "address", ["", "head", "head:", ":6379", "head:port", "ray://", "h:99999"]
)
def test_an_address_of_ray_that_is_none(
    sbf: Sbf, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert_refused(
        sbf("run", "tiny.yaml"), f"RAY_ADDRESS = {address!r} must look like HOST:6379; unset it"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (b"caf\xe9", "the class 'caf\\udce9' has unprintable characters in its name, or bytes"),
        (b"two\nlines", "the class 'two\\nlines' has unprintable characters in its name"),
    ],
)
def test_a_class_whose_name_cannot_be_kept(sbf: Sbf, name: bytes, message: str) -> None:
    write_images(Path(os.fsdecode(b"photos/" + name)))
    assert_refused(sbf("run", "tiny.yaml"), message)


@pytest.mark.parametrize("target", ["..", ".", "../.."])
def test_a_class_that_is_a_link_to_what_holds_it(sbf: Sbf, target: str) -> None:
    Path("photos/link").symlink_to(target)
    assert_refused(sbf("run", "tiny.yaml"), "the class 'link' is a link to ")


def test_one_class_alone(sbf: Sbf) -> None:
    write_images(Path("alone/cat"))
    assert_refused(
        sbf("run", "tiny.yaml", "data.root=alone"), "has one class only, 'cat'; a classifier needs"
    )


def test_a_list_of_labelled_images_that_has_no_end(sbf: Sbf) -> None:
    answer = sbf("run", "tiny.yaml", "data.split=/dev/zero")
    assert_refused(answer, "split /dev/zero: is not a list of images")


def test_a_pipe_among_the_images_is_left_out(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    assert inspect_image(tmp_path / "pipe.jpg").fault == "not a regular file"


@pytest.mark.parametrize(
    "words",
    [
        "run tiny.yaml teachers.0.model={}",
        "compare compared.yaml model={}",
        "compress --model {} --weights file --data photos --budget macs=0.5 --out out",
    ],
)
def test_a_network_that_needs_more_than_an_image(sbf: Sbf, words: str) -> None:
    code, _, err = sbf(*words.format("torch.nn:PairwiseDistance").split())
    assert (code, err.count("\n")) == (2, 1), err
    assert "takes 2 inputs, and it is given images alone here" in err
    assert not Path("out").exists()


@pytest.mark.parametrize("kind", ["missing", "a folder", "whole numbers", "NaN", "another model"])
def test_weights_are_looked_at_before_any_image_is_read(sbf: Sbf, kind: str) -> None:
    for path in Path("photos").rglob("*.png"):
        path.write_text("no image")  # which is found when it is read
    state = models.build("cifar_resnet8_w4", 2).state_dict()
    weights, message = Path("weights.pt"), "weights weights.pt"
    match kind:
        case "missing":
            message = "teachers.0.weights = 'weights.pt' does not exist"
        case "a folder":
            weights.mkdir()
            message = "teachers.0.weights = 'weights.pt' must be a file"
        case "whole numbers":
            torch.save({name: value.to(torch.int8) for name, value in state.items()}, weights)
            message = "weights weights.pt are not floating-point numbers: conv.weight is int8"
        case "NaN":
            state["conv.weight"].fill_(torch.nan)
            torch.save(state, weights)
            message = "one: the weights of weights.pt are not finite: conv.weight"
        case _:
            torch.save(models.build("cifar_resnet8_w4", 3).state_dict(), weights)
    overrides = ("teachers.0.training=null", "teachers.0.weights=weights.pt")
    assert_refused(sbf("run", "tiny.yaml", *overrides), message)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["start_from=no.pth"], "teachers.0.start_from = 'no.pth' does not exist"),
        (["start_from=photos"], "teachers.0.start_from = 'photos' must be a file"),
        (["start_from=file"], "weights file are neither a safetensors file nor torch.save's"),
        (["start_from=wide.pth"], "weights wide.pth do not fit: conv.weight is (5, 3, 3, 3)"),
        (["start_from=nan.pth"], "one: the weights of nan.pth are not finite: conv.weight"),
        (["weights=nan.pth", "training=null", "classes=no.txt"], "must have the student's classes"),
    ],
    ids=lambda value: str(value[0])[:30],
)
def test_what_teachers_start_from_is_looked_at_before_any_image_is_read(
    sbf: Sbf, overrides: list[str], message: str
) -> None:
    for path in Path("photos").rglob("*.png"):
        path.write_text("no image")  # which is found when it is read
    torch.save(models.build("cifar_resnet8_w5", 7).state_dict(), "wide.pth")
    state = models.build("cifar_resnet8_w4", 7).state_dict()
    state["conv.weight"].fill_(torch.nan)
    torch.save(state, "nan.pth")
    changes = [f"teachers.0.{override}" for override in overrides]
    assert_refused(sbf("run", "tiny.yaml", *changes), message)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("predict nowhere photos", "model nowhere does not exist; give an ONNX file, a student's"),
        ("predict photos photos", "folder photos is not a student: it has no card.json"),
        ("predict unfinished photos", "run unfinished has no student yet: finish the run with"),
        ("predict file photos", "ONNX file file cannot be read: "),
        ("predict plain photos", "folder plain has no student.onnx: write one with sbf export pl"),
        ("predict student", "Missing argument 'IMAGES"),
        ("predict student nowhere.jpg", "image nowhere.jpg does not exist"),
        ("predict student empty", "folder empty holds no image (.jpg .jpeg"),
        ("predict student photos/*.gif", "pattern 'photos/*.gif' matches no file"),
        ("predict student -", "standard input lists no image"),
        ("predict student photos --top 11", "--top 11: student has 10 classes"),
        ("predict student photos --top 0", "Invalid value for '--top'"),
        ("predict student photos --crop 1.5", "--crop 1.5: must be in (0, 1]"),
        ("evaluate nowhere photos", "model nowhere does not exist; give an ONNX file, a student's"),
        ("evaluate student nowhere", "nowhere does not exist; give a recipe or a folder of images"),
        ("evaluate student photos", "the student does not know the class 'cat'; it knows 0, 1, 2"),
        ("evaluate student empty", "empty: is empty; it should hold one folder a class"),
        ("evaluate student photos seed=1", "'seed=1': changes a recipe, and photos is a folder"),
        ("evaluate student file", "recipe file must be a mapping of keys to values"),
        ("export nowhere --out new", "model nowhere does not exist; give an ONNX file, a student"),
        ("export student", "Missing option '--out'"),
        ("export student --out photos", "--out photos: is not empty; name a new folder"),
        ("export student --out file", "--out file: is a file; name a folder"),
        ("export student --out new --format coreml", "'coreml' is not one of 'onnx', 'torch-exp"),
        ("export student --out new --precision int4", "'int4' is not one of 'fp32', 'fp16', 'i"),
        (
            "export student --out new --format safetensors --precision int8",
            "--precision int8: is for --format onnx and mlflow, not for safetensors",
        ),
        (
            "export student --out new --precision int8",
            "--precision int8 needs images that ranges are measured on",
        ),
        ("export student --out new --data nowhere", "--data nowhere: does not exist; give a rec"),
        (
            "export student/student.onnx --out new",
            "model student/student.onnx is a file: give a student's or a run's folder",
        ),
        ("doctor --tracking-uri http://[::1", "tracking URI 'http://[::1': Invalid IPv6 URL"),
        ("doctor photos", "Got unexpected extra argument"),
    ],
)
def test_a_wrong_use_of_a_finished_student(
    sbf: Sbf, monkeypatch: pytest.MonkeyPatch, command: str, message: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    shutil.copytree(Path(__file__).parent / "before" / "run" / "student", "student")
    shutil.copytree("student", "plain")
    Path("plain/student.onnx").unlink()
    Path("empty").mkdir()
    Path("unfinished").mkdir()
    Path("unfinished/recipe.json").write_text("{}")
    code, _, err = sbf(*command.split())
    last = err.splitlines()[-1]
    assert (code, last[:5]) == (2, "sbf: "), err
    assert message in last
    assert not Path("new").exists()


def test_a_comparison_that_another_process_works_on(sbf: Sbf) -> None:
    Path("runs/compared").mkdir(parents=True)
    with Path("runs/compared/.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert_refused(
            sbf("compare", "compared.yaml"), "compared is in use by another sbf compare; wait for"
        )


def test_workers_that_do_not_divide_labelled_and_unlabelled_images_are_refused(sbf: Sbf) -> None:
    write_images(Path("more"))
    given = ("data.unlabelled=more", "distill.training.batch_size=40", "workers.count=8")
    trained = ("teachers.0.training.batch_size=40", "workers.gpus=0", *given)
    message = "workers.count = 8 must divide the 10 labelled and 30 unlabelled images of a step"
    assert_refused(sbf("run", "tiny.yaml", *trained, "--dry-run"), message)
