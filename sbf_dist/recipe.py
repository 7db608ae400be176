"""The recipe: everything that a run is made of, read from YAML, checked field by field."""

import hashlib
import json
import typing
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from sbf_dist.schema import Above0, Name, Positive, Section, Share, load_as, validate_as

# As sbf_dist.compress.planning.criteria has it, which loads PyTorch.
Criterion = Literal["reconstruction", "l1", "l2", "bn_scale", "taylor", "random"]
KNOWN_SETS = ("cifar10", "cifar100", "tiny-imagenet", "imagenet")  # see sbf data prepare


class Augmentation(Section):
    """How a training image is varied; see pipelines.augmentation for the meaning in detail."""

    crop: Literal["resized", "padded"] = Field(
        "resized",
        description="'resized': of random area and shape (photographs); 'padded': out of the image "
        "with a border around it (CIFAR)",
    )
    padding: int = Field(4, ge=0, le=1024, description="border of padded crops, pixels")
    min_scale: Share = Field(0.35, description="least share of the image's area in a crop")
    max_scale: Share = Field(1.0, description="largest share of the image's area in a crop")
    min_ratio: float = Field(3 / 4, gt=0, description="least width/height of a crop")
    max_ratio: float = Field(4 / 3, gt=0, description="largest width/height of a crop")
    flip: bool = Field(True, description="mirror half of the images")
    rotate: float = Field(0.0, ge=0, le=180, description="largest rotation, degrees")
    shift: float = Field(0.0, ge=0, le=1, description="largest shift, share of the side")
    color: float = Field(0.0, ge=0, le=1, description="jitter of brightness, contrast, saturation")
    rand_augment: int = Field(
        0, ge=0, le=16, description="random operations per image (RandAugment); 0: none"
    )
    magnitude: int = Field(9, ge=0, le=30, description="strength of these operations")
    mixup: float = Field(
        0.0, ge=0, le=1000, description="blend pairs of images, share ~ Beta(mixup, mixup); 0: none"
    )
    cutmix: float = Field(
        0.0, ge=0, le=1000, description="put boxes of one image into another, area ~ Beta; 0: none"
    )

    @model_validator(mode="after")
    def _has_ranges(self) -> "Augmentation":
        for low, high in (("min_scale", "max_scale"), ("min_ratio", "max_ratio")):
            least, most = getattr(self, low), getattr(self, high)
            if least > most:
                raise ValueError(f"{low} = {least} must not be above {high} = {most}")
        return self

    @property
    def mixes(self) -> bool:
        """Whether pairs of images are mixed, for which a worker's batches must be even."""
        return self.mixup > 0 or self.cutmix > 0


class Data(Section):
    """Which images there are and how the network sees them."""

    source: Literal[
        "digits", "photos", "folder", "cifar10", "cifar100", "tiny-imagenet", "imagenet"
    ] = Field(
        "folder",
        description="'digits' and 'photos' write what scikit-learn and scikit-image bring as JPEG "
        "files first; 'folder' takes any images; a set's name asks that root is that set, all its "
        "classes (sbf data prepare)",
    )
    root: Path | None = Field(
        None, description="class folders, or a prepared set; needed for all but digits"
    )
    unlabelled: Path | None = Field(
        None, description="folder of more images, in any depth, of which no class is known"
    )
    labelled_per_class: int | float | None = Field(
        None,
        description="use so many labels per class, or this share of them; the rest is unlabelled; "
        "null: all",
    )
    split: Path | None = Field(
        None, description="list of the labelled images (sbf data split), instead of a number"
    )
    validation: int | float | None = Field(
        None, description="images (or share) held out where the folder has no val/"
    )
    image_size: int = Field(224, ge=8, description="side of the square that the student sees")
    crop: Share = Field(0.875, description="share of the short side in an evaluation crop")
    mean: tuple[float, float, float] = Field((0.485, 0.456, 0.406), description="of [0, 1] pixels")
    std: tuple[Above0, Above0, Above0] = Field(
        (0.229, 0.224, 0.225), description="of [0, 1] pixels"
    )
    augmentation: Augmentation = Augmentation()
    cache: Literal["none", "memory"] = Field(
        "none",
        description="'memory' decodes all images once and keeps them, in each worker: for small "
        "images",
    )
    threads: Positive = Field(1, description="DALI threads per worker")

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
                "both choose the labelled images; give one (null takes one away)"
            )
        return self

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


class Optimizer(Section):
    """How parameters are stepped."""

    name: Literal["sgd", "adamw"] = Field("sgd", description="SGD with Nesterov momentum, or AdamW")
    lr: float = Field(0.1, gt=0, description="peak learning rate")
    weight_decay: float = Field(1e-4, ge=0, description="of weights; not of biases and norms")
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd only")
    betas: tuple[float, float] = Field((0.9, 0.999), description="adamw only")
    clip: float | None = Field(None, gt=0, description="largest norm of the whole gradient")


class Training(Section):
    """Length and manner of one training."""

    steps: Positive = Field(description="optimizer steps")
    batch_size: Positive = Field(64, description="images per step over all workers")
    accumulation: Positive = Field(1, description="backward passes per step")
    optimizer: Optimizer = Optimizer()
    schedule: Literal["constant", "cosine", "step"] = Field("cosine", description="after warm-up")
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of forward passes")
    zero_stage: Literal[0, 1, 2] = Field(1, description="DeepSpeed ZeRO stage")
    log_every: Positive = Field(10, description="steps between two records")
    checkpoint_every: Positive = Field(500, description="steps between two checkpoints")

    @model_validator(mode="after")
    def _warms_up_in_time(self) -> "Training":
        if self.warmup >= self.steps:
            raise ValueError(f"warmup = {self.warmup} must be less than steps = {self.steps}")
        return self


class Teacher(Section):
    """One member of the ensemble: trained on the labels, or loaded from a file."""

    name: Name = Field(description="of its files and table row")
    model: str = Field(description="as sbf_dist.models.build takes it")
    training: Training | None = Field(None, description="how it is trained")
    weights: Path | None = Field(None, description="safetensors file, instead of a training")
    image_size: int | None = Field(None, ge=8, description="its input size; null: the student's")
    mean: tuple[float, float, float] | None = Field(None, description="null: the student's")
    std: tuple[Above0, Above0, Above0] | None = Field(None, description="null: the student's")
    weight: float = Field(1.0, gt=0, description="in the mean of the ensemble")

    @model_validator(mode="after")
    def _comes_from_somewhere(self) -> "Teacher":
        if (self.training is None) == (self.weights is None):
            raise ValueError("give either training or weights")
        return self


class PseudoLabels(Section):
    """What the ensemble writes on the images, and which of them are used."""

    temperature: float = Field(1.0, gt=0, description="softens each teacher's probabilities")
    top_k: Positive = Field(10, description="classes stored per image")
    threshold: float = Field(0.0, ge=0, lt=1, description="least confidence of a used image")
    per_class: Positive | None = Field(
        None, description="use only the so many most confident images of each predicted class"
    )


class Compress(Section):
    """From a dense network to an SBF network; the budget is exactly one of the first four."""

    macs: float | None = Field(
        None, description="multiply-adds to reach: a share of the dense network's, or a number > 1"
    )
    params: float | None = Field(
        None, description="parameters to reach: a share of the dense network's, or a number > 1"
    )
    latency: Share | None = Field(
        None, description="time to reach as measured here, as a share of the dense network's"
    )
    latency_ms: Above0 | None = Field(None, description="time to reach here, milliseconds")
    latency_batch: Positive = Field(1, description="images in a forward pass that is timed")
    latency_table: Path | None = Field(
        None, description="file of measured times; null: sbf-dist/latency.json in the user's cache"
    )
    teacher: str = Field(description="the teacher that is compressed to become the student")
    criterion: Criterion = Field(
        "reconstruction", description="which channels of a layer are kept; see docs/planning.md"
    )
    keep: list[str] = Field(
        [], description="patterns of layers' names to leave as they are, e.g. 'layer1.*'"
    )
    sources: Positive = Field(
        4, description="largest number S of sources per rebuilt channel, but for mixtures"
    )
    mixtures: bool = Field(
        True, description="channels may also be rebuilt from the whole basis, with m = 1"
    )
    transform_size: Positive = Field(
        3, description="largest m, side of the transformations, odd; each layer gets this or 1"
    )
    floor: Share = Field(0.125, description="least share of a layer's channels that is kept")
    round_to: Positive = Field(
        1, description="kept channels come in multiples of this; narrower layers keep all"
    )
    refit: bool = Field(
        True, description="solve filters anew, too, on what the converted layers before them give"
    )
    removal: typing.Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = Field(
        0.0,
        description="share of the saving that comes from removing channels, the rest from "
        "rebuilding; 'auto' tries several out",
    )
    probe_steps: int = Field(
        100, ge=0, description="of distillation before the shares of 'auto' are compared"
    )
    rounds: Positive = Field(
        1, description="of shrinking with training between; more than 1 for macs and params only"
    )
    between: Literal["bn_relu"] | None = Field(
        None, description="what stands before the transformations: batch norm and ReLU, or nothing"
    )
    images: Positive = Field(512, description="calibration images, no labels needed")

    @field_validator("macs", "params")
    @classmethod
    def _share_or_number(cls, value: float | None) -> float | None:
        if value is None or 0 < value <= 1 or (value > 1 and value.is_integer()):
            return value
        raise ValueError("must be a share in (0, 1] or a whole number above 1")

    @model_validator(mode="after")
    def _is_odd(self) -> "Compress":
        if self.transform_size % 2 == 0:
            raise ValueError(f"transform_size = {self.transform_size} must be odd")
        return self

    @model_validator(mode="after")
    def _has_one_budget(self) -> "Compress":
        budgets = {
            "macs": self.macs,
            "params": self.params,
            "latency": self.latency,
            "latency_ms": self.latency_ms,
        }
        given = [f"{key} = {value:g}" for key, value in budgets.items() if value is not None]
        if len(given) != 1:
            told = f"not {' and '.join(given)} (null takes one away)" if given else "not none"
            raise ValueError(f"give exactly one of macs, params, latency and latency_ms, {told}")
        return self

    @model_validator(mode="after")
    def _removes_to_a_count(self) -> "Compress":
        if self.removal != 0 and self.macs is None and self.params is None:
            raise ValueError(
                f"removal = {self.removal!r} needs a budget of macs or params; for a time it must "
                "be 0"
            )
        return self

    @model_validator(mode="after")
    def _counts_in_rounds(self) -> "Compress":
        if self.rounds > 1 and self.macs is None and self.params is None:
            raise ValueError(
                f"rounds = {self.rounds} needs a budget of macs or params; for a time it must be 1"
            )
        if self.rounds > 1 and self.between is not None:
            raise ValueError(
                f"rounds = {self.rounds} needs between = null: layers with {self.between} are not "
                "shrunk again"
            )
        return self


class Distill(Section):
    """Training of the SBF student."""

    training: Training
    round_steps: Positive | None = Field(
        None, description="of training between compress.rounds; null: a fifth of training.steps"
    )
    targets: Literal["stored", "live"] = Field(
        "stored", description="pseudo-labels, or the teachers' word on the very crop"
    )
    label_weight: float = Field(0.5, ge=0, description="of the cross-entropy on labelled images")
    labelled_share: float = Field(0.25, ge=0, le=1, description="of labelled images in a batch")


class Tracking(Section):
    """Where MLflow keeps the run. Not part of a run's identity."""

    uri: str | None = Field(None, description="null: MLFLOW_TRACKING_URI, or SQLite under runs/")
    experiment: str = Field("sbf-dist", description="name of the MLflow experiment")


class Recipe(Section):
    """A whole run."""

    name: Name = Field(description="of the run's folder")
    seed: int = Field(0, ge=0, description="of everything random")
    data: Data
    workers: Workers = Workers()
    teachers: list[Teacher] = Field(min_length=1)
    pseudo_labels: PseudoLabels = PseudoLabels()
    compress: Compress
    distill: Distill
    baselines: Training | None = Field(
        None, description="also train a dense and an SBF student on the labels alone, to compare"
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
                    "images for a worker at once; mixup and cutmix mix pairs, it must be even"
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
        """What results depend on: all but the workers, the tracking and what is cached where."""
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
    """Make a recipe of `content`, changed by `overrides`; errors begin with `origin`.

    Raises UserError as `load` does.
    """
    return validate_as(Recipe, content, overrides, origin)
