"""Experiment tracking with MLflow: runs of runs, that go on where they were.

A pipeline is one parent run and each of its stages a child; both are found again and continued
when the pipeline is started again. Nothing here is process-global, so that a Ray worker can
`attach` to a run that the driver began, knowing its address only.
"""

import contextlib
import fcntl
import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from urllib.parse import urlsplit

from sbf_dist.errors import UserError
from sbf_dist.provenance import origin

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

STAGE_TAG = "sbf.stage"
PARENT_TAG = "mlflow.parentRunId"
MAX_PARAM_CHARS = 6000  # of a parameter, in MLflow
MAX_REQUEST_ENTRIES = 100  # parameters or tags in one request
SERVERS = ("http", "https", "databricks", "databricks-uc")
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


class Address(NamedTuple):
    """What another process needs in order to log to a run."""

    uri: str
    run_id: str


class Run:
    """One MLflow run. Metrics are sent in the background, everything else at once.

    As a context manager it ends the run: FINISHED, or FAILED if an exception passes (KILLED for
    a KeyboardInterrupt). A run that was attached to is only flushed, it belongs to its starter.
    """

    def __init__(self, client: "MlflowClient", address: Address, *, owned: bool) -> None:
        self.address = address
        self._client = client
        self._owned = owned
        self._pending: list[tuple[list[Any], Any]] = []

    def stage(self, name: str, tags: Mapping[str, object] | None = None) -> "Run":
        """Begin the child run `name`, or continue it if this run has one of that name."""
        parent = self._client.get_run(self.address.run_id).info
        found = self._client.search_runs(
            [parent.experiment_id],
            f"tags.`{PARENT_TAG}` = '{parent.run_id}' and tags.`{STAGE_TAG}` = '{name}'",
            max_results=1,
        )
        return _begin(
            self._client,
            self.address.uri,
            found[0].info.run_id if found else None,
            experiment_id=parent.experiment_id,
            name=name,
            tags={PARENT_TAG: parent.run_id, STAGE_TAG: name, **_user_tags(), **(tags or {})},
        )

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters; nested mappings become names with dots, lists JSON.

        MLflow's parameters cannot change: where a continued run has another value, the new one
        is kept as the tag resumed.NAME, and a warning says so.
        """
        from mlflow.entities import Param

        known = self._client.get_run(self.address.run_id).data.params
        values = {name: _shortened(value) for name, value in _flattened(params)}
        changed = {n: v for n, v in values.items() if n in known and known[n] != v}
        for name, value in changed.items():
            logger.warning("%s was %s, is %s now", name, known[name], value)
        self.log_tags({f"resumed.{name}": value for name, value in changed.items()})
        new = [Param(name, value) for name, value in values.items() if name not in known]
        for start in range(0, len(new), MAX_REQUEST_ENTRIES):
            self._client.log_batch(
                self.address.run_id, params=new[start : start + MAX_REQUEST_ENTRIES]
            )

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers (also 0-dimensional tensors) at `step`; returns before they are stored."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, float(value), now, step) for name, value in values.items()]
        operation = self._client.log_batch(self.address.run_id, metrics=metrics, synchronous=False)
        self._pending.append((metrics, operation))

    def log_tags(self, tags: Mapping[str, object]) -> None:
        """Set tags, replacing older values."""
        from mlflow.entities import RunTag

        items = [RunTag(name, str(value)) for name, value in tags.items()]
        for start in range(0, len(items), MAX_REQUEST_ENTRIES):
            self._client.log_batch(
                self.address.run_id, tags=items[start : start + MAX_REQUEST_ENTRIES]
            )

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Store a file, or a folder with all that it holds, under `folder` of the artifacts."""
        store = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        store(self.address.run_id, str(path), folder)

    def log_text(self, text: str, name: str) -> None:
        """Store `text` as the artifact `name`."""
        self._client.log_text(self.address.run_id, text, name)

    def log_dict(self, content: Mapping[str, Any], name: str) -> None:
        """Store `content` as the artifact `name`, as JSON or YAML by the ending of the name."""
        self._client.log_dict(self.address.run_id, dict(content), name)

    def log_figure(self, figure: "Figure", name: str) -> None:
        """Store a matplotlib figure as the artifact `name`; its ending gives the format."""
        self._client.log_figure(self.address.run_id, figure, name)

    def flush(self) -> None:
        """Wait until all metrics are stored; what failed is sent once more, or raises."""
        pending, self._pending = self._pending, []
        for metrics, operation in pending:
            try:
                operation.wait()
            except Exception as error:  # whatever the store's driver raises
                logger.warning("metrics were refused, sending them again: %s", error)
                self._client.log_batch(self.address.run_id, metrics=metrics)

    def finish(self, status: str = "FINISHED") -> None:
        """Flush, and end the run with `status`: FINISHED, FAILED or KILLED."""
        self.flush()
        self._client.set_terminated(self.address.run_id, status)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._owned:
            self.flush()
        elif kind is None:
            self.finish()
        else:
            self.finish("KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")


def start(
    folder: Path,
    name: str,
    *,
    uri: str | None = None,
    experiment: str = "sbf-dist",
    run_id: str | None = None,
    tags: Mapping[str, object] | None = None,
) -> Run:
    """Begin the parent run of a pipeline, or continue `run_id`. For the driver, before workers.

    uri: the tracking server or database; without it MLFLOW_TRACKING_URI, or else
    folder/mlflow.db. Artifacts of a database go to mlflow-artifacts beside it (a server has its
    own place). tags: what is to be known of the run, such as seed and recipe digest; git commit,
    versions and user are added. Raises UserError naming the URI if the store cannot be used.
    """
    uri = tracking_uri(folder, uri)
    with _store_errors(uri):
        client = _connect(uri)
        if run_id is not None and client.get_run(run_id).info.lifecycle_stage == "deleted":
            raise UserError(f"run {run_id} in {uri} was deleted: restore it, or start a new run")
        return _begin(
            client,
            uri,
            run_id,
            experiment_id=_experiment(client, uri, experiment, folder),
            name=name,
            tags={**_user_tags(), **origin(), **(tags or {})},
        )


def attach(uri: str, run_id: str) -> Run:
    """Join a run from another process, to log to it; UserError if it does not exist."""
    with _store_errors(uri):
        client = _connect(uri)
        client.get_run(run_id)
        return Run(client, Address(uri, run_id), owned=False)


def tracking_uri(folder: Path, uri: str | None = None) -> str:
    """Return the tracking URI in use: `uri`, MLFLOW_TRACKING_URI, or a database in `folder`.

    SQLite paths become absolute, because workers run in other directories. Raises UserError
    for a URI that MLflow cannot use.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve()}/mlflow.db"
    scheme = urlsplit(uri).scheme.split("+")[0] or uri
    if scheme not in SERVERS + DATABASES:
        raise UserError(
            f"tracking URI {uri!r} is not a server or database; examples are "
            "http://HOST:5000, postgresql://… or sqlite:///FILE"
        )
    if scheme == "sqlite":
        return f"sqlite:///{Path(uri.split(':///', 1)[1]).resolve()}"
    return uri


def log_student(run: Run, onnx_file: Path, *, registered_name: str | None = None) -> str:
    """Store an exported student as an MLflow model of `run`, and return the model's URI.

    onnx_file: what `sbf_dist.export.onnx.export_onnx` wrote, with a free batch size.
    `mlflow.pyfunc.load_model(uri).predict(images)` then takes uint8 RGB images (N, height,
    width, 3) of the input size and returns "class", "probability" and "probabilities" (see
    sbf_dist.export.sbf_student, which the model carries). It needs mlflow, numpy and onnxruntime,
    neither torch nor sbf_dist. registered_name also enters it into the model registry.
    """
    import numpy as np
    from mlflow.models import infer_signature

    from sbf_dist.export import sbf_student

    mlflow = _mlflow()
    student = sbf_student.Student(onnx_file)
    channels, height, width = student.input_shape
    example = np.random.default_rng(0).integers(0, 256, (2, height, width, channels), np.uint8)
    requirements = [f"{name}=={metadata.version(name)}" for name in ("mlflow", "numpy")]
    requirements.append(f"onnxruntime=={metadata.version('onnxruntime')}")
    uri, run_id = run.address
    client = _connect(uri)
    status = client.get_run(run_id).info.status  # start_run ends the run, which may go on
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        with mlflow.start_run(run_id=run_id, nested=True):
            stored = mlflow.pyfunc.log_model(
                name="student",
                loader_module=sbf_student.__name__.rpartition(".")[2],
                data_path=str(onnx_file),
                code_paths=[sbf_student.__file__],
                signature=infer_signature(example, student.predict(example)),
                input_example=example,
                pip_requirements=requirements,
                registered_model_name=registered_name,
            )
    finally:
        mlflow.set_tracking_uri(before)
        client.update_run(run_id, status)
    return stored.model_uri


def _mlflow() -> Any:
    """Import MLflow, quietly: no telemetry, no notes on migrations, git or its own URLs."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    import mlflow
    import mlflow.pyfunc

    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow


def _connect(uri: str) -> "MlflowClient":
    """Return a client for `uri`; one process at a time creates an SQLite database."""
    mlflow = _mlflow()
    scheme = urlsplit(uri).scheme
    if scheme in ("http", "https"):
        # MLflow itself tries for minutes before it reports that no server answers
        with (
            contextlib.suppress(urllib.error.HTTPError),
            urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=10),
        ):
            pass
    if scheme != "sqlite":
        return mlflow.MlflowClient(tracking_uri=uri)
    database = Path(uri.split(":///", 1)[1])
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(database.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        client = mlflow.MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)  # makes or migrates the tables
    return client


@contextlib.contextmanager
def _store_errors(uri: str) -> Iterator[None]:
    """Turn what goes wrong at the first contact with a store into the user's error."""
    _mlflow()
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"tracking store {_without_password(uri)}: {reason}") from error


def _without_password(uri: str) -> str:
    parts = urlsplit(uri)
    if parts.password is None:
        return uri
    return uri.replace(f":{parts.password}@", ":***@", 1)


def _experiment(client: "MlflowClient", uri: str, name: str, folder: Path) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        scheme = urlsplit(uri).scheme.split("+")[0]
        place = None
        if scheme in DATABASES:
            base = Path(uri.split(":///", 1)[1]).parent if scheme == "sqlite" else folder.resolve()
            place = (base / "mlflow-artifacts").as_uri()
        return client.create_experiment(name, artifact_location=place)
    if found.lifecycle_stage == "deleted":
        raise UserError(f"experiment {name!r} in {uri} was deleted: restore it, or name another")
    return found.experiment_id


def _begin(
    client: "MlflowClient",
    uri: str,
    run_id: str | None,
    *,
    experiment_id: str,
    name: str,
    tags: Mapping[str, object],
) -> Run:
    """Create a run, or continue `run_id`; there, tags of another value become resumed.NAME."""
    texts = {key: str(value) for key, value in tags.items()}
    if run_id is None:
        run_id = client.create_run(experiment_id, run_name=name, tags=texts).info.run_id
        return Run(client, Address(uri, run_id), owned=True)
    run = Run(client, Address(uri, run_id), owned=True)
    client.update_run(run_id, "RUNNING")
    known = client.get_run(run_id).data.tags
    changed = {key: text for key, text in texts.items() if known.get(key) != text}
    run.log_tags({(f"resumed.{k}" if k in known else k): text for k, text in changed.items()})
    return run


def _user_tags() -> dict[str, str]:
    user = os.environ.get("USER") or os.environ.get("LOGNAME") or str(os.getuid())
    return {"mlflow.user": user, "mlflow.source.name": "sbf", "mlflow.source.type": "LOCAL"}


def _flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{name}.")
        elif isinstance(value, list | tuple | set):
            yield name, json.dumps(list(value), default=str)
        else:
            yield name, str(value)


def _shortened(value: str) -> str:
    return value if len(value) <= MAX_PARAM_CHARS else value[: MAX_PARAM_CHARS - 1] + "…"
