"""The settings of the library's parts: each declared once, checked here, used by its owner.

A recipe's sections are these classes, plus what only a run knows.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, cast, get_args

from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from sbf_dist.budget import BUDGETS, Budget, wrong_value
from sbf_dist.errors import UserError
from sbf_dist.schema import Above0, Positive, Section, Share, equals, explain

Criterion = Literal["reconstruction", "l1", "l2", "bn_scale", "taylor", "random"]
# Of the outputs of a student and of the dense network, both as the networks give them.
DivergenceFunction = Callable[[Any, Any], Any]
Divergence = Literal["auto", "kl", "error"]

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)


class _OneLineErrors(ModelMetaclass):
    """Reports wrong values that are given in Python in one line."""

    def __call__(cls, **values: Any) -> Any:  # noqa: N805
        try:
            return super().__call__(**values)
        except ValidationError as error:
            schema = cast(type[BaseModel], cls)
            raise UserError(f"{cls.__name__}: {explain(schema, error)}") from None


class Settings(Section, metaclass=_OneLineErrors):
    """The settings of one part. Raises UserError for a wrong value."""


class Compression(Settings):
    """How a dense network is compressed. Exactly one of the first four fields is the budget."""

    macs: float | None = Field(
        None,
        description="budget of multiply-adds: a share of the dense network's, or a number",
    )
    params: float | None = Field(
        None,
        description="budget of parameters: a share of the dense network's, or a number",
    )
    latency: Share | None = Field(
        None, description="budget of time measured on this machine: a share of the dense network's"
    )
    latency_ms: Above0 | None = Field(
        None, description="budget of time measured on this machine, milliseconds"
    )
    criterion: Criterion = Field(
        "reconstruction",
        description="which channels of a layer are kept (docs/planning.md)",
    )
    keep: list[str] = Field(
        [], description="patterns of the names of layers that stay dense, e.g. 'layer1.*'"
    )
    sources: Positive = Field(
        4, description="largest number S of sources of a rebuilt channel; mixtures have more"
    )
    mixtures: bool = Field(
        True, description="also try channels rebuilt from the whole basis with m = 1 (mixtures)"
    )
    transform_size: Positive = Field(
        3, description="largest size m of the m x m transformations, odd; a layer has this or 1"
    )
    floor: Share = Field(0.125, description="smallest share of a layer's channels that is kept")
    round_to: Positive = Field(
        1, description="the number of kept channels is a multiple of this; narrower layers keep all"
    )
    refit: bool = Field(
        True,
        description="also refit filters on the inputs that converted layers produce",
    )
    removal: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = Field(
        0.0,
        description="share of the saving that comes from removing channels; the rest comes from "
        "rebuilding; 'auto' compares several shares",
    )
    probe_steps: int = Field(
        100, ge=0, description="steps of distillation before 'auto' compares the shares"
    )
    feature_memory: float = Field(
        1.0,
        exclude_if=equals(1.0),
        ge=0,
        description="GiB of features that fitting keeps in memory to go on from; more are written "
        "to a temporary file (in TMPDIR)",
    )
    between: Literal["bn_relu"] | None = Field(
        None, description="batch norm and ReLU before the transformations, or nothing"
    )
    outputs: list[str] | None = Field(
        None,
        exclude_if=equals(None),
        description="names or numbers of the outputs that count, e.g. 'out' or 'features.1'; null: "
        "all of floating type",
    )
    divergence: Divergence | DivergenceFunction = Field(
        "auto",
        exclude_if=equals("auto"),
        description="how far a student is from the dense network: 'kl' of logits, 'error' (squared,"
        " in units of the outputs' variance), or 'auto': 'kl' of (N, classes) that a linear layer "
        "gives, 'error' of others (docs/networks.md); in Python also a function of both outputs",
    )

    @field_validator("outputs", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        if value is None:
            return None
        names = value if isinstance(value, list | tuple) else [value]
        if not names or not all(type(name) in (str, int) for name in names):
            raise ValueError("must be names or numbers of outputs")
        return [str(name) for name in names]

    @field_validator("divergence", mode="before")
    @classmethod
    def _is_known(cls, value: Any) -> Any:
        if value not in get_args(Divergence) and not callable(value):
            raise ValueError(
                "must be 'auto', 'kl', 'error' or, in Python, a function of the outputs of student "
                "and dense network"
            )
        return value

    @field_validator("macs", "params")
    @classmethod
    def _share_or_number(cls, value: float | None, info: ValidationInfo) -> float | None:
        assert info.field_name is not None
        wrong = None if value is None else wrong_value(info.field_name, value)
        if wrong:
            raise ValueError(wrong)
        return value

    @model_validator(mode="after")
    def _is_odd(self) -> Self:
        if self.transform_size % 2 == 0:
            raise ValueError(f"transform_size = {self.transform_size} must be odd")
        return self

    @model_validator(mode="after")
    def _has_one_budget(self) -> Self:
        given = [f"{kind} = {getattr(self, kind):g}" for kind in BUDGETS if self._gives(kind)]
        if len(given) != 1:
            found = (
                f"not {' and '.join(given)} (set the others to null)"
                if given
                else "nothing is given"
            )
            separator = ", " if given else "; "
            raise ValueError(
                f"give exactly one of macs, params, latency and latency_ms{separator}{found}"
            )
        return self

    @model_validator(mode="after")
    def _removes_to_a_count(self) -> Self:
        if self.removal != 0 and self.macs is None and self.params is None:
            raise ValueError(
                f"removal = {self.removal!r} needs a budget of macs or params; for a time it must "
                "be 0"
            )
        return self

    @property
    def feature_bytes(self) -> int:
        """Bytes of features that are kept in memory."""
        return round(self.feature_memory * 2**30)

    @property
    def budget(self) -> Budget:
        """The budget that is given."""
        return Budget(**{kind: getattr(self, kind) for kind in BUDGETS})

    def with_budget(self, budget: Budget) -> Self:
        """Return the same settings with another budget. Raises UserError if they contradict it."""
        values = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**(values | dict.fromkeys(BUDGETS) | budget.given()))

    def _gives(self, kind: str) -> bool:
        return getattr(self, kind) is not None


class Optimizer(Settings):
    """The optimizer of a training."""

    name: Literal["sgd", "adamw", "lamb"] = Field(
        "sgd", description="SGD with Nesterov momentum, AdamW, or LAMB (timm's)"
    )
    lr: float = Field(0.1, gt=0, description="peak learning rate")
    body_lr_share: Share = Field(
        1.0,
        exclude_if=equals(1.0),
        description="learning rate of all layers but the head, share of lr; below 1 for networks "
        "that start from published weights",
    )
    weight_decay: float = Field(
        1e-4, ge=0, description="weight decay, not applied to biases and normalisations"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of SGD")
    betas: tuple[float, float] = Field((0.9, 0.999), description="betas of AdamW and LAMB")
    clip: float | None = Field(
        None, gt=0, description="largest norm of the gradient; null: not clipped"
    )

    @field_validator("betas")
    @classmethod
    def _are_decays(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"{list(value)} must be two numbers in [0, 1)")
        return value


class Augmentation(Settings):
    """How training images are augmented. The defaults suit photographs.

    Digits and other signs: flip=False, min_scale about 0.7, `rotate` 5 to 15, `shift` 0.05 to 0.1.
    CIFAR: crop="padded". Pixels that rotation and shift uncover are filled with the nearest pixel
    of the border.

    Sources: resized crops, Szegedy et al. 2015; padded crops, He et al. 2016 on CIFAR; RandAugment,
    Cubuk et al. 2020, with DALI's 14 operations; mixup, Zhang et al. 2018; cutmix, Yun et al. 2019.
    """

    crop: Literal["resized", "padded"] = Field(
        "resized",
        description="'resized': a crop of random area and shape, resized to the square "
        "(photographs); 'padded': a square cut out of the resized image with a black border "
        "(CIFAR)",
    )
    padding: int = Field(4, ge=0, le=1024, description="border of padded crops, pixels")
    min_scale: Share = Field(
        0.35, description="smallest area of a resized crop, share of the image's"
    )
    max_scale: Share = Field(
        1.0, description="largest area of a resized crop, share of the image's"
    )
    min_ratio: float = Field(3 / 4, gt=0, description="smallest width/height of a resized crop")
    max_ratio: float = Field(4 / 3, gt=0, description="largest width/height of a resized crop")
    flip: bool = Field(True, description="mirror half of the images, left to right")
    rotate: float = Field(0.0, ge=0, le=180, description="largest rotation, degrees")
    shift: float = Field(0.0, ge=0, le=1, description="largest shift, share of the image's side")
    color: float = Field(0.0, ge=0, le=1, description="jitter of brightness, contrast, saturation")
    rand_augment: int = Field(
        0, ge=0, le=16, description="number of RandAugment operations per image; 0: off"
    )
    magnitude: int = Field(9, ge=0, le=30, description="strength of the RandAugment operations")
    mixup: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="blend pairs of images, share drawn from Beta(mixup, mixup); 0: off",
    )
    cutmix: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="paste a box of another image, area drawn from Beta(cutmix, cutmix); 0: off",
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
        """Whether mixup or cutmix is on. A worker's batches must then have even sizes."""
        return self.mixup > 0 or self.cutmix > 0


class View(Settings):
    """The input of a network: size and normalisation of an image."""

    image_size: Positive = Field(description="side of the square, pixels")
    mean: tuple[float, float, float] = Field(description="per channel, of pixels in [0, 1]")
    std: tuple[Above0, Above0, Above0] = Field(description="per channel, of pixels in [0, 1]")


class PseudoLabels(Settings):
    """The ensemble's stored predictions, and which images without labels are used.

    An image is used if enough teachers agree, if its confidence reaches the threshold of its class,
    and if it is among the most confident of its class: see sbf_dist.distill.selection.
    """

    temperature: Above0 | Literal["fit"] = Field(
        1.0,
        description="temperature of each teacher's softmax; 'fit': for each teacher the one with "
        "which the labels of the validation images are most probable",
    )
    top_k: Positive = Field(10, description="number of classes stored per image")
    threshold: float = Field(
        0.0, ge=0, lt=1, description="smallest confidence of an image that is used"
    )
    adaptive: bool = Field(
        False,
        exclude_if=equals(False),
        description="lower the threshold of each class, the more the fewer of its images reach it "
        "(FlexMatch)",
    )
    per_class: Positive | None = Field(
        None,
        description="largest number of images of each predicted class, the most confident first",
    )
    min_agreement: float = Field(
        0.0,
        exclude_if=equals(0.0),
        ge=0,
        le=1,
        description="smallest share of the teachers whose first class is the ensemble's",
    )
    sharpening: float = Field(
        1.0,
        exclude_if=equals(1.0),
        gt=0,
        description="temperature of the ensemble's probabilities when they are targets; below 1 "
        "they are sharper",
    )

    @model_validator(mode="after")
    def _adapts_a_threshold(self) -> Self:
        if self.adaptive and self.threshold == 0:
            raise ValueError("adaptive = True needs a threshold above 0")
        return self
