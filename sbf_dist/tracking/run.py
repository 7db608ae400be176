"""Runs of runs, as stages and workers see them: what they log goes to journals in the run folder.

A pipeline is one parent run and each of its stages a child; both are found again and continued
when the pipeline is started again.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sbf_dist.errors import without_credentials
from sbf_dist.files import write_text
from sbf_dist.provenance import origin
from sbf_dist.tracking import journal
from sbf_dist.tracking.address import tracking_address
from sbf_dist.tracking.courier import ARTIFACTS, Courier
from sbf_dist.tracking.journal import Journal, metrics_entry
from sbf_dist.tracking.state import WHOLE_RUN, State
from sbf_dist.tracking.store import MlflowStore

logger = logging.getLogger(__name__)

START_SECONDS = 60.0  # for which the start of a run waits for the store
END_SECONDS = 30.0  # and its end, as long as it is silent
INTERRUPTED_SECONDS = 3.0  # and its end, when it was interrupted or the store never answered


class Run:
    """One MLflow run, in the driver. What is logged is in the run folder when a method returns.

    As a context manager it ends the run: FINISHED, or FAILED if an exception passes (KILLED for
    a KeyboardInterrupt). The end of the whole run, the parent, waits for the store a while.
    """

    def __init__(self, folder: Path, key: str, state: State, courier: Courier) -> None:
        self.journals = folder / state.path.stem / key
        self._folder = folder
        self._key = key
        self._state = state
        self._courier = courier
        self._journal = Journal(self.journals)
        self._artifacts = Journal(self.journals / ARTIFACTS)
        self._series = Series(self.journals, self._journal)

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until the store has answered."""
        return self._state.run_ids.get(self._key)

    @property
    def page(self) -> str | None:
        """Where the experiment's runs are among the pages of MLflow's server; None as run_id is.

        Without the last part MLflow 3 opens on its pages for language models, whatever the
        experiment's tag mlflow.experimentKind says.
        """
        experiment = self._courier.experiment_id
        if not experiment:
            return None
        return f"#/experiments/{experiment}/runs?workflowType=machine_learning"

    @property
    def uri(self) -> str:
        """The tracking store, without credentials."""
        return self._state.uri

    def stage(self, name: str, tags: Mapping[str, object] | None = None) -> "Run":
        """Begin the child run `name`, or continue it if this run has one of that name."""
        run = Run(self._folder, self._state.key(name), self._state, self._courier)
        run.begin({**_user_tags(), **(tags or {})})
        return run

    def attempt(self, stage: str) -> int:
        """Return how often a stage was begun anew: the step of what the whole run says of it."""
        return self._state.attempts.get(stage, 0)

    def begin(self, tags: Mapping[str, object]) -> None:
        """Say that the run is at work, from now on."""
        name = self._folder.name if self._key == WHOLE_RUN else self._key
        self._say("begin", name=name, tags=_texts(tags))

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters; nested mappings become names with dots, lists JSON.

        MLflow's parameters cannot change: where a continued run has another value, the new one
        is kept as the tag resumed.NAME, and a warning says so. User and password of URLs are left
        out.
        """
        self._say("params", params=_texts(dict(_flattened(params))))

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers (also 0-dimensional tensors) at `step`, as Series does."""
        self._series.log_metrics(values, step)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Store a file, or a folder with all that it holds, under `folder` of the artifacts.

        It is read when the store takes it, so it must stay where it is.
        """
        self._say("artifact", self._artifacts, path=self._place(path), folder=folder)

    def log_text(self, text: str, name: str) -> None:
        """Store `text` as the artifact `name`."""
        path = self.journals / ARTIFACTS / name
        write_text(path, text)
        folder = str(Path(name).parent)
        self.log_artifact(path, None if folder == "." else folder)

    def log_student(self, onnx_file: Path, *, registered_name: str | None = None) -> None:
        """Store an exported student as an MLflow model of the run; see model.log_student."""
        where = self._place(onnx_file)
        self._say("student", self._artifacts, path=where, registered_name=registered_name)

    def flush(self, seconds: float = END_SECONDS) -> bool:
        """Wait until the store has all of the whole run, `seconds` at most; whether it has."""
        return self._courier.wait(seconds)

    def finish(self, status: str = "FINISHED") -> None:
        """End the run with `status`: FINISHED, FAILED or KILLED."""
        self._say("end", status=status)
        self._journal.close()
        self._artifacts.close()
        if self._key != WHOLE_RUN:
            return
        patient = self._courier.reached and status != "KILLED"
        if not self._courier.wait(END_SECONDS if patient else INTERRUPTED_SECONDS):
            logger.warning(
                "%s are kept in %s; they are delivered to %s at the next start of the run",
                self._courier.waiting(),
                self.journals.parent,
                self.uri,
            )
        self._courier.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.finish("KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")

    def _say(self, kind: str, to: Journal | None = None, **values: Any) -> None:
        (to or self._journal).append({"kind": kind, "time": journal.now(), **values})

    def _place(self, path: Path) -> str:
        """A path in the run folder is kept relative to it, so that it can be moved."""
        path, folder = path.absolute(), self._folder.absolute()
        return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


class Series:
    """The metrics that one process logs to a run, by the folder of its journals.

    No series goes back: after a resume, points up to the last one that was logged are left out.
    """

    def __init__(self, journals: Path, own: Journal | None = None) -> None:
        self._journal = own or Journal(journals)
        self._last: dict[str, int] = {}
        for file in journal.files(journals):
            for entry, _ in journal.read(file):
                for name in entry.get("metrics", ()):
                    self._last[name] = max(entry["step"], self._last.get(name, entry["step"]))

    def last_step(self, name: str) -> int | None:
        """Return the last step at which a metric was logged; None: it never was."""
        return self._last.get(name)

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers (also 0-dimensional tensors) at `step`, but for those that have one there."""
        new = {n: v for n, v in values.items() if n not in self._last or step > self._last[n]}
        if new:
            self._journal.append(metrics_entry(new, step))
            self._last |= dict.fromkeys(new, step)

    def flush(self) -> None:
        """Let what was logged survive a loss of power."""
        self._journal.sync()


def attach(journals: str) -> Series:
    """Log to a run from another process, by the folder Run.journals."""
    return Series(Path(journals))


def start(
    folder: Path,
    *,
    uri: str | None = None,
    experiment: str = "sbf-dist",
    tags: Mapping[str, object] | None = None,
    kept: Callable[[Path], int] | None = None,
    address: str = "",
) -> Run:
    """Begin the parent run of a pipeline, or continue the one of its folder. For the driver.

    folder: of the run; its name is the run's. uri: the tracking server or database; without it
    MLFLOW_TRACKING_URI, or else mlflow.db beside the folder. Artifacts of a database go to
    mlflow-artifacts beside it (a server has its own place). tags: what is to be known of the run,
    such as seed and recipe digest; git commit, versions and user are added. kept: see Courier.
    address: of the object store in which the folder is kept.

    A store that does not answer is a warning: everything waits in the folder until it does.
    UserError, which names the URI, for a store that cannot be used.
    """
    store_address = tracking_address(folder.parent, uri)
    state = State.load(folder / "tracking.json")
    state.uri = store_address.shown
    state.address = address
    state.save()
    store = MlflowStore(store_address, experiment, folder, state.id)
    courier = Courier(folder / state.path.stem, state, store, store_address.shown, kept)
    run = Run(folder, WHOLE_RUN, state, courier)
    run.begin({**_user_tags(), **origin(), **(tags or {})})
    courier.start()
    if not courier.first_try.wait(START_SECONDS):
        courier.first_try.set()
        logger.warning(
            "tracking store %s has not answered for %.0f s; metrics are kept in %s",
            store_address.shown,
            START_SECONDS,
            run.journals.parent,
        )
    if courier.error is not None:
        courier.close()
        raise courier.error
    return run


def _user_tags() -> dict[str, str]:
    user = os.environ.get("USER") or os.environ.get("LOGNAME") or str(os.getuid())
    return {"mlflow.user": user, "mlflow.source.name": "sbf", "mlflow.source.type": "LOCAL"}


def _texts(values: Mapping[str, object]) -> dict[str, str]:
    return {name: without_credentials(str(value)) for name, value in values.items()}


def _flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{name}.")
        elif isinstance(value, list | tuple | set):
            yield name, json.dumps(list(value), default=str)
        else:
            yield name, str(value)
