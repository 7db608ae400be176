"""A run as a whole, of which the stages are left out."""

import errno
from pathlib import Path
from typing import Any

import pytest

from launchers.run import execution
from launchers.run.folder import RunFolder
from sbf_dist.errors import UserError


def execute(folder: RunFolder) -> None:
    absent: Any = None
    execution.execute(absent, folder, "export", None, absent)


@pytest.mark.parametrize(
    ("number", "fault"),
    [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "the disk is read-only")],
)
@pytest.mark.parametrize("name", [None, "logs/distill-1.log"])
def test_a_disk_that_takes_no_more_is_one_line_whatever_was_to_be_written(
    number: int, fault: str, name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(number, "of the system", name)

    monkeypatch.setattr(execution, "_execute", fail)
    folder = RunFolder(tmp_path, "tiny")
    with pytest.raises(UserError) as caught:
        execute(folder)
    assert str(caught.value) == (
        f"{name or folder.root}: {fault}; make room, and run the same command again"
    )


def test_another_error_of_the_system_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise FileNotFoundError(errno.ENOENT, "of the system", "ours")

    monkeypatch.setattr(execution, "_execute", fail)
    with pytest.raises(FileNotFoundError):
        execute(RunFolder(tmp_path, "tiny"))
