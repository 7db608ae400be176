"""The recipe of a comparison: methods of compression at equal cost and equal training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from sbf_dist.recipe import Data
from sbf_dist.schema import Positive, RunName, Section, Seed, Share, Steps, equals, load_as
from sbf_dist.settings import Optimizer

Method = Literal[
    "magnitude",
    "magnitude-global",
    "depgraph",
    "depgraph-global",
    "ghost",
    "low-rank",
    "low-rank-filters",
    "sbf",
]


class Training(Section):
    """One training, without its length."""

    batch_size: Positive = Field(64, description="images per step")
    optimizer: Optimizer = Optimizer()
    schedule: Literal["constant", "cosine", "step"] = Field(
        "cosine", description="learning rate after warm-up"
    )
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")


class Dense(Training):
    """Training of the dense network on the labels."""

    steps: Steps = Field(description="optimizer steps")

    @model_validator(mode="after")
    def _warms_up_in_time(self) -> "Dense":
        if self.warmup >= self.steps:
            raise ValueError(f"warmup = {self.warmup} must be less than steps = {self.steps}")
        return self


class Recovery(Training):
    """Training of each compressed network on labels and the dense network's predictions.

    Each entry of `steps` is a separate training of the compressed network, with its own schedule.
    All methods get the same batches.
    """

    steps: list[Steps] = Field(
        min_length=1, description="lengths of the trainings, optimizer steps"
    )
    label_weight: float = Field(
        0.5, ge=0, description="weight of the cross-entropy on labelled images"
    )
    labelled_share: float = Field(
        0.25, gt=0, le=1, description="share of labelled images in a batch"
    )

    @field_validator("steps")
    @classmethod
    def _ascends(cls, value: list[int]) -> list[int]:
        if sorted(set(value)) != value:
            raise ValueError(f"{value} must be in ascending order")
        return value

    @model_validator(mode="after")
    def _warms_up_in_time(self) -> "Recovery":
        if self.warmup >= self.steps[0]:
            raise ValueError(f"warmup = {self.warmup} must be less than steps = {self.steps}")
        return self


class Comparison(Section):
    """A whole comparison."""

    name: RunName = Field(description="name of the comparison and its folder")
    seeds: list[Seed] = Field(
        [0, 1, 2], min_length=1, description="seeds; one dense network is trained for each"
    )
    data: Data
    model: str = Field(description="network, e.g. cifar_resnet14 (sbf_dist.models.build)")
    arguments: dict[str, Any] = Field(
        {},
        exclude_if=equals({}),
        description="further arguments that the network is built with, e.g. in_chans",
    )
    methods: list[Method] = Field(
        ["magnitude", "depgraph", "depgraph-global", "ghost", "low-rank", "sbf"],
        min_length=1,
        description="methods of compression",
    )
    macs: list[Share] = Field(
        [0.75, 0.5, 0.33, 0.25],
        min_length=1,
        description="budgets of multiply-adds, as shares of the dense network's",
    )
    images: Positive = Field(512, description="number of calibration images; they need no labels")
    dense: Dense
    recovery: Recovery

    @field_validator("seeds", "macs", "methods")
    @classmethod
    def _differs(cls, value: list[object]) -> list[object]:
        if len(set(value)) < len(value):
            raise ValueError(f"{value} must not repeat an entry")
        return value


def load(path: Path, overrides: Sequence[str] = ()) -> Comparison:
    """Read the recipe of a comparison, as sbf_dist.recipe.load reads that of a run."""
    return load_as(Comparison, path, overrides)
