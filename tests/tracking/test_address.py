import re
from pathlib import Path

import pytest

from sbf_dist import tracking
from sbf_dist.errors import UserError, without_credentials


@pytest.fixture(autouse=True)
def no_uri_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_relative_sqlite_uri_is_made_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = f"sqlite:///{tmp_path}/a/my.db"
    assert tracking.tracking_address(tmp_path, "sqlite:///a/my.db").uri == expected
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert tracking.tracking_address(tmp_path).uri == "http://tracking:5000"
    assert tracking.tracking_address(tmp_path, "sqlite:///a/my.db").uri == expected


def test_the_default_is_a_database_in_the_folder(tmp_path: Path) -> None:
    assert tracking.tracking_address(tmp_path).uri == f"sqlite:///{tmp_path}/mlflow.db"


def test_a_servers_credentials_are_taken_out_of_its_uri(tmp_path: Path) -> None:
    found = tracking.tracking_address(tmp_path, "https://me:a%40b@host:8443/mlflow")
    assert found.uri == found.shown == "https://host:8443/mlflow"
    assert (found.user, found.password) == ("me", "a@b")
    assert "a@b" not in repr(found)


def test_a_databases_credentials_stay_in_its_uri_and_are_not_shown(tmp_path: Path) -> None:
    found = tracking.tracking_address(tmp_path, "postgresql+psycopg://me:secret@host/name")
    assert found.uri == "postgresql+psycopg://me:secret@host/name"
    assert found.shown == "postgresql+psycopg://***@host/name"
    assert "secret" not in repr(found)
    assert found.hide("login of\n me with secret failed") == "login of me with *** failed"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        (
            "postgresql://127.0.0.1:1/db?user=u&password=p4ss",
            "postgresql://127.0.0.1:1/db?user=u&password=***",
        ),
        (
            "postgresql://h/db?user=me@host&sslpassword=p4ss&sslmode=require",
            "postgresql://h/db?user=me@host&sslpassword=***&sslmode=require",
        ),
        ("http://127.0.0.1:9/x?access_token=p4ss", "http://127.0.0.1:9/x?access_token=***"),
        ("https://h?X-Api-Key=p4ss", "https://h?X-Api-Key=***"),
        (
            "mssql+pyodbc:///?odbc_connect=DRIVER%3D%7BODBC%7D%3BUID%3Du%3BPWD%3Dp4ss&x=1",
            "mssql+pyodbc:///?odbc_connect=***&x=1",
        ),
    ],
)
def test_secret_parameters_stay_in_a_uri_and_are_not_shown(
    uri: str, shown: str, tmp_path: Path
) -> None:
    found = tracking.tracking_address(tmp_path, uri)
    assert (found.uri, found.shown) == (uri, shown)
    for text in (repr(found), found.hide(f"no answer of {uri} ('p4ss')")):
        assert "p4ss" not in text
    assert without_credentials(f"no '{uri}': refused") == f"no '{shown}': refused"
    assert without_credentials(f"no {uri}: refused") == f"no {shown}: refused"


def test_a_secret_parameter_is_not_shown_decoded_either(tmp_path: Path) -> None:
    found = tracking.tracking_address(tmp_path, "postgresql://h/db?password=a%20b%2Fc&user=a")
    assert found.hide("login of a with a b/c, a%20b%2Fc") == "login of a with ***, ***"


@pytest.mark.parametrize(
    "password", ["p4/ss", "12/ss", "p4?ss", "12#ss", "p4[ss", "p4 s/s", "p'4/ss"]
)
@pytest.mark.parametrize("scheme", ["http", "postgresql"])
def test_a_password_that_should_have_been_encoded_is_not_echoed(
    scheme: str, password: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        tracking.tracking_address(tmp_path, f"{scheme}://u:{password}@h:5000")
    said, _, examples = str(caught.value).partition("; examples are ")
    assert said.startswith(f"tracking URI '{scheme}://***@h:5000': has a user or password in which")
    assert examples.startswith("http://HOST:5000")
    assert not re.search("p4|12|ss(?!word)|p'", said)


def test_text_around_addresses_is_left_as_it_is() -> None:
    for text in (
        "s3://bucket/runs@v2/tiny is no run; give another",
        "http://host:5000/#/experiments/1; key = 3 of me@host",
        "what?; see https://host/a?page=2&sort=name",
    ):
        assert without_credentials(text) == text
    assert without_credentials("of http://u:p4/ss@h:1/x, not s3://k:s@b") == (
        "of http://***@h:1/x, not s3://***@b"
    )


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("mlruns", "is not a server or database"),
        ("file:///tmp/mlruns", "is not a server or database"),
        ("/tmp/mlruns", "is not a server or database"),
        ("sqlite:foo.db", "names no file after sqlite:///"),
        ("sqlite://", "names no file after sqlite:///"),
        ("http://[::1", "Invalid IPv6 URL"),
        ("http://host:port", "Port could not be cast"),
        ("http://host:70000", "Port out of range"),
        ("http://", "names no host"),
    ],
)
def test_a_uri_that_mlflow_cannot_use_is_refused(uri: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        tracking.tracking_address(tmp_path, uri)
    assert str(caught.value).startswith(f"tracking URI {uri!r}: {reason}")
    assert "examples are http://HOST:5000" in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("sqlite:////proc/nothing/mlflow.db", "sqlite:////proc/nothing/mlflow.db"),
        ("mysql://u:secret@h/x", "mysql://***@h/x"),
    ],
)
def test_a_store_that_cannot_be_used_is_named_without_its_password(
    uri: str, shown: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        tracking.start(tmp_path, uri=uri)
    assert shown in str(caught.value)
    assert "secret" not in str(caught.value)
