"""What tests of several commands share."""

import sys
from collections.abc import Callable

import pytest

from launchers import cli

Answer = tuple[int, str, str]


@pytest.fixture
def sbf(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Answer]:
    """The command line in this process: exit code, stdout and stderr of `sbf ARGUMENTS`."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def run(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["sbf", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        code = left.value.code or 0
        assert isinstance(code, int)
        return (code, *capsys.readouterr())

    return run
