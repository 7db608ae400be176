"""The files of a run."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """The folder RUNS/NAME of one run; `runs` is shared by all runs."""

    runs: Path
    name: str

    @property
    def root(self) -> Path:
        return self.runs / self.name

    @property
    def recipe(self) -> Path:
        """The recipe that the run was last done with, all defaults filled in."""
        return self.root / "recipe.json"

    @property
    def tracking(self) -> Path:
        """Which MLflow run belongs to the folder."""
        return self.root / "tracking.json"

    @property
    def index(self) -> Path:
        return self.root / "data"

    @property
    def pseudo_labels(self) -> Path:
        return self.root / "pseudo-labels"

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
    def logs(self) -> Path:
        """What workers had logged that failed."""
        return self.root / "logs"

    @property
    def student(self) -> Path:
        """The exported student."""
        return self.root / "student"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    def weights(self, network: str) -> Path:
        """Return the file of a network's weights."""
        return self.root / "weights" / f"{network}.safetensors"

    def training(self, network: str) -> Path:
        """Return the file that says what the training of a network came to."""
        return self.root / "trainings" / f"{network}.json"

    def result(self, stage: str) -> Path:
        """Return the file whose existence says that a stage is done, with its result."""
        return self.root / "stages" / f"{stage}.json"
