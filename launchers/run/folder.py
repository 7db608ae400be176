"""The files of a run."""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchers.storage.working_copy import WorkingCopy, cached
from sbf_dist.files import read_json
from sbf_dist.object_storage import is_address

PRETRAINED = "pretrained"  # the folder of published weights
# What is lost with these files is how the recipe differs from the one of a stage that was cut.
_IF_UNCHANGED = (
    "if the recipe and its files are as they were, remove it and run the same command again; "
    "otherwise give another name (name=…)"
)


@dataclass(frozen=True)
class RunFolder:
    """The folder RUNS/NAME of one run; `runs` is shared by all runs.

    copy    where the run is kept in an object store: then the folder is this machine's copy of it
    labels  name of the folder of pseudo-labels
    """

    runs: Path
    name: str
    copy: WorkingCopy | None = None
    labels: str = "pseudo-labels"

    @classmethod
    def at(cls, runs: str, name: str) -> "RunFolder":
        """Return the folder of a run below a folder, or an address. UserError for a wrong one."""
        if is_address(runs):
            return cls(cached("runs", runs), name, WorkingCopy.of(runs, name))
        return cls(Path(runs).absolute(), name)

    @property
    def place(self) -> str:
        """Where the run is kept: a path, or an address."""
        return str(self.root) if self.copy is None else self.copy.store.address

    @property
    def place_of_runs(self) -> str:
        """Where all runs are kept, as `at` takes it."""
        return str(self.runs) if self.copy is None else self.place.rpartition("/")[0]

    @property
    def session(self) -> str:
        """Which driver is at work on this machine's copy; "" where there is no copy."""
        return "" if self.copy is None else self.copy.session

    def publish(self, *parts: str) -> None:
        """Let what has been made on this machine, or parts of it, be kept where the run is."""
        if self.copy is not None:
            self.copy.publish(*parts)

    def fetch(self, *parts: str, driver: str | None = None) -> None:
        """Let this machine have what others have published, of all or of parts of it.

        driver  of a worker's. On any machine but the driver's, the copy has nothing of its own.
        """
        if self.copy is not None:
            self.copy.fetch(*parts, discard=driver not in (None, self.session))

    def remove(self, path: Path) -> None:
        """Remove a file or folder of the run, wherever it is kept; it may be missing."""
        if self.copy is not None:
            self.copy.remove(path)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def is_done(self, stage: str) -> bool:
        """Whether a stage is done; asked before this machine has a copy of the run."""
        if self.copy is not None:
            return self.copy.has(self.result(stage))
        return self.result(stage).exists()

    def has_checkpoints(self, group: str) -> bool:
        """Whether there is a checkpoint of a stage or round, whole or not."""
        if self.copy is not None:
            return self.copy.has(self.checkpoints / group)
        return any((self.checkpoints / group).glob("*/manifest.json"))

    def remove_checkpoints(self, group: str, training: str) -> None:
        """Remove the checkpoints of one training of a stage or round, and what was cut of them."""
        place = self.checkpoints / group
        if self.copy is not None:
            names = self.copy.names_in(place)
        else:
            names = {path.name for path in place.iterdir()} if place.is_dir() else set()
        for name in names:
            # Earlier versions named them checkpoint_N, whatever the training.
            own = re.fullmatch(rf"\.?{re.escape(training)}-\d+(\..*)?", name)
            if own or name.startswith("checkpoint_"):
                self.remove(place / name)

    @property
    def root(self) -> Path:
        return self.runs / self.name

    @property
    def recipe(self) -> Path:
        """The recipe that the run was last done with, all defaults filled in."""
        return self.root / "recipe.json"

    @property
    def read_files(self) -> Path:
        """The digests of the files that this recipe names, by their keys."""
        return self.root / "read-files.json"

    @property
    def tracking(self) -> Path:
        """Which MLflow run belongs to the folder."""
        return self.root / "tracking.json"

    @property
    def index(self) -> Path:
        return self.root / "data"

    @property
    def pseudo_labels(self) -> Path:
        return self.root / self.labels

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    def round_plan(self, number: int) -> Path:
        """Return the file of the plan of one round of a network that is shrunk in rounds."""
        return self.root / "plans" / f"round-{number}.json"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def place_of_checkpoints(self) -> Path | str:
        """Where checkpoints are kept, an address in an object store."""
        return self.checkpoints if self.copy is None else f"{self.place}/checkpoints"

    @property
    def files_of_ray(self) -> Path:
        """Where Ray Train keeps files of its own on this machine, in a folder that is removed."""
        return self.checkpoints if self.copy is None else self.root

    @property
    def logs(self) -> Path:
        """What workers had logged that failed, and what libraries have printed."""
        return self.root / "logs"

    @property
    def library_log(self) -> Path:
        """What libraries have printed in the driver, and in workers of a cluster."""
        return self.logs / "libraries.log"

    @property
    def worker_log(self) -> Path:
        """What the workers, and servers, of a Ray on this machine have printed."""
        return self.logs / "workers.log"

    @property
    def student(self) -> Path:
        """The exported student."""
        return self.root / "student"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    @property
    def page(self) -> Path:
        """The page on the run."""
        return self.root / "report.html"

    def weights(self, network: str) -> Path:
        """Return the file of a network's weights."""
        return self.root / "weights" / f"{network}.safetensors"

    @property
    def temperatures(self) -> Path:
        """The fitted temperatures of the teachers that the pseudo-labels are of."""
        return self.pseudo_labels / "temperatures.json"

    def pretrained(self, model: str, arguments: Mapping[str, Any]) -> Path:
        """Return the file of the weights that a library has published for a model."""
        name = model.replace(":", "-")
        if arguments:
            text = json.dumps(dict(arguments), sort_keys=True)
            name = f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        return self.root / PRETRAINED / f"{name}.safetensors"

    def training(self, network: str) -> Path:
        """Return the file that says what the training of a network came to."""
        return self.root / "trainings" / f"{network}.json"

    def result(self, stage: str) -> Path:
        """Return the file whose existence says that a stage is done, with its result."""
        return self.root / "stages" / f"{stage}.json"

    def read_result(self, stage: str) -> dict[str, Any]:
        """Return the result of a stage that is done. UserError if it is damaged."""
        return read_json(self.result(stage), "`sbf run` makes it anew")

    def read_recipe(self) -> dict[str, Any]:
        """Return the recipe that the run was last done with. UserError if it is damaged."""
        return read_json(self.recipe, _IF_UNCHANGED)

    def read_digests(self) -> dict[str, Any]:
        """Return the digests of its files; earlier versions kept none. UserError if damaged."""
        return read_json(self.read_files, _IF_UNCHANGED) if self.read_files.exists() else {}
