"""Where lines go while a run works: a process of its own, as standard streams are led elsewhere."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import logging, os, subprocess, sys, threading, warnings
from pathlib import Path
from launchers.run.library_output import kept_apart
from sbf_dist.errors import RunError, UserError

logging.basicConfig(level=getattr(logging, os.environ.get("LEVEL", "WARNING")))
early = logging.getLogger("early")
early.addHandler(logging.StreamHandler())  # a library's own, made before

def talk():
    warnings.warn("lib: warning")
    print("lib: print")
    print("lib: print to stderr", file=sys.stderr)
    os.write(1, b"lib: C\\n")
    os.write(2, b"lib: C to stderr\\n")
    subprocess.run(["sh", "-c", "echo lib: child; echo lib: child to stderr >&2"])
    logging.getLogger("mlflow.store").warning("lib: record")
    early.warning("lib: record of its own handler")
    logging.getLogger("launchers.x").warning("own: record")
    output.console.print("own: line")

def fail():
    raise ValueError("lib: thread")

how = sys.argv[1]
try:
    with kept_apart() as output:
        print("lib: before the log")
        if how == "refused":
            raise UserError("own: refused")
        output.keep_in(Path("logs/libraries.log"))
        talk()
        late = logging.StreamHandler()  # a library's own, which outlives the context
        if how == "failed":
            raise RunError("own: failed")
        if how == "thread":
            sys.path.insert(0, ".")
            import launchers.run.library_output as ours
            work = lambda: ours._is_ours(None)
            thread = threading.Thread(target=work, name="own-thread")
            thread.start(), thread.join()
except (UserError, RunError) as error:
    print(error, *getattr(error, "__notes__", ()), sep="\\n", file=sys.stderr)
else:
    print("own: after")
    print("own: after, to stderr", file=sys.stderr)
    late.emit(logging.LogRecord("x", 30, "", 0, "own: a handler that was made within", (), None))
"""
LIBRARIES = {
    "lib: before the log",
    "lib: print",
    "lib: print to stderr",
    "lib: C",
    "lib: C to stderr",
    "lib: child",
    "lib: child to stderr",
}


def run(folder: Path, how: str = "", level: str = "WARNING") -> tuple[list[str], list[str], str]:
    """Lines of standard output and of standard error, and the log."""
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "LEVEL": level}
    command = [sys.executable, "-c", PROGRAM, how]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    log = folder / "logs" / "libraries.log"
    text = log.read_text() if log.exists() else ""
    return done.stdout.splitlines(), done.stderr.splitlines(), text


def test_our_lines_alone_are_shown_and_all_others_are_in_the_log(tmp_path) -> None:
    out, err, log = run(tmp_path)
    assert out == ["own: line", "own: after"]
    assert err[0] == "WARNING own: record"
    assert err[1:] == ["own: after, to stderr", "own: a handler that was made within"]
    lines = log.splitlines()
    assert set(lines) >= LIBRARIES
    assert lines[0].startswith("--- 20")
    assert lines[1] == "lib: before the log"
    assert "UserWarning: lib: warning" in log
    assert " WARNING mlflow.store lib: record" in log
    assert "lib: record of its own handler" in lines
    assert "own" not in log.replace("its own", "")


def test_a_second_start_appends(tmp_path) -> None:
    run(tmp_path)
    *_, log = run(tmp_path)
    assert log.count("lib: child to stderr\n") == 2
    assert log.count("--- 20") == 2


def test_with_verbose_records_of_libraries_are_shown_as_well(tmp_path) -> None:
    _, err, log = run(tmp_path, level="INFO")
    assert "WARNING lib: record" in err
    assert "lib: record" in log


def test_what_is_refused_leaves_no_file_and_loses_no_line(tmp_path) -> None:
    out, err, log = run(tmp_path, "refused")
    assert (out, err, log) == ([], ["lib: before the log", "own: refused"], "")


def test_an_error_names_the_log(tmp_path) -> None:
    _, err, _ = run(tmp_path, "failed")
    assert err[-2:] == ["own: failed", "what libraries have printed is in logs/libraries.log"]


def test_a_thread_of_ours_that_fails_is_named_and_its_traceback_is_in_the_log(tmp_path) -> None:
    _, err, log = run(tmp_path, "thread")
    (line,) = [line for line in err if "own-thread" in line]
    assert line.startswith("ERROR thread own-thread: AttributeError(")
    assert line.endswith("; its traceback is in logs/libraries.log")
    assert "Traceback (most recent call last)" in log


@pytest.mark.parametrize("how", ["", "failed"])
def test_on_a_terminal_the_same_lines_are_shown(tmp_path, how: str) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["PYTHONPATH"] = str(Path.cwd())
        os.chdir(tmp_path)
        os.execv(sys.executable, [sys.executable, "-c", PROGRAM, how])
    shown = b""
    while True:
        try:
            shown += os.read(terminal, 4096)
        except OSError:  # it has ended
            break
    os.waitpid(pid, 0)
    assert b"own: record" in shown
    assert b"own: line" in shown
    assert b"lib:" not in shown
    assert set((tmp_path / "logs" / "libraries.log").read_text().splitlines()) >= LIBRARIES
