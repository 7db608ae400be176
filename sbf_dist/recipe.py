"""The recipe: all settings of a run, read from YAML, checked field by field."""

import hashlib
import json
import typing
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from sbf_dist.distill_recipe import Distill
from sbf_dist.schema import (
    Above0,
    Place,
    Positive,
    RunName,
    Section,
    Seed,
    Share,
    Side,
    equals,
    load_as,
    validate_as,
)
from sbf_dist.settings import Augmentation, Compression, PseudoLabels, View
from sbf_dist.teacher_recipe import SelfTraining, Teacher
from sbf_dist.training_recipe import Training

MAX_BATCH = 2**20  # images per step
KNOWN_SETS = ("cifar10", "cifar100", "tiny-imagenet", "imagenet")  # see sbf data prepare


class Data(Section):
    """The images, their labels and the student's input."""

    source: Literal[
        "digits", "photos", "folder", "cifar10", "cifar100", "tiny-imagenet", "imagenet"
    ] = Field(
        "folder",
        description="'folder': any folder of images; 'digits' and 'photos': the images of "
        "scikit-learn and scikit-image, written as JPEG files first; a set's name: root must be "
        "that set with all its classes (sbf data prepare)",
    )
    root: Place | None = Field(
        None,
        description="folder of images, or a prepared set; s3://BUCKET/FOLDER (gs://, abfs://): "
        "shards that sbf data prepare --format webdataset wrote there; optional for 'digits' and "
        "'photos'",
    )
    unlabelled: Place | None = Field(
        None,
        description="folder with more images, without labels, in any depth; where root is an "
        "address, another one of its bucket",
    )
    labelled_per_class: int | float | None = Field(
        None,
        description="labelled images per class: a number or a share; the others are unlabelled; "
        "null: all",
    )
    split: Path | None = Field(
        None,
        description="list of the labelled images (sbf data split), instead of a number",
    )
    validation: int | float | None = Field(
        None, description="images held out if the folder has no val/: a number or a share"
    )
    image_size: Side = Field(224, description="side of the student's input, pixels")
    crop: Share = Field(
        0.875, description="side of the evaluation crop, share of the image's short side"
    )
    mean: tuple[float, float, float] = Field(
        (0.485, 0.456, 0.406), description="per channel, of pixels in [0, 1]"
    )
    std: tuple[Above0, Above0, Above0] = Field(
        (0.229, 0.224, 0.225), description="per channel, of pixels in [0, 1]"
    )
    augmentation: Augmentation = Augmentation()
    cache: Literal["none", "memory"] = Field(
        "none",
        description="'memory': each worker decodes all images once and keeps them (small images)",
    )
    cache_dir: Path | None = Field(
        None,
        exclude_if=equals(None),
        description="folder on each node's own disk that keeps shards of an object store for all "
        "its workers; null: shards in $SBF_DIST_CACHE, or in ~/.cache/sbf-dist",
    )
    cache_gb: Above0 | None = Field(
        None,
        exclude_if=equals(None),
        description="largest size of cache_dir, GB (10^9 bytes); null: a twentieth of its disk "
        "stays free",
    )
    threads: Positive = Field(1, description="DALI's CPU threads per worker")

    @field_validator("validation", "labelled_per_class", mode="before")
    @classmethod
    def _counts_or_shares(cls, value: Any) -> Any:
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        share = isinstance(value, float) and 0 < value < 1
        if not (value is None or whole or share):
            raise ValueError(f"{value!r} must be a number of images or a share between 0 and 1")
        return value

    @model_validator(mode="after")
    def _has_root(self) -> "Data":
        if (self.source == "folder" or self.expected) and self.root is None:
            raise ValueError(f"root must name a folder of images for source: {self.source}")
        if isinstance(self.root, str) and self.source in ("digits", "photos"):
            raise ValueError(
                f"root = {self.root!r} must be a folder for source: {self.source}, whose images "
                "are written there"
            )
        return self

    @model_validator(mode="after")
    def _chooses_labels_once(self) -> "Data":
        if self.split is not None and self.labelled_per_class is not None:
            raise ValueError(
                f"split = {str(self.split)!r} and labelled_per_class = {self.labelled_per_class} "
                "both choose the labelled images; give one of them, set the other "
                "to null"
            )
        return self

    @property
    def view(self) -> View:
        """How the student sees an image."""
        return View(image_size=self.image_size, mean=self.mean, std=self.std)

    @property
    def expected(self) -> str | None:
        """The set that root must be, if the source is one of known content."""
        return self.source if self.source in KNOWN_SETS else None


class Workers(Section):
    """The processes that Ray Train starts. Not part of a run's identity: they may change."""

    count: int | tuple[int, int] = Field(
        1,
        description="worker processes; [2, 8]: as many of 2 to 8 as there is room for and divide "
        "the batches, chosen at each start",
    )
    cpus: Positive = Field(1, description="CPUs (and threads) per worker")
    gpus: float = Field(0, ge=0, description="GPUs per worker")
    max_failures: int = Field(
        2,
        ge=0,
        description="restarts after errors that workers raised, without a new checkpoint in "
        "between",
    )
    max_lost: int = Field(
        10,
        ge=0,
        description="restarts after workers or machines that died, without a new checkpoint in "
        "between",
    )
    hang_timeout: float = Field(
        600,
        gt=0,
        description="seconds without a step or a heartbeat, after which workers are restarted",
    )
    stop_within: float = Field(
        25, gt=0, description="seconds for a last checkpoint after SIGTERM, SIGHUP or Ctrl-C"
    )
    start_timeout: float = Field(
        600, ge=0, description="seconds to wait until a cluster has room for the workers"
    )

    @field_validator("count", mode="before")
    @classmethod
    def _is_a_number_or_a_range(cls, value: Any) -> Any:
        numbers = value if isinstance(value, list | tuple) else [value]
        if not all(type(number) is int and number >= 1 for number in numbers):
            raise ValueError("must be greater than or equal to 1, or [least, most] of such numbers")
        if isinstance(value, list | tuple) and (len(value) != 2 or value[0] > value[1]):
            raise ValueError("must be a number, or [least, most]")
        return value

    @property
    def least(self) -> int:
        """The smallest number of workers."""
        return self.count if isinstance(self.count, int) else self.count[0]

    @property
    def most(self) -> int:
        """The largest number of workers."""
        return self.count if isinstance(self.count, int) else self.count[1]

    @property
    def count_as_written(self) -> str:
        """The number or the range, as in a recipe."""
        return str(self.count if isinstance(self.count, int) else list(self.count))


class Checkpoints(Section):
    """Which checkpoints of a training are kept. Not part of a run's identity."""

    keep_last: Positive = Field(2, description="newest checkpoints of each training that are kept")
    keep_best: bool = Field(
        False,
        description="evaluate the network at each checkpoint, on all validation images, and keep "
        "the one with the best top-1 as well",
    )


class OneShotCompression(Compression):
    """How a network is compressed in one step: the library's settings, images and timing."""

    latency_batch: int = Field(
        1, ge=1, le=4096, description="images per forward pass that is timed"
    )
    latency_table: Path | None = Field(
        None,
        description="file of measured times; null: latency.json in $SBF_DIST_CACHE, or in "
        "~/.cache/sbf-dist",
    )
    images: Positive = Field(512, description="number of calibration images; they need no labels")


class Compress(OneShotCompression):
    """How one of the teachers is compressed to the student."""

    teacher: str = Field(description="name of the teacher that is compressed")
    rounds: Positive = Field(
        1, description="rounds of compression and training; above 1 only with macs or params"
    )

    @model_validator(mode="after")
    def _counts_in_rounds(self) -> Self:
        if self.rounds > 1 and self.macs is None and self.params is None:
            raise ValueError(
                f"rounds = {self.rounds} needs a budget of macs or params; for a time it must be 1"
            )
        if self.rounds > 1 and self.between is not None:
            raise ValueError(
                f"rounds = {self.rounds} needs between = null: layers with {self.between} "
                "cannot be shrunk again"
            )
        return self


class Tracking(Section):
    """The MLflow server of the run. Not part of a run's identity."""

    uri: str | None = Field(
        None, description="tracking URI; null: MLFLOW_TRACKING_URI, or SQLite under runs/"
    )
    experiment: str = Field(
        "sbf-dist",
        min_length=1,
        max_length=500,  # of a column in MLflow's store
        description="name of the MLflow experiment, of 1 to 500 characters",
    )
    registered_model: str | None = Field(
        None,
        exclude_if=equals(None),
        description="name in MLflow's model registry under which the student is registered; "
        "null: not registered",
    )


class Recipe(Section):
    """A whole run."""

    name: RunName = Field(description="name of the run and its folder")
    seed: Seed = Field(0, description="seed of all random numbers")
    data: Data
    workers: Workers = Workers()
    checkpoints: Checkpoints = Field(Checkpoints(), exclude_if=equals(Checkpoints()))
    teachers: list[Teacher] = Field(min_length=1)
    pseudo_labels: PseudoLabels = PseudoLabels()
    compress: Compress
    distill: Distill
    self_training: SelfTraining | None = Field(
        None,
        exclude_if=equals(None),
        description="further rounds with the student as a teacher; null: none",
    )
    baselines: Training | None = Field(
        None,
        description="training of a dense and an SBF student on the labels alone, to compare",
    )
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) < len(names):
            raise ValueError(f"teachers: names must differ, they are {', '.join(names)}")
        if self.compress.teacher not in names:
            raise ValueError(
                f"compress.teacher = {self.compress.teacher!r} must be one of {', '.join(names)}"
            )
        if self.teachers[names.index(self.compress.teacher)].classes is not None:
            raise ValueError(
                f"compress.teacher = {self.compress.teacher!r} must have the student's classes; "
                "this teacher has others (classes)"
            )
        for where, training in self.trainings().items():
            self._check_batch(where, training, self.workers.least)
            if training.sync_batchnorm and not self.workers.gpus:
                raise ValueError(
                    f"{where}.sync_batchnorm = True needs GPUs, workers.gpus is 0; set it to false"
                )
            if training.precision == "fp16" and not self.workers.gpus:
                raise ValueError(
                    f"{where}.precision = 'fp16' needs GPUs, workers.gpus is 0; take 'bf16' or "
                    "'fp32'"
                )
        if self.compress.rounds > 1:
            fault = self.distill.labels_last_fault(self.distill.round_training())
            if fault is not None:
                raise ValueError(f"distill: between rounds, {fault}")
        return self

    def _check_batch(self, where: str, training: Training, workers: int) -> None:
        """ValueError if a training's batches cannot be divided among so many workers."""
        fault = training.division_fault(workers, pairs=self.data.augmentation.mixes)
        if fault is not None:
            raise ValueError(f"{where}.{fault}")

    @model_validator(mode="after")
    def _has_batches_of_a_size(self) -> "Recipe":
        for where, training in self.trainings().items():
            if training.batch_size > MAX_BATCH:
                raise ValueError(
                    f"{where}.batch_size = {training.batch_size} must be at most {MAX_BATCH}"
                )
        return self

    def numbers_of_workers(self) -> list[int]:
        """Return the numbers in the range of workers.count that divide the batches of all.

        Where steps have images with and without labels, some of these do not divide both: see
        launchers.run.shares.
        """
        return [n for n in range(self.workers.least, self.workers.most + 1) if self.divides(n)]

    def divides(self, workers: int) -> bool:
        """Whether so many workers divide the batches of all trainings."""
        pairs = self.data.augmentation.mixes
        trainings = self.trainings().values()
        return all(one.division_fault(workers, pairs=pairs) is None for one in trainings)

    def trainings(self) -> dict[str, Training]:
        """All trainings, by their place in the recipe."""
        found = {
            f"teachers.{index}.training": teacher.training
            for index, teacher in enumerate(self.teachers)
            if teacher.training is not None
        }
        found["distill.training"] = self.distill.training
        if self.baselines is not None:
            found["baselines"] = self.baselines
        return found

    def identity(self) -> dict[str, Any]:
        """The values that results depend on: all but workers, tracking and caches."""
        elsewhere: dict[str, bool | set[str]] = {
            "workers": True,
            "checkpoints": True,
            "tracking": True,
            "compress": {"latency_table"},
            "data": {"cache", "cache_dir", "cache_gb"},
        }
        return self.model_dump(mode="json", exclude=elsewhere)

    def digest(self) -> str:
        """Return the SHA-256 of the identity, 64 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()


def load(path: Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Read the recipe of a run, as `load_as` does."""
    return load_as(Recipe, path, overrides)


def validate(content: dict[str, Any], overrides: typing.Sequence[str], origin: str) -> Recipe:
    """Return the recipe in `content`, changed by `overrides`; errors begin with `origin`.

    Raises UserError as `load` does.
    """
    return validate_as(Recipe, content, overrides, origin)
