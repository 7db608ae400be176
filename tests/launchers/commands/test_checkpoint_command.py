"""`sbf checkpoint` on checkpoints as DeepSpeed wrote them, in a process that does not load it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from launchers.cli import app
from sbf_dist.errors import UserError
from sbf_dist.train.manifest import read_manifest

WRITING = """
import sys
from pathlib import Path

sys.path.insert(0, "tests/train")
import torch
from tiny import TinyLoader, TinyTask

from sbf_dist.settings import Optimizer
from sbf_dist.train import checkpoint
from sbf_dist.train.engine import build_engine
from sbf_dist.train.loop import Every, fit
from sbf_dist.train.resharding import whole_state

root = Path(sys.argv[1])
torch.set_num_threads(1)
for stage, ema in ((0, None), (1, 0.5), (3, 0.5)):
    torch.manual_seed(stage)
    engine = build_engine(
        TinyTask(), Optimizer(lr=0.05), micro_batch=16, zero_stage=stage, ema=ema
    )
    loader = TinyLoader(0, 1)
    quiet = Every(None, lambda record: None)
    fit(engine, loader, steps=3, lr_at=lambda step: 0.05, log=quiet)
    state = {"loaders": [loader.state_dict()]}
    digests = {"training": "one", "recipe": "r1"}
    checkpoint.save(engine, root / f"zero{stage}", step=3, loader_state=state, digests=digests)
    torch.save(
        {"last": whole_state(engine), "average": ema and whole_state(engine, averaged=True)},
        root / f"zero{stage}.expected",
    )
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    subprocess.run([sys.executable, "-c", WRITING, str(folder)], check=True, timeout=300)
    return folder


def _sbf(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["checkpoint", *map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_show_says_what_a_checkpoint_holds(written: Path) -> None:
    lines = [line.split(maxsplit=1) for line in _sbf("show", written / "zero1").splitlines()[1:]]
    shown = {line[0]: line[1] for line in lines}
    assert shown["step"] == "3"
    assert shown["workers"] == "1, SGD at ZeRO stage 1"
    assert (shown["training"], shown["recipe"]) == ("one", "r1")
    assert shown["files"].startswith("4, 0.0 MB")
    assert shown["position"] == "samples_seen 48"


def test_show_names_the_mlflow_run_where_the_checkpoint_does(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written / "zero1", tmp_path / "named")
    assert "MLflow" not in _sbf("show", tmp_path)
    manifest = read_manifest(tmp_path / "named").model_copy(update={"mlflow_run": "1a2b"})
    (tmp_path / "named" / "manifest.json").write_text(manifest.model_dump_json())
    assert "  MLflow run 1a2b\n" in _sbf("show", tmp_path)
    assert "whole, step 3" in _sbf("verify", tmp_path)


def test_show_and_verify_go_through_all_checkpoints_below_a_folder(written: Path) -> None:
    assert [line for line in _sbf("show", written).splitlines() if line.startswith("/")] == [
        str(written / f"zero{stage}") for stage in (0, 1, 3)
    ]
    labels = written / "pseudo-labels"
    labels.mkdir()
    (labels / "manifest.json").write_text("{}")  # of something else
    assert _sbf("verify", written).splitlines() == [
        f"checkpoint {written}/zero{stage}: whole, step 3" for stage in (0, 1, 3)
    ]


def test_verify_names_what_is_damaged_and_goes_on(written: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "all" / "a"
    shutil.copytree(written / "zero1", damaged)
    shutil.copytree(written / "zero3", damaged.with_name("b"))
    (damaged / "ranks/00000.json").unlink()
    result = CliRunner().invoke(app, ["checkpoint", "verify", str(damaged.parent)])
    assert "ranks/00000.json is missing" in result.stdout.splitlines()[0]
    assert "all/b: whole, step 3" in result.stdout.splitlines()[1]
    assert isinstance(result.exception, UserError)
    assert "1 of the checkpoints in" in str(result.exception)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        ("{", "cannot be read: no JSON"),
        ("[]", "is damaged: it holds no object"),
        ("{}", "is damaged: loader"),
        ('{"loader": {}, "written": {"optimizer": 1}}', "is damaged: written"),
    ],
)
def test_show_names_a_file_that_is_damaged(
    written: Path, tmp_path: Path, content: str | None, message: str
) -> None:
    damaged = tmp_path / "a"
    shutil.copytree(written / "zero1", damaged)
    (damaged / "ranks/00000.json").unlink()
    if content is not None:
        (damaged / "ranks/00000.json").write_text(content)
    with pytest.raises(UserError, match=rf"a/ranks/00000.json: {message}.*use an earlier"):
        _sbf("show", damaged)


def test_what_a_kill_left_unfinished_is_no_checkpoint(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written / "zero1", tmp_path / "one-00000003")
    unfinished = tmp_path / ".one-00000006.partial"
    shutil.copytree(written / "zero1", unfinished)
    (unfinished / "ranks/00000.json").unlink()
    assert _sbf("verify", tmp_path) == f"checkpoint {tmp_path}/one-00000003: whole, step 3\n"


@pytest.mark.parametrize(
    ("stage", "option", "expected"),
    [(0, [], "last"), (1, [], "average"), (1, ["--weights", "last"], "last"), (3, [], "average"),
     (3, ["--weights", "last"], "last")],
)  # fmt: skip
def test_consolidate_writes_one_file_of_the_networks_own_names(
    written: Path, tmp_path: Path, stage: int, option: list[str], expected: str
) -> None:
    out = tmp_path / "weights.safetensors"
    told = _sbf("consolidate", written / f"zero{stage}", "--out", out, *option)
    assert ("moving average" in told) == (expected == "average")
    found = load_file(out)
    wanted = torch.load(written / f"zero{stage}.expected")[expected]
    assert {f"student.{name}" for name in found} == wanted.keys()
    assert all(torch.equal(found[n.removeprefix("student.")], v) for n, v in wanted.items())


def test_it_loads_no_deepspeed(written: Path, tmp_path: Path) -> None:
    command = ["checkpoint", "consolidate", str(written / "zero3"), "--out", str(tmp_path / "w")]
    program = (
        f"import sys; from launchers.cli import app\napp({command!r}, standalone_mode=False)\n"
        "assert not {'deepspeed', 'ray', 'mlflow'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=240)


def test_mistakes_are_one_line(written: Path, tmp_path: Path) -> None:
    wrong = {
        ("show", tmp_path / "none"): "does not exist",
        ("show", written / "zero0/manifest.json"): "is a file: give a checkpoint's folder",
        ("verify", tmp_path): "is not a checkpoint and contains none",
        ("consolidate", written, "--out", tmp_path / "x"): "has 3 checkpoints, give one of them: "
        "zero0, zero1, zero3",
        ("consolidate", written / "zero0", "--out", written / "zero0.expected"): "exists",
        ("consolidate", written / "zero0", "--out", "/proc/x"): "cannot be written: ",
        ("consolidate", written / "zero0", "--out", tmp_path / "x", "--weights", "average"): "has "
        "no average of the weights (training.ema); give --weights last",
    }
    for arguments, message in wrong.items():
        with pytest.raises(UserError) as refused:
            _sbf(*arguments)
        assert message in str(refused.value)
        assert "\n" not in str(refused.value)
