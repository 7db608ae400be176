"""What a file for `ray up` says, and how an MLflow server is reached."""

from pathlib import Path

import pytest

from launchers.on_ray.cluster_file import how_to_open, mlflow_of
from sbf_dist.errors import UserError

ON_PREMISES = Path(__file__).parents[3] / "launchers" / "cluster-onprem.yaml"


def test_the_server_is_the_one_that_rays_processes_on_the_head_are_told() -> None:
    assert mlflow_of(ON_PREMISES) == "http://127.0.0.1:5000"


def test_a_cluster_may_have_none(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("cluster_name: a\nworker_start_ray_commands: [MLFLOW_TRACKING_URI=http://b]\n")
    assert mlflow_of(file) is None


@pytest.mark.parametrize(
    ("text", "what"),
    [("a: [", "is not YAML: "), ("- a", "must be a mapping"), (None, "cannot be read")],
)
def test_another_file_is_refused_in_one_line(tmp_path: Path, text: str | None, what: str) -> None:
    file = tmp_path / "cluster.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError) as caught:
        mlflow_of(file)
    assert str(caught.value).startswith(f"cluster file {file}: {what}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "file", "line"),
    [
        ("http://u:secret@mlflow:5000", "c.yaml", "MLflow http://***@mlflow:5000"),
        (
            "http://127.0.0.1:5000",
            "c.yaml",
            "MLflow http://127.0.0.1:5000 on the head; bring it here: bin/ray dashboard c.yaml "
            "--port 5000 --remote-port 5000",
        ),
        (
            "http://localhost",
            None,
            "MLflow http://localhost on the head; bring it here: ssh -N -L 80:127.0.0.1:80 HEAD",
        ),
    ],
)
def test_a_server_on_the_heads_loopback_must_be_brought_here(
    uri: str, file: str | None, line: str
) -> None:
    assert how_to_open(uri, Path(file) if file else None, "bin/ray") == line
