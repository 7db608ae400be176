"""The MLflow store: reached, and given what journals say; whatever is said twice, stands once."""

import contextlib
import logging
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sbf_dist.errors import UserError
from sbf_dist.tracking.address import DATABASES, Address
from sbf_dist.tracking.database import make_whole
from sbf_dist.tracking.database_lock import alone
from sbf_dist.tracking.journal import Entry

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Metric

logger = logging.getLogger(__name__)

STAGE_TAG = "sbf.stage"
FOLDER_TAG = "sbf.folder"  # of a whole run: the id of its folder
PARENT_TAG = "mlflow.parentRunId"
MAX_PARAM_CHARS = 6000  # of a parameter, in MLflow
_CONTEXT_CHARS, _EXCERPT_CHARS = 30, 60  # of a parameter that is shown because it has changed
MAX_REQUEST_METRICS = 1000
MAX_REQUEST_ENTRIES = 100  # parameters or tags in one request
# MLflow would go on trying one request for minutes; the courier tries again itself.
_LIMITS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}


class StoreAwayError(Exception):
    """The store does not answer, or not now; the message gives its reason."""


class RefusedError(Exception):
    """The store has answered, and will never take this entry."""


class Store(Protocol):
    """What the courier asks of a store; see MlflowStore."""

    experiment_id: str

    def connect(self) -> None: ...
    def has(self, run_id: str) -> bool: ...
    def new_run(self, key: str, about: Entry, parent: str | None) -> str: ...
    def deliver(self, run_id: str, entries: Sequence[Entry], *, again: bool) -> None: ...


class MlflowStore:
    """One experiment of a tracking store, for one thread.

    address     of the store
    experiment  its name
    folder      of the run: where the files of artifacts are, and beside it those of databases
    identifier  of the folder's run, see State

    Every method raises StoreAwayError, or UserError for what only the user can put right.
    """

    def __init__(self, address: Address, experiment: str, folder: Path, identifier: str) -> None:
        self._address = address
        self._experiment_name = experiment
        self._folder = folder
        self._identifier = identifier
        self._connected: MlflowClient | None = None
        self.experiment_id = ""  # known once connected

    def connect(self) -> None:
        """Reach the store, and find or create the experiment."""
        with self._errors():
            self._address.enter_credentials()
            mlflow = quiet_mlflow()
            with alone(self._address):
                database = self._address.database_file
                if database is not None:
                    make_whole(database)
                client = mlflow.MlflowClient(tracking_uri=self._address.uri)
                client.search_experiments(max_results=1)  # makes the tables of other databases
                self.experiment_id = self._experiment(client)
            self._connected = client

    def has(self, run_id: str) -> bool:
        """Whether a run is there; one in another experiment is, unless its files are elsewhere."""
        from mlflow.exceptions import MlflowException

        with self._errors():
            try:
                run = self._client.get_run(run_id)
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    return False
                raise
            if run.info.lifecycle_stage == "deleted":
                raise UserError(
                    f"run {run_id} in {self._address.shown} was deleted: restore it, or remove "
                    f"{self._folder}/tracking.json to start a new one"
                )
            if run.info.experiment_id == self.experiment_id:
                return True
            return self._fits(self._client.get_experiment(run.info.experiment_id))

    def new_run(self, key: str, about: Entry, parent: str | None) -> str:
        """Create the run of `key`, or find the one that was created before a kill; its id."""
        tags = {name: str(value) for name, value in about.get("tags", {}).items()}
        experiment = self.experiment_id
        with self._errors():
            if parent is None:
                own = {FOLDER_TAG: self._identifier}
                filtering = f"tags.`{FOLDER_TAG}` = '{self._identifier}'"
            else:
                own = {PARENT_TAG: parent, STAGE_TAG: key}
                filtering = f"tags.`{PARENT_TAG}` = '{parent}' and tags.`{STAGE_TAG}` = '{key}'"
                experiment = self._client.get_run(parent).info.experiment_id
            found = self._client.search_runs([experiment], filtering, max_results=1)
            if found:
                return found[0].info.run_id
            created = self._client.create_run(
                experiment,
                start_time=about.get("time"),
                run_name=about.get("name", key),
                tags=tags | own,
            )
            return created.info.run_id

    def deliver(self, run_id: str, entries: Sequence[Entry], *, again: bool) -> None:
        """Give the store what some entries say: one of any kind, or several of metrics.

        again: the store may have taken some of it before. RefusedError: it will never take it.
        """
        from mlflow.exceptions import MlflowException

        kind = entries[0]["kind"]
        with self._errors():
            try:
                if kind == "metrics":
                    self._log_metrics(run_id, entries, again=again)
                else:
                    _Deliveries(self._client, self._address, self._folder, run_id)[kind](entries[0])
            except MlflowException as error:
                permanent = error.error_code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
                # Of a run that is deleted, which can be restored, MLflow says the same.
                if not permanent or self._client.get_run(run_id).info.lifecycle_stage == "deleted":
                    raise
                raise RefusedError(self._address.hide(str(error))) from error

    @property
    def _client(self) -> "MlflowClient":
        if self._connected is None:
            raise StoreAwayError("not connected")
        return self._connected

    def _log_metrics(self, run_id: str, entries: Sequence[Entry], *, again: bool) -> None:
        metrics = [metric for entry in entries for metric in _metrics(entry)]
        if again:
            there = {
                (found.key, found.step, found.timestamp)
                for key in sorted({metric.key for metric in metrics})
                for found in self._client.get_metric_history(run_id, key)
            }
            metrics = [m for m in metrics if (m.key, m.step, m.timestamp) not in there]
        for start in range(0, len(metrics), MAX_REQUEST_METRICS):
            self._client.log_batch(run_id, metrics=metrics[start : start + MAX_REQUEST_METRICS])

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what MLflow and the drivers of databases raise into the errors of this class."""
        quiet_mlflow()
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

        shown = self._address.shown
        try:
            yield
        except (ImportError, ArgumentError, NoSuchModuleError) as error:
            raise UserError(f"tracking store {shown}: {self._address.hide(str(error))}") from error
        except MlflowException as error:
            reason = self._address.hide(cause_of(str(error)))
            if error.get_http_status_code() in (401, 403) or "error code 401" in reason:
                raise UserError(
                    f"tracking store {shown}: refuses the credentials; set "
                    "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
                ) from error
            raise StoreAwayError(reason) from error
        except (SQLAlchemyError, sqlite3.Error, OSError) as error:
            raise StoreAwayError(self._address.hide(str(error))) from error

    def _experiment(self, client: "MlflowClient") -> str:
        """Return the id of the experiment; that of NAME-2, … where the files of NAME are elsewhere.

        MLflow keeps the absolute place of an experiment's artifacts. In a database that was moved
        or copied with its folder, that is the old place, which may be somebody else's by now.
        """
        for number in range(1, 1000):
            name = self._experiment_name + (f"-{number}" if number > 1 else "")
            found = client.get_experiment_by_name(name)
            if found is None:
                kind = {"mlflow.experimentKind": "custom_model_development"}
                place = self._artifacts()
                if number > 1:
                    logger.warning(
                        "%s was moved or copied: new runs are in experiment %r, whose artifacts "
                        "are beside it",
                        self._address.shown,
                        name,
                    )
                return client.create_experiment(
                    name, artifact_location=None if place is None else place.as_uri(), tags=kind
                )
            if not self._fits(found):
                continue
            if found.lifecycle_stage == "deleted":
                raise UserError(
                    f"experiment {name!r} in {self._address.shown} was deleted: restore it, or "
                    "name another (tracking.experiment=…)"
                )
            return found.experiment_id
        raise UserError(f"experiment {self._experiment_name!r}: name another")

    def _artifacts(self) -> Path | None:
        """Return the folder for artifacts of a database; a server has a place of its own."""
        if self._address.scheme not in DATABASES:
            return None
        database = self._address.database_file
        beside = self._folder.parent.resolve() if database is None else database.parent
        return beside / "mlflow-artifacts"

    def _fits(self, experiment: "Experiment") -> bool:
        """Whether an experiment's artifacts are where this database is."""
        database = self._address.database_file
        place = experiment.artifact_location
        if database is None or not place.startswith("file:"):
            return True
        from mlflow.utils.file_utils import local_file_uri_to_path

        there = Path(local_file_uri_to_path(place)).parent
        here = database.parent
        return there == here or (there.exists() and here.exists() and there.samefile(here))


class _Deliveries:
    """How a store is given each kind of entry but metrics."""

    def __init__(self, client: "MlflowClient", address: Address, folder: Path, run_id: str) -> None:
        self._client = client
        self._address = address
        self._folder = folder
        self._run_id = run_id

    def __getitem__(self, kind: str) -> Any:
        kinds = {
            "begin": self._begin,
            "params": self._params,
            "artifact": self._artifact,
            "student": self._student,
            "end": self._end,
        }
        if kind not in kinds:
            raise RefusedError(f"entries of the kind {kind!r} are not known to this version")
        return kinds[kind]

    def _begin(self, entry: Entry) -> None:
        """Tags of another value than before become resumed.NAME."""
        self._client.update_run(self._run_id, "RUNNING")
        known = self._client.get_run(self._run_id).data.tags
        self._set_tags(
            {
                (f"resumed.{name}" if name in known else name): value
                for name, value in entry["tags"].items()
                if known.get(name) != value
            }
        )

    def _params(self, entry: Entry) -> None:
        """MLflow's parameters cannot change: another value becomes the tag resumed.NAME."""
        from mlflow.entities import Param

        there = self._client.get_run(self._run_id).data
        known = there.params
        values = {name: _shortened(value) for name, value in entry["params"].items()}
        changed = {n: v for n, v in values.items() if n in known and known[n] != v}
        for name, value in changed.items():
            if there.tags.get(f"resumed.{name}") != value:
                before, after = _differing(known[name], value)
                logger.warning("%s was %s, is %s now", name, before, after)
        self._set_tags({f"resumed.{name}": value for name, value in changed.items()})
        new = [Param(name, value) for name, value in values.items() if name not in known]
        for start in range(0, len(new), MAX_REQUEST_ENTRIES):
            self._client.log_batch(self._run_id, params=new[start : start + MAX_REQUEST_ENTRIES])

    def _artifact(self, entry: Entry) -> None:
        path = self._folder / entry["path"]
        if not path.exists():
            raise RefusedError(f"{path} no longer exists")
        store = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        store(self._run_id, str(path), entry["folder"])

    def _student(self, entry: Entry) -> None:
        from sbf_dist.tracking.model import log_student

        path = self._folder / entry["path"]
        if not path.exists():
            raise RefusedError(f"{path} no longer exists")
        log_student(
            self._client,
            self._address.uri,
            self._run_id,
            path,
            registered_name=entry["registered_name"],
            since=entry["time"],
        )

    def _end(self, entry: Entry) -> None:
        self._client.set_terminated(self._run_id, entry["status"], entry["time"])

    def _set_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        items = [RunTag(name, value) for name, value in tags.items()]
        for start in range(0, len(items), MAX_REQUEST_ENTRIES):
            self._client.log_batch(self._run_id, tags=items[start : start + MAX_REQUEST_ENTRIES])


def quiet_mlflow() -> Any:
    """Import MLflow, quietly: no telemetry, no notes on migrations, git, retries or URLs."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    for name, value in _LIMITS.items():
        os.environ.setdefault(name, value)
    import mlflow

    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Their warnings of attempts that failed come with tracebacks; the last one is an exception.
    for name in ("mlflow.store", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return mlflow


def _metrics(entry: Entry) -> "list[Metric]":
    from mlflow.entities import Metric

    return [
        Metric(name, float(value), entry["time"], entry["step"])
        for name, value in entry["metrics"].items()
    ]


def cause_of(text: str) -> str:
    """Return what stands at the end of the nested messages of a connection that failed."""
    failed = re.search(r"\[Errno -?\d+\] [A-Za-z ]+|[Rr]ead timed out", text)
    return failed[0] if failed and "HTTPConnectionPool" in text else text


def _shortened(value: str, most: int = MAX_PARAM_CHARS) -> str:
    return value if len(value) <= most else value[: most - 1] + "…"


def _differing(before: str, after: str) -> tuple[str, str]:
    """Shorten two texts to where they first differ, and some of what stands before it."""
    pairs = enumerate(zip(before, after, strict=False))
    shorter = min(len(before), len(after))
    same = next((place for place, (one, other) in pairs if one != other), shorter)
    begin = max(0, same - _CONTEXT_CHARS)
    lead = "…" if begin else ""
    first, second = (lead + _shortened(text[begin:], _EXCERPT_CHARS) for text in (before, after))
    return first, second
