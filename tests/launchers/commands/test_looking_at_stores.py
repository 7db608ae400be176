"""Commands that only look, at addresses; and addresses that nothing can be done with."""

from collections.abc import Callable
from pathlib import Path

import pytest

from launchers.run import execution
from sbf_dist.compression.plan import DenseLayer, Plan
from sbf_dist.files import sha256
from sbf_dist.object_storage import ObjectFolder
from sbf_dist.train.manifest import FORMAT, FileEntry, Manifest

RECIPE = """
name: tiny
data: {source: digits, validation: 100, labelled_per_class: 5}
teachers: [{name: one, model: cifar_resnet8_w4, training: {steps: 10}}]
compress: {teacher: one, macs: 0.5}
distill: {training: {steps: 10}}
"""
Sbf = Callable[..., tuple[int, str, str]]


@pytest.fixture
def runs(s3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SBF_DIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    Path("tiny.yaml").write_text(RECIPE)
    return f"{s3.bucket}/runs"


def put_checkpoint(store: ObjectFolder, here: Path) -> None:
    """Put a checkpoint with one small shard, which is none of DeepSpeed's, into a store."""
    entries = {}
    for name, text in {
        "deepspeed/state/mp_rank_00_model_states.pt": "shard",
        "ranks/00000.json": '{"loader_state": {"position": 3}}',
        "ranks/00000.safetensors": "state",
    }.items():
        (here / "file").write_text(text)
        store.put(here / "file", name)
        entries[name] = FileEntry(size=len(text), sha256=sha256(here / "file"))
    manifest = Manifest(
        format=FORMAT,
        step=10,
        world_size=1,
        digests={"training": "one"},
        files=entries,
    )
    store.write("manifest.json", manifest.model_dump_json().encode())


def test_checkpoints_are_verified_and_the_address_is_named(
    runs: str, sbf: Sbf, tmp_path: Path
) -> None:
    where = f"{runs}/tiny/checkpoints/teachers"
    for name in ("one-00000010.ab", "one-00000020.ab"):
        put_checkpoint(ObjectFolder.at(f"{where}/{name}"), tmp_path)
    code, out, err = sbf("checkpoint", "verify", where)
    assert (code, err) == (0, "")
    assert f"checkpoint {where}/one-00000010.ab: whole, step 10" in out
    shard = "deepspeed/state/mp_rank_00_model_states.pt"
    ObjectFolder.at(f"{where}/one-00000020.ab").write(shard, b"other")
    code, out, err = sbf("checkpoint", "verify", where)
    assert code == 2
    assert f"checkpoint {where}/one-00000020.ab: {shard} is damaged" in out
    assert err == f"sbf: 1 of the checkpoints in {where} cannot be resumed from\n"
    code, _, err = sbf("checkpoint", "consolidate", where, "--out", "net.safetensors")
    assert code == 2
    assert err.startswith(f"sbf: folder {where} has 2 checkpoints, give one of them: one-00000010")
    ObjectFolder.at(f"{where}/one-00000010.ab").remove("ranks/00000.json")
    code, _, err = sbf("checkpoint", "consolidate", f"{where}/one-00000010.ab", "--out", "n")
    assert (code, err.count("\n")) == (2, 1)
    assert f"checkpoint {where}/one-00000010.ab: ranks/00000.json is missing" in err


def test_the_plan_of_a_run_is_shown_by_either_address(runs: str, sbf: Sbf, tmp_path: Path) -> None:
    plan = Plan(
        model="small",
        classes=5,
        input_shape=(3, 8, 8),
        budget={"macs": 0.8},
        macs_before=39,
        macs_after=30,
        params_before=40,
        params_after=31,
        explanation=["asked for 0.8 of the multiply-adds"],
        layers={"stem": DenseLayer(reason="the stem", macs=9, convertible=False)},
    )
    plan.save(tmp_path / "plan.json")
    run = ObjectFolder.at(f"{runs}/tiny")
    run.put(tmp_path / "plan.json", "plan.json")
    run.write("weights/large", b"")
    for place in (run.address, f"{run.address}/plan.json"):
        code, out, err = sbf("plan", "show", place)
        assert (code, err) == (0, "")
        assert "asked for 0.8 of the multiply-adds" in out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("run", "tiny.yaml", "--runs", "s3:///runs"), "names no bucket, as in s3://BUCKET/FOLDER"),
        (("run", "tiny.yaml", "--runs", "ftp://host/runs"), "ftp://host/runs: ftp:// is not known"),
        (
            ("run", "tiny.yaml", "--runs", "s3://me:secret@bucket/runs"),
            "s3://***@bucket/runs: credentials do not belong into an address",
        ),
        (
            ("run", "tiny.yaml", "--runs", "s3://no-such-bucket/runs"),
            "--runs s3://no-such-bucket/runs: the bucket does not exist",
        ),
        (
            ("compare", "tiny.yaml", "--runs", "s3://test-bucket/runs"),
            "--runs s3:/test-bucket/runs: must be a local folder, not an address",
        ),
        (("plan", "show", "s3://test-bucket/none"), "s3://test-bucket/none: nothing is there"),
        (("plan", "show", "s3://no-such-bucket"), "s3://no-such-bucket: the bucket does not exist"),
        (("checkpoint", "verify", "s3://test-bucket"), "s3://test-bucket: nothing is there"),
        (("checkpoint", "show", "http://host/x"), "http://host/x: http:// is not known"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_an_address_that_cannot_be_used(
    runs: str, sbf: Sbf, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(execution, "execute", lambda *_: None)
    if command[0] == "compare":
        Path("tiny.yaml").write_text(
            "name: tiny\ndata: {source: digits, validation: 100, labelled_per_class: 5}\n"
            "model: cifar_resnet8_w4\ndense: {steps: 10}\nrecovery: {steps: [10]}\n"
        )
    code, out, err = sbf(*command)
    assert (code, out, err.count("\n")) == (2, "", 1), (out, err)
    assert message in err
    assert "secret" not in err


def test_a_store_that_refuses_or_has_no_credentials_is_one_line_before_any_work(
    runs: str, faulty_s3, sbf: Sbf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "execute", lambda *_: None)
    assert sbf("run", "tiny.yaml", "--runs", runs) == (0, "", "")
    assert ObjectFolder.at(runs).objects() == {}
    faulty_s3.add("P", "refuse")
    code, _, err = sbf("run", "tiny.yaml", "--runs", runs)
    assert (code, err.count("\n")) == (2, 1)
    assert f"--runs {runs}: access is denied; check the credentials and what they may do" in err
    faulty_s3.clear()
    faulty_s3.add("P", "drop")
    code, _, err = sbf("run", "tiny.yaml", "--runs", runs)
    assert (code, err.count("\n")) == (2, 1)
    assert f"--runs {runs}: " in err
    assert "Empty reply" in err
