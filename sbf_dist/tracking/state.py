"""tracking.json: which MLflow runs belong to a run folder, and how far journals are delivered."""

import json
import logging
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sbf_dist.files import write_json

logger = logging.getLogger(__name__)

WHOLE_RUN = "run"  # the key of the parent of the stages' runs


@dataclass
class State:
    """What is known of the MLflow runs of a folder. A key stands for one of them, and its journals.

    id        of this folder's run, in a tag of its MLflow run
    uri       of the store, without credentials, to be read by people
    run_ids   of MLflow, by key
    attempts  how often a stage was begun anew, by its name
    sent      bytes of a journal that MLflow has, by KEY/FILE
    address   where the folder is kept, if that is an object store: of it, any number of machines
              have a copy
    recovered whether the id of the whole run is a checkpoint's, and not yet found in MLflow
    """

    path: Path
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    uri: str = ""
    run_ids: dict[str, str] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)
    address: str = ""
    recovered: bool = False

    @classmethod
    def load(cls, path: Path) -> "State":
        """Read a state. A damaged file counts as none, with a warning; so does that of a copy.

        Without one, journals in the folder tell how often stages were begun anew.

        A folder that was moved is what it was; one that was copied says different things from now
        on than its original, and must not say them in the original's MLflow run.
        """
        nothing = cls(path, attempts=_attempts(path.with_suffix("")))
        if not path.exists():
            return nothing
        try:
            known = json.loads(path.read_text())
            state = cls._of(path, known)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            logger.warning("%s is damaged (%s): ignored", path, error)
            return nothing
        original = Path(str(known.get("folder", path.parent)))
        if not state.address and original != path.parent and _is_of(original / path.name, state.id):
            logger.warning(
                "run folder %s is a copy of %s: it gets an MLflow run of its own",
                path.parent,
                original,
            )
            return cls(path, attempts=state.attempts)
        return state

    @classmethod
    def _of(cls, path: Path, known: Any) -> "State":
        if not isinstance(known, dict):
            raise TypeError("not a mapping")
        if "id" not in known:  # an older version kept the run's id alone
            return cls(path, run_ids={WHOLE_RUN: str(known["run_id"])} if "run_id" in known else {})
        return cls(
            path,
            str(known["id"]),
            str(known["uri"]),
            {str(k): str(v) for k, v in known["run_ids"].items()},
            {str(k): int(v) for k, v in known["attempts"].items()},
            {str(k): int(v) for k, v in known["sent"].items()},
            str(known.get("address", "")),
            bool(known.get("recovered", False)),
        )

    def save(self) -> None:
        """Write the state; a kill leaves the one before."""
        content = {
            "uri": self.uri,
            "run_id": self.run_ids.get(WHOLE_RUN),
            "id": self.id,
            "folder": str(self.path.parent),
            "run_ids": self.run_ids,
            "attempts": self.attempts,
            "sent": self.sent,
            "address": self.address,
        } | ({"recovered": True} if self.recovered else {})
        write_json(self.path, content)

    def key(self, stage: str) -> str:
        """Return the key of a stage's newest run."""
        again = self.attempts.get(stage, 0)
        return f"{stage}-{again + 1}" if again else stage

    def forget(self, key: str) -> None:
        """Let a run be made anew, and everything said in it again."""
        self.run_ids.pop(key, None)
        self.sent = {k: v for k, v in self.sent.items() if not k.startswith(f"{key}/")}


def begin_anew(path: Path, stages: Iterable[str]) -> None:
    """Give stages that are done anew MLflow runs of their own; `path`: of tracking.json.

    A stage that was never begun has none yet.
    """
    state = State.load(path)
    journals = path.with_suffix("")
    from_before = WHOLE_RUN in state.run_ids and not journals.exists()  # of an older version
    for stage in stages:
        if from_before or (journals / state.key(stage)).exists():
            state.attempts[stage] = state.attempts.get(stage, 0) + 1
    state.save()


def recover(path: Path, run_of_checkpoints: Callable[[], str | None]) -> None:
    """Let a folder without MLflow run, as its tracking.json is gone, go on with the one it had.

    path: of tracking.json. run_of_checkpoints: gives the run's id, if it is known; it is asked
    only where the file is missing or damaged.
    """
    if _is_whole(path):
        return
    run_id = run_of_checkpoints()
    if run_id is None:
        return
    state = State.load(path)
    logger.warning("%s was lost: continuing MLflow run %s, which a checkpoint names", path, run_id)
    state.run_ids[WHOLE_RUN] = run_id
    state.recovered = True
    state.save()


def _is_whole(path: Path) -> bool:
    try:
        State._of(path, json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return False
    return True


def _attempts(journals: Path) -> dict[str, int]:
    """Return how often stages were begun anew, by the folders of their journals."""
    found: dict[str, int] = {}
    for folder in journals.iterdir() if journals.is_dir() else ():
        stage, dash, number = folder.name.rpartition("-")
        if dash and number.isdecimal() and int(number) > 1:
            found[stage] = max(int(number) - 1, found.get(stage, 0))
    return found


def _is_of(path: Path, identifier: str) -> bool:
    try:
        return bool(json.loads(path.read_text()).get("id") == identifier)
    except (OSError, ValueError, AttributeError):
        return False
