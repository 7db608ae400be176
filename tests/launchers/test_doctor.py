"""`sbf doctor`: what is there, what is broken, and the remedy of each."""

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from launchers import doctor
from launchers.doctor import Finding
from sbf_dist import extension
from sbf_dist.tracking import tracking_address

Sbf = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a user's folder; packages are not imported, which takes a minute."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(doctor, "import_fault", lambda module: None)


def examined(uri: str | None = None) -> dict[str, Finding]:
    address = tracking_address(Path("runs"), uri)
    return {finding.name: finding for finding in doctor.examine(Path("runs"), address)}


def test_a_machine_that_has_everything_is_said_to_have_it(sbf: Sbf) -> None:
    code, out, _ = sbf("doctor", "--json")
    assert code == 0
    found = {one["name"]: one for one in json.loads(out)}
    assert found["torch"] == {
        "name": "torch",
        "state": "ok",
        "found": metadata.version("torch"),
        "remedy": None,
    }
    assert {"extension", "GPU", "Ray", "MLflow", "disk", "ninja", "deepspeed"} <= found.keys()
    assert not Path("runs").exists(), "it only looks"


def test_what_is_broken_is_printed_with_its_remedy_and_exit_code_1(
    sbf: Sbf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name == "deepspeed":
            raise metadata.PackageNotFoundError
        return "1.0"

    monkeypatch.setattr(metadata, "version", version)
    code, out, _ = sbf("doctor")
    assert code == 1
    line = out.splitlines().index("BROKEN  deepspeed             not installed")
    assert out.splitlines()[line + 1].strip() == f"-> {doctor.INSTALL}"


def test_a_package_that_cannot_be_imported_is_broken_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    faults = {"nvidia.dali": "OSError: libcuda.so.1: cannot open"}
    monkeypatch.setattr(doctor, "import_fault", faults.get)
    found = examined()["nvidia-dali-cuda130"]
    assert (found.state, found.remedy) == ("broken", doctor.INSTALL)
    assert found.found.endswith(", cannot be imported: OSError: libcuda.so.1: cannot open")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", None),
        ("raise OSError('no such\\nlibrary')", "library"),
        ("import os; os._exit(3)", "the process ended with 3"),
    ],
)
def test_packages_are_imported_in_a_process_that_they_may_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, fault: str | None
) -> None:
    monkeypatch.undo()
    (tmp_path / "tried.py").write_text(content)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert doctor.import_fault("tried") == fault


def test_an_extension_without_cuda_beside_a_gpu_is_broken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    monkeypatch.setattr(extension, "build_info", lambda: {"cuda": False, "torch": "2"})
    assert examined()["extension"].state == "ok"
    monkeypatch.setattr(
        torch,
        "cuda",
        SimpleNamespace(
            is_available=lambda: True, device_count=lambda: 1, get_device_name=lambda i: "H100"
        ),
    )
    found = examined()
    assert found["extension"].state == "broken"
    assert "SBF_DIST_CUDA=1 make setup" in str(found["extension"].remedy)
    assert found["GPU"] == Finding("GPU", "ok", "H100")


def test_a_cluster_and_a_server_that_do_not_answer_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    found = examined("http://me:secret@127.0.0.1:1")
    assert found["Ray"].state == "broken"
    assert "Ray cluster 127.0.0.1:1: cannot be reached" in found["Ray"].found
    assert found["MLflow"].state == "note", "a run goes on without it"
    assert found["MLflow"].found.startswith("http://127.0.0.1:1: ")
    assert "refused" in found["MLflow"].found
    assert "secret" not in str(found)
