"""`sbf submit`, `jobs`, `logs` and `stop`: what is wrong is one line, before anything is sent."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launchers import cli, packing
from launchers.commands import jobs
from launchers.on_ray import tunnel
from sbf_dist.errors import UserError

RECIPES = Path(__file__).parents[3] / "recipes"
RUNS = ("--runs", "s3://bucket/runs")


def answer(*arguments: str) -> str:
    """Return the error with which a command ends."""
    found = CliRunner().invoke(cli.app, list(arguments))
    assert isinstance(found.exception, UserError), found.output
    return str(found.exception)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(jobs.ADDRESS, raising=False)
    (tmp_path / "digits.yaml").write_text((RECIPES / "digits.yaml").read_text())
    return tmp_path


def test_a_cluster_must_be_named() -> None:
    assert answer("jobs").startswith("no cluster given: set --cluster FILE, --address URL")


def test_two_clusters_at_once_are_refused() -> None:
    found = answer("jobs", "--cluster", "a.yaml", "--address", "http://127.0.0.1:1")
    assert found == "--cluster and --address both name a cluster; give one of them"


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "ray://head:10001", "http://", "http://a:b"])
def test_an_address_must_be_a_url(address: str) -> None:
    assert answer("jobs", "--address", address) == (
        f"address {address!r}: must be the URL of a dashboard, e.g. http://127.0.0.1:8265"
    )


def test_a_cluster_that_does_not_answer_is_reported() -> None:
    found = answer("submit", "digits.yaml", *RUNS, "--address", "http://127.0.0.1:1")
    assert found.startswith("cluster http://127.0.0.1:1: cannot be reached (")
    assert "\n" not in found


def test_the_variable_of_ray_names_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(jobs.ADDRESS, "http://127.0.0.1:1")
    assert answer("stop", "job").startswith("cluster http://127.0.0.1:1: cannot be reached")


def test_a_cluster_file_that_is_not_there_is_reported() -> None:
    assert answer("jobs", "--cluster", "no.yaml") == "cluster file no.yaml does not exist"


def test_a_cluster_that_was_not_started_is_reported(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnel, "SECONDS", 30.0)
    (folder / "bad.yaml").write_text("cluster_name: nobody\nprovider: {type: nonsense}\n")
    found = answer("jobs", "--cluster", "bad.yaml")
    assert found.startswith("cluster file bad.yaml: its dashboard cannot be reached: ")
    assert "\n" not in found


def test_a_wrong_recipe_is_refused_before_anything_is_sent() -> None:
    found = answer("submit", "digits.yaml", "no=1", "--address", "http://127.0.0.1:1")
    assert found.startswith("recipe digits.yaml: no is not a known key")


@pytest.mark.parametrize("place", [(), ("--runs", "runs"), ("--runs", "../runs")])
def test_a_place_for_runs_that_no_other_machine_sees_is_refused(place: tuple[str, ...]) -> None:
    found = answer("submit", "digits.yaml", *place, "--address", "http://127.0.0.1:1")
    assert found == (
        f"--runs {''.join(place[1:])}: must be the absolute path of a folder that all machines of "
        "the cluster share, or s3://BUCKET/runs"
    )


def test_a_stage_to_repeat_that_is_behind_the_last_one_is_refused() -> None:
    options = ("--until", "teachers", "--again", "distill")
    found = answer("submit", "digits.yaml", *RUNS, *options, "--address", "http://127.0.0.1:1")
    assert found.startswith("--again distill: the command ends at stage teachers, before it")


def test_a_recipe_elsewhere_is_refused(folder: Path) -> None:
    recipe = RECIPES / "digits.yaml"
    found = answer("submit", str(recipe), "--address", "http://127.0.0.1:1")
    assert found == (
        f"recipe {recipe}: is outside the uploaded folder, {folder}; start from the folder that "
        "holds it"
    )


def test_a_recipe_in_a_folder_that_is_not_sent_is_refused(folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "digits.yaml").rename(folder / "data" / "digits.yaml")
    (folder / "mine.py").write_text("")
    found = answer("submit", "data/digits.yaml", "--address", "http://127.0.0.1:1")
    assert found == (
        "recipe data/digits.yaml: is not uploaded, as it is in data/ or Git ignores it; move it"
    )


@contextmanager
def dashboard(answers: dict[str, tuple[int, str]]) -> Iterator[str]:
    """A server that answers paths with a status and a text; the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, text = answers.get(self.path, (404, "no such path"))
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


VERSION = (200, '{"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": "s"}')
NO_TOKEN = (401, "Unauthorized: Missing authentication token")
BAD_TOKEN = (403, "Forbidden: Invalid authentication token")
MISTAKES = {
    "no token": (
        ["jobs"],
        {"/api/version": NO_TOKEN},
        "cluster {}: requires a token; give the head's",
    ),
    "wrong token": (["jobs"], {"/api/version": BAD_TOKEN}, "cluster {}: refuses the token; give"),
    "not a dashboard": (["jobs"], {"/api/version": (200, "hello")}, "cluster {}: "),
    "no such job, logs": (
        ["logs", "nobody"],
        {"/api/version": VERSION, "/api/jobs/": (200, "[]")},
        "job nobody: does not exist at {}; there are: none",
    ),
    "no such job, stop": (
        ["stop", "nobody"],
        {"/api/version": VERSION, "/api/jobs/": (200, "[]")},
        "job nobody: does not exist at {}; there are: none",
    ),
    "head that fails": (["jobs"], {"/api/version": (500, "broken\nmore")}, "cluster {}: "),
}


@pytest.mark.parametrize(("arguments", "answers", "begins"), MISTAKES.values(), ids=MISTAKES)
def test_what_a_cluster_answers_is_one_line(
    arguments: list[str],
    answers: dict[str, tuple[int, str]],
    begins: str,
    sbf: Callable[..., tuple[int, str, str]],
) -> None:
    with dashboard(answers) as address:
        code, _, errors = sbf(*arguments, "--address", address)
    assert (code, errors.count("\n")) == (2, 1), errors
    assert errors.startswith(f"sbf: {begins.format(address)}")


def test_an_upload_that_is_too_large_is_refused_with_the_largest_files(
    folder: Path, sbf: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "MOST_BYTES", 2**20)
    (folder / "large.bin").write_bytes(b"0" * 3 * 2**20)
    code, _, errors = sbf("submit", "digits.yaml", *RUNS, "--address", "http://127.0.0.1:1")
    assert (code, errors.count("\n")) == (2, 1)
    assert errors.startswith(
        f"sbf: folder {folder}: 3 MiB would be uploaded, Ray's limit is 1; the largest files are "
        "large.bin (3.0 MiB), digits.yaml (0.0 MiB); move them"
    )


def test_a_cluster_file_that_is_none_is_refused_before_anything_is_reached(folder: Path) -> None:
    (folder / "list.yaml").write_text("- a\n")
    assert answer("submit", "digits.yaml", *RUNS, "--cluster", "list.yaml") == (
        "cluster file list.yaml: must be a mapping, as `ray up` takes it"
    )
