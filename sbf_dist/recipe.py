"""The recipe: all settings of a run, read from YAML, checked field by field."""

import hashlib
import json
import typing
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from sbf_dist.schema import Above0, Name, Positive, Section, Share, equals, load_as, validate_as
from sbf_dist.settings import Augmentation, Compression, Optimizer, PseudoLabels, View

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
    root: Path | None = Field(
        None,
        description="folder of images, or a prepared set; optional for 'digits' and 'photos'",
    )
    unlabelled: Path | None = Field(
        None, description="folder with more images, without labels, in any depth"
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
    image_size: int = Field(224, ge=8, description="side of the student's input, pixels")
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

    count: Positive = Field(1, description="worker processes")
    cpus: Positive = Field(1, description="CPUs (and threads) per worker")
    gpus: float = Field(0, ge=0, description="GPUs per worker")
    max_failures: int = Field(2, ge=0, description="restarts from the last checkpoint per stage")


class Training(Section):
    """One training: length, batches, optimizer, precision."""

    steps: Positive = Field(description="optimizer steps")
    batch_size: Positive = Field(64, description="images per step, all workers together")
    accumulation: Positive = Field(1, description="backward passes per step")
    optimizer: Optimizer = Optimizer()
    schedule: Literal["constant", "cosine", "step"] = Field(
        "cosine", description="learning rate after warm-up"
    )
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="precision of forward passes"
    )
    zero_stage: Literal[0, 1, 2] = Field(1, description="DeepSpeed ZeRO stage")
    log_every: Positive = Field(10, description="steps between two log records")
    checkpoint_every: Positive = Field(500, description="steps between two checkpoints")
    skip_bad_steps: int = Field(
        0,
        ge=0,
        exclude_if=equals(0),
        description="steps that may be left out because their loss is not finite; above 0 the loss "
        "is read in each step, which slows a GPU down",
    )

    @model_validator(mode="after")
    def _warms_up_in_time(self) -> "Training":
        if self.warmup >= self.steps:
            raise ValueError(f"warmup = {self.warmup} must be less than steps = {self.steps}")
        return self


class Teacher(Section):
    """One member of the ensemble: trained on the labels, or loaded from a file."""

    name: Name = Field(description="name of the teacher, its files and its row in the table")
    model: str = Field(
        description="network, e.g. timm:resnet50, cifar_resnet20 or nets/mine.py:function "
        "(sbf_dist.models.build)"
    )
    arguments: dict[str, Any] = Field(
        {},
        exclude_if=equals({}),
        description="further arguments that the network is built with, e.g. in_chans",
    )
    training: Training | None = Field(None, description="training on the labels")
    weights: Path | None = Field(
        None, description="safetensors file or state dict of torch.save, instead of a training"
    )
    image_size: int | None = Field(
        None, ge=8, description="side of its input, pixels; null: the student's"
    )
    mean: tuple[float, float, float] | None = Field(
        None, description="of its input; null: the student's"
    )
    std: tuple[Above0, Above0, Above0] | None = Field(
        None, description="of its input; null: the student's"
    )
    weight: float = Field(1.0, gt=0, description="weight in the ensemble's mean")

    @model_validator(mode="after")
    def _comes_from_somewhere(self) -> "Teacher":
        if (self.training is None) == (self.weights is None):
            raise ValueError("give either training or weights")
        return self


class OneShotCompression(Compression):
    """How a network is compressed in one step: the library's settings, images and timing."""

    latency_batch: Positive = Field(1, description="images per forward pass that is timed")
    latency_table: Path | None = Field(
        None, description="file of measured times; null: sbf-dist/latency.json in the user's cache"
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


class Distill(Section):
    """Training of the SBF student."""

    training: Training
    round_steps: Positive | None = Field(
        None, description="steps of training between rounds; null: a fifth of training.steps"
    )
    targets: Literal["stored", "live"] = Field(
        "stored",
        description="'stored': pseudo-labels; 'live': the teachers' predictions on each crop",
    )
    label_weight: float = Field(
        0.5, ge=0, description="weight of the cross-entropy on labelled images"
    )
    labelled_share: float = Field(
        0.25, ge=0, le=1, description="share of labelled images in a batch"
    )


class Tracking(Section):
    """The MLflow server of the run. Not part of a run's identity."""

    uri: str | None = Field(
        None, description="tracking URI; null: MLFLOW_TRACKING_URI, or SQLite under runs/"
    )
    experiment: str = Field("sbf-dist", description="name of the MLflow experiment")


class Recipe(Section):
    """A whole run."""

    name: Name = Field(description="name of the run and its folder")
    seed: int = Field(0, ge=0, description="seed of all random numbers")
    data: Data
    workers: Workers = Workers()
    teachers: list[Teacher] = Field(min_length=1)
    pseudo_labels: PseudoLabels = PseudoLabels()
    compress: Compress
    distill: Distill
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
        for where, training in self.trainings().items():
            for count in (self.workers.count, self.workers.count * training.accumulation):
                if training.batch_size % count:
                    raise ValueError(
                        f"{where}.batch_size = {training.batch_size} must be a multiple of "
                        f"workers x accumulation = {count}"
                    )
            if self.data.augmentation.mixes and training.batch_size // count % 2:
                raise ValueError(
                    f"{where}.batch_size = {training.batch_size} is {training.batch_size // count} "
                    "images for a worker at once; mixup and cutmix need an even number"
                )
        return self

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
            "tracking": True,
            "compress": {"latency_table"},
            "data": {"cache"},
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
