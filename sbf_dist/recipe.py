"""The recipe: all settings of a run, read from YAML, checked field by field."""

import hashlib
import json
import math
import typing
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from sbf_dist.errors import UserError
from sbf_dist.schema import (
    Above0,
    Name,
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
from sbf_dist.settings import Augmentation, Compression, Optimizer, PseudoLabels, View

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

    count: int | tuple[int, int] = Field(
        1,
        description="worker processes; [2, 8]: as many of 2 to 8 as have a place and divide the "
        "batches, anew at each start",
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
        description="seconds without a step, or without an answer, after which workers are started "
        "again",
    )
    stop_within: float = Field(
        25, gt=0, description="seconds for a last checkpoint after SIGTERM, SIGHUP or Ctrl-C"
    )
    start_timeout: float = Field(
        600, ge=0, description="seconds that a cluster may take to have places for the workers"
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


class Training(Section):
    """One training: length, batches, optimizer, precision."""

    steps: Positive | None = Field(None, description="optimizer steps; or give epochs")
    epochs: Above0 | None = Field(
        None,
        exclude_if=equals(None),
        description="length in passes over the images, instead of steps; with several streams "
        "(labelled, unlabelled) over the one that takes longest",
    )
    batch_size: Positive = Field(64, description="images per step, all workers together")
    accumulation: Positive = Field(1, description="backward passes per step")
    images_at_once: Positive | None = Field(
        None,
        exclude_if=equals(None),
        description="largest number of images that a worker runs at once, instead of accumulation: "
        "fewer workers take more passes per step; null: accumulation says how many",
    )
    optimizer: Optimizer = Optimizer()
    schedule: Literal["constant", "cosine", "step", "one_cycle"] = Field(
        "cosine", description="learning rate after warm-up"
    )
    milestones: list[Share] = Field(
        [0.5, 0.75],
        exclude_if=equals([0.5, 0.75]),
        description="of schedule 'step': when the rate falls, shares of the training",
    )
    factor: Share = Field(
        0.1, exclude_if=equals(0.1), description="of schedule 'step': what the rate falls by"
    )
    warmup: int = Field(0, ge=0, description="steps of warm-up, linear (one_cycle: half a cosine)")
    warmup_epochs: float | None = Field(
        None, ge=0, exclude_if=equals(None), description="warm-up in epochs, instead of steps"
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        exclude_if=equals(0.0),
        description="share of a label that is given to all classes alike",
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        exclude_if=equals(None),
        description="decay of a moving average of the weights, e.g. 0.999, which is what is "
        "evaluated and exported then; null: off",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="precision of forward passes"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="DeepSpeed ZeRO stage")
    sync_batchnorm: bool = Field(
        False,
        exclude_if=equals(False),
        description="batch norm over the images of all GPUs; without GPUs the workers' statistics "
        "are averaged before each checkpoint and at the end",
    )
    compile: bool = Field(
        False,
        exclude_if=equals(False),
        description="torch.compile the network; takes a minute or so at the start",
    )
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
    def _has_one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs, and set the other to null")
        if self.warmup and self.warmup_epochs is not None:
            raise ValueError(
                f"warmup = {self.warmup} and warmup_epochs = {self.warmup_epochs} both say how "
                "long the warm-up is; give one of them"
            )
        if self.steps is not None and self.warmup >= self.steps:
            raise ValueError(f"warmup = {self.warmup} must be less than steps = {self.steps}")
        if self.epochs is not None and (self.warmup_epochs or 0) >= self.epochs:
            raise ValueError(
                f"warmup_epochs = {self.warmup_epochs} must be less than epochs = {self.epochs:g}"
            )
        return self

    @model_validator(mode="after")
    def _accumulates_by_one_rule(self) -> Self:
        if self.images_at_once is not None and self.accumulation > 1:
            raise ValueError(
                f"accumulation = {self.accumulation} and images_at_once = {self.images_at_once} "
                "both say how many passes a step takes; give one of them"
            )
        return self

    @model_validator(mode="after")
    def _suits_its_stage(self) -> Self:
        if self.optimizer.name == "lamb" and self.zero_stage:
            raise ValueError(
                f"zero_stage = {self.zero_stage} does not suit optimizer.name = lamb, which scales "
                "each layer's step as a whole; ZeRO 1 to 3 cut layers up; set zero_stage to 0, or "
                "take sgd or adamw"
            )
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "zero_stage = 3 does not suit compile = True, which needs the weights in one "
                "place; set zero_stage to 0, 1 or 2"
            )
        return self

    def passes(self, workers: int, *, pairs: bool = False) -> int:
        """Backward passes per step on so many workers; `pairs`: of even batches (mixup, cutmix).

        UserError names the batch sizes and the numbers of workers that would divide.
        """
        fault = self.division_fault(workers, pairs=pairs)
        if fault is not None:
            raise UserError(fault)
        return min(self._possible_passes(workers, pairs=pairs))

    def division_fault(self, workers: int, *, pairs: bool) -> str | None:
        """Why so many workers cannot share a step's images out alike, and what would be right."""
        if self._possible_passes(workers, pairs=pairs):
            return None
        known = range(1, self.batch_size + 1)
        near = [n for n in known if n < workers and self._possible_passes(n, pairs=pairs)][-4:]
        near += [n for n in known if n > workers and self._possible_passes(n, pairs=pairs)][:4]
        unit = workers * self.accumulation
        least = unit * 2 if pairs else unit
        below = self.batch_size // least * least
        right = " or ".join(str(size) for size in (below, below + least) if size)
        if near:
            right += f", or {', '.join(map(str, near))} workers"
        if self.batch_size % unit:
            return (
                f"batch_size = {self.batch_size} must be a multiple of workers x accumulation = "
                f"{unit}: {right}"
            )
        if self.images_at_once == 1:
            return "images_at_once = 1 must be at least 2: mixup and cutmix need an even number"
        return (
            f"batch_size = {self.batch_size} is {self.batch_size // unit} images for a worker at "
            f"once; mixup and cutmix need an even number: {right}"
        )

    def _possible_passes(self, workers: int, *, pairs: bool) -> list[int]:
        """The passes that divide a worker's images of a step into equal and allowed batches."""
        images, rest = divmod(self.batch_size, workers)
        wanted = range(1, images + 1) if self.images_at_once else [self.accumulation]
        most = self.images_at_once or images
        return [
            count
            for count in wanted
            if not rest
            and images % count == 0
            and images // count <= most
            and not (pairs and images // count % 2)
        ]

    def lengths(self, steps_per_epoch: float) -> tuple[int, int]:
        """Steps in all, and of these of the warm-up. UserError: all of them."""
        steps = self.steps
        if steps is None:
            assert self.epochs is not None
            steps = max(1, math.ceil(self.epochs * steps_per_epoch))
        warmup = self.warmup
        if self.warmup_epochs is not None:
            warmup = math.ceil(self.warmup_epochs * steps_per_epoch)
        if warmup >= steps:
            raise UserError(
                f"warm-up of {warmup} steps must be shorter than the {steps} steps of the training"
            )
        return steps, warmup

    def shortened(self, share: float, steps: int | None) -> "Training":
        """The same training with `steps` steps, or with `share` of its length."""
        if steps is None and self.epochs is not None:
            warmup_epochs = self.warmup_epochs and self.warmup_epochs * share
            return self.model_copy(
                update={"epochs": self.epochs * share, "warmup_epochs": warmup_epochs}
            )
        if steps is None:
            assert self.steps is not None
            steps = max(1, int(self.steps * share))
        warmup = {"warmup": min(self.warmup, steps // 5), "warmup_epochs": None}
        return self.model_copy(update={"steps": steps, "epochs": None} | warmup)

    @property
    def length(self) -> str:
        """In words, as it is given."""
        return f"{self.steps} steps" if self.steps is not None else f"{self.epochs:g} epochs"


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
    image_size: Side | None = Field(
        None, description="side of its input, pixels; null: the student's"
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

    latency_batch: int = Field(
        1, ge=1, le=4096, description="images per forward pass that is timed"
    )
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
        None, description="steps of training between rounds; null: a fifth of the training's"
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

    name: RunName = Field(description="name of the run and its folder")
    seed: Seed = Field(0, description="seed of all random numbers")
    data: Data
    workers: Workers = Workers()
    checkpoints: Checkpoints = Field(Checkpoints(), exclude_if=equals(Checkpoints()))
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
            self._check_batch(where, training, self.workers.least)
            if training.sync_batchnorm and not self.workers.gpus:
                raise ValueError(
                    f"{where}.sync_batchnorm = True needs GPUs, workers.gpus is 0; set it to false"
                )
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
        """Return the numbers in the range of workers.count that divide the batches of all."""
        found = []
        for count in range(self.workers.least, self.workers.most + 1):
            try:
                for where, training in self.trainings().items():
                    self._check_batch(where, training, count)
            except ValueError:
                continue
            found.append(count)
        return found

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
