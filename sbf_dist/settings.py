"""The settings of the library's parts: each declared once, checked here, used by its owner.

A recipe's sections are these classes, plus what only a run knows.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, cast

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
from sbf_dist.schema import Above0, Positive, Section, Share, explain

Criterion = Literal["reconstruction", "l1", "l2", "bn_scale", "taylor", "random"]


if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)


class _OneLineErrors(ModelMetaclass):
    """Turns what is wrong with values that are given in Python into one line."""

    def __call__(cls, **values: Any) -> Any:  # noqa: N805
        try:
            return super().__call__(**values)
        except ValidationError as error:
            schema = cast(type[BaseModel], cls)
            raise UserError(f"{cls.__name__}: {explain(schema, error)}") from None


class Settings(Section, metaclass=_OneLineErrors):
    """The settings of one part. Raises UserError for a value that does not fit."""


class Compression(Settings):
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
    removal: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = Field(
        0.0,
        description="share of the saving that comes from removing channels, the rest from "
        "rebuilding; 'auto' tries several out",
    )
    probe_steps: int = Field(
        100, ge=0, description="of distillation before the shares of 'auto' are compared"
    )
    between: Literal["bn_relu"] | None = Field(
        None, description="what stands before the transformations: batch norm and ReLU, or nothing"
    )

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
                f"not {' and '.join(given)} (null takes one away)" if given else "nothing is given"
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
    def budget(self) -> Budget:
        """The budget that is given."""
        return Budget(**{kind: getattr(self, kind) for kind in BUDGETS})

    def with_budget(self, budget: Budget) -> Self:
        """Return the same settings for another budget. Raises UserError if they do not fit it."""
        values = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**(values | dict.fromkeys(BUDGETS) | budget.given()))

    def _gives(self, kind: str) -> bool:
        return getattr(self, kind) is not None


class Optimizer(Settings):
    """How parameters are stepped."""

    name: Literal["sgd", "adamw"] = Field("sgd", description="SGD with Nesterov momentum, or AdamW")
    lr: float = Field(0.1, gt=0, description="peak learning rate")
    weight_decay: float = Field(1e-4, ge=0, description="of weights; not of biases and norms")
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd only")
    betas: tuple[float, float] = Field((0.9, 0.999), description="adamw only")
    clip: float | None = Field(None, gt=0, description="largest norm of the whole gradient")


class Augmentation(Settings):
    """How a training image is varied. The defaults suit photographs.

    Digits and other signs: flip=False, min_scale about 0.7, a few degrees of `rotate`, `shift` 0.05
    to 0.1. CIFAR: crop="padded". What rotation and shift uncover is filled with the nearest pixel
    of the border.

    Sources: resized crops, Szegedy et al. 2015; padded crops, He et al. 2016 on CIFAR; RandAugment,
    Cubuk et al. 2020, with DALI's 14 operations; mixup, Zhang et al. 2018; cutmix, Yun et al. 2019.
    """

    crop: Literal["resized", "padded"] = Field(
        "resized",
        description="'resized': a crop of random area and shape, resized to the square "
        "(photographs); 'padded': cut out of the resized image with a black border around it "
        "(CIFAR)",
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
        0, ge=0, le=16, description="random operations per image (RandAugment); 0: off"
    )
    magnitude: int = Field(9, ge=0, le=30, description="strength of these operations")
    mixup: float = Field(
        0.0, ge=0, le=1000, description="blend pairs of images, share ~ Beta(mixup, mixup); 0: off"
    )
    cutmix: float = Field(
        0.0, ge=0, le=1000, description="put boxes of one image into another, area ~ Beta; 0: off"
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


class View(Settings):
    """How a network sees an image."""

    image_size: Positive = Field(description="side of the square, pixels")
    mean: tuple[float, float, float] = Field(description="of [0, 1] pixels")
    std: tuple[Above0, Above0, Above0] = Field(description="of [0, 1] pixels")


class PseudoLabels(Settings):
    """What the ensemble writes on the images, and which of them are used."""

    temperature: float = Field(1.0, gt=0, description="softens each teacher's probabilities")
    top_k: Positive = Field(10, description="classes stored per image")
    threshold: float = Field(0.0, ge=0, lt=1, description="least confidence of a used image")
    per_class: Positive | None = Field(
        None, description="use only the so many most confident images of each predicted class"
    )
