"""The section of a recipe that says what a student is taught, and by what."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from sbf_dist.schema import Section, Steps, equals
from sbf_dist.settings import Augmentation
from sbf_dist.training_recipe import Training

_WEIGHT = "must be a number of at least 0, or [start, end] of such numbers"


def _weight(value: Any) -> float | tuple[float, float]:
    numbers = value if isinstance(value, list | tuple) else [value]
    if not all(type(number) in (int, float) and 0 <= number < math.inf for number in numbers):
        raise ValueError(_WEIGHT)
    if not isinstance(value, list | tuple):
        return float(value)
    if len(value) != 2:
        raise ValueError(_WEIGHT)
    return float(value[0]), float(value[1])


def _shown(weight: float | tuple[float, float]) -> str:
    return f"{weight:g}" if not isinstance(weight, tuple) else str(list(weight))


# A number, or two: from the first to the second over the training, in a straight line.
Weight = Annotated[float | tuple[float, float], BeforeValidator(_weight)]
STRONG_OPERATIONS, STRONG_MAGNITUDE = 2, 10  # of RandAugment, as FixMatch has them


class Consistency(Section):
    """Weak → strong consistency (FixMatch, Sohn et al., arXiv 2001.07685)."""

    weight: Weight = Field(
        1.0, description="of this part of the loss; [start, end]: it changes over the training"
    )
    threshold: float = Field(
        0.95, ge=0, lt=1, description="smallest confidence of a prediction that is a target"
    )
    target: Literal["student", "ensemble"] = Field(
        "student",
        description="whose prediction on the weak view is the target: 'student', its own, as in "
        "FixMatch, or 'ensemble'",
    )
    strong: Augmentation | None = Field(
        None,
        description="how strong views are augmented; null: as data.augmentation says, and two more "
        "operations of RandAugment",
    )

    @model_validator(mode="after")
    def _mixes_with_the_weak(self) -> "Consistency":
        if self.strong is not None and self.strong.mixes:
            raise ValueError(
                "strong must not set mixup or cutmix: strong views are mixed as data.augmentation "
                "says, with the weak ones"
            )
        return self

    def strong_views(self, weak: Augmentation) -> Augmentation:
        """How strong views are augmented beside weak ones of `weak`."""
        if self.strong is not None:
            return self.strong
        return weak.model_copy(
            update={
                "rand_augment": weak.rand_augment + STRONG_OPERATIONS,
                "magnitude": STRONG_MAGNITUDE,
                "mixup": 0.0,
                "cutmix": 0.0,
            }
        )


class Features(Section):
    """Matching the features of the teacher that was compressed (FitNets, arXiv 1412.6550)."""

    weight: Weight = Field(
        1.0, description="of this part of the loss; [start, end]: it changes over the training"
    )
    layers: list[str] = Field(
        [],
        description="names of modules whose outputs are matched, e.g. layer3; none: the last one "
        "before pooling",
    )


class LabelsLast(Section):
    """Training on the labels alone at the end (Yalniz et al., arXiv 1905.00546)."""

    share: float = Field(gt=0, lt=1, description="share of the steps, the last ones")
    lr: float = Field(
        0.1, gt=0, le=1, description="learning rate there, as a share of the training's"
    )


class Distill(Section):
    """Training of the SBF student."""

    training: Training
    round_steps: Steps | None = Field(
        None, description="steps of training between rounds; null: a fifth of the training's"
    )
    targets: Literal["auto", "stored", "live"] = Field(
        "auto",
        description="'stored': pseudo-labels; 'live': the teachers' predictions on each crop; "
        "'auto': live where the teachers fit (docs/distillation.md)",
    )
    label_weight: Weight = Field(
        0.2,
        description="weight of the cross-entropy on labelled images; [start, end]: it changes over "
        "the training",
    )
    labelled_share: float = Field(
        0.25, ge=0, le=1, description="share of labelled images in a batch"
    )
    teacher_weight: Weight = Field(
        1.0,
        exclude_if=equals(1.0),
        description="weight of the divergence from the teachers; 0: it is no part of the loss; "
        "[start, end]: it changes over the training",
    )
    consistency: Consistency | None = Field(
        None, exclude_if=equals(None), description="weak → strong consistency; null: off"
    )
    features: Features | None = Field(
        None,
        exclude_if=equals(None),
        description="match the features of the teacher that was compressed; null: off",
    )
    labels_last: LabelsLast | None = Field(
        None, exclude_if=equals(None), description="labels alone at the end; null: off"
    )

    @model_validator(mode="after")
    def _can_be_trained(self) -> Self:
        if self.features is not None and self.training.compile:
            raise ValueError(
                "features cannot be combined with training.compile = True, which has no modules "
                "to watch; set one of them to null or false"
            )
        if self.labels_last is not None and self.training.schedule != "cosine":
            raise ValueError(
                f"labels_last needs training.schedule = cosine, not {self.training.schedule}: its "
                "steps begin where the rate has come down"
            )
        fault = self.labels_last_fault(self.training)
        if fault is not None:
            raise ValueError(fault)
        return self

    @model_validator(mode="after")
    def _has_a_loss(self) -> Self:
        parts = [self.teacher_weight]
        if self.labelled_share:
            parts.append(self.label_weight)
        parts += [part.weight for part in (self.consistency, self.features) if part is not None]
        if any(weight not in (0, (0, 0)) for weight in parts):
            return self
        labels = "labelled_share" if not self.labelled_share else "label_weight"
        raise ValueError(
            f"teacher_weight = {_shown(self.teacher_weight)} and {labels} = "
            f"{_shown(getattr(self, labels))} leave nothing to train on; one of them must be above "
            "0, or set consistency or features"
        )

    def labels_last_fault(self, training: Training) -> str | None:
        """Why labels_last leaves a training no steps after its warm-up, as far as it is known."""
        if self.labels_last is None:
            return None
        if training.steps is not None:
            left, length = float(self.steps_with_teachers(training.steps)), training.steps * 1.0
            unit, key, warmup = "steps", "warmup", float(training.warmup)
        else:
            assert training.epochs is not None
            left, length = training.epochs * (1 - self.labels_last.share), training.epochs
            unit, key, warmup = "epochs", "warmup_epochs", training.warmup_epochs or 0.0
        if warmup < left:
            return None
        return (
            f"labels_last leaves {left:g} of {length:g} {unit} before, which must be more than "
            f"training.{key} = {warmup:g}"
        )

    def round_training(self) -> Training:
        """The training between two rounds, which is shorter; so is its warm-up."""
        shorter = self.training.shortened(1 / 5, self.round_steps)
        if shorter.steps is None or self.labels_last_fault(shorter) is None:
            return shorter
        warmup = self.steps_with_teachers(shorter.steps) // 5
        return shorter.model_copy(update={"warmup": warmup})

    @property
    def asks_teachers(self) -> bool:
        """Whether the loss needs the teachers' predictions."""
        by_ensemble = self.consistency is not None and self.consistency.target == "ensemble"
        return self.teacher_weight != 0 or by_ensemble

    @property
    def weights_change(self) -> bool:
        """Whether a weight depends on how much of the training is over."""
        parts = (part.weight for part in (self.consistency, self.features) if part is not None)
        return any(
            isinstance(weight, tuple) for weight in (self.label_weight, self.teacher_weight, *parts)
        )

    def steps_with_teachers(self, steps: int) -> int:
        """Of the steps of a training, those before the last ones on labels alone."""
        return steps - (round(steps * self.labels_last.share) if self.labels_last else 0)
