"""The section of a recipe that says how a network is trained: length, batches, optimizer."""

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from sbf_dist.errors import UserError
from sbf_dist.schema import Epochs, Positive, Section, Share, Steps, equals
from sbf_dist.settings import Optimizer


class Training(Section):
    """One training: length, batches, optimizer, precision."""

    steps: Steps | None = Field(None, description="optimizer steps; or give epochs")
    epochs: Epochs | None = Field(
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
    freeze: list[str] = Field(
        [],
        exclude_if=equals([]),
        description="patterns of the names of parameters that are not trained, e.g. 'layer1.*'; "
        "the statistics of their batch norms stay as they are, too",
    )
    schedule: Literal["constant", "cosine", "step", "one_cycle"] = Field(
        "cosine", description="learning rate after warm-up"
    )
    milestones: list[Share] = Field(
        [0.5, 0.75],
        exclude_if=equals([0.5, 0.75]),
        description="of schedule 'step': when the rate falls, shares of the training",
    )
    factor: Share = Field(
        0.1,
        exclude_if=equals(0.1),
        description="of schedule 'step': factor by which the rate falls",
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
        description="label smoothing: the share of a label that is spread over all classes",
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
        description="steps that may be skipped because their loss is not finite; above 0 the "
        "loss is read in each step, which slows a GPU down",
    )

    profile_steps: tuple[int, int] | None = Field(
        None,
        exclude_if=equals(None),
        description="steps [from, to) of which each worker writes a profiler's trace to "
        "RUNS/NAME/logs; null: none",
    )

    @model_validator(mode="after")
    def _profiles_some_steps(self) -> Self:
        if self.profile_steps is not None:
            first, last = self.profile_steps
            if not 0 <= first < last:
                raise ValueError(
                    f"profile_steps = [{first}, {last}] must be [from, to] with 0 <= from < to"
                )
        return self

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
                f"zero_stage = {self.zero_stage} cannot be combined with optimizer.name = lamb, "
                "which scales each layer's step as a whole; ZeRO 1 to 3 cut layers up; set "
                "zero_stage to 0, or take sgd or adamw"
            )
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "zero_stage = 3 cannot be combined with compile = True, which needs the weights "
                "in one place; set zero_stage to 0, 1 or 2"
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
            warmup = {"warmup": int(self.warmup * share), "warmup_epochs": warmup_epochs}
            return self.model_copy(update={"epochs": self.epochs * share} | warmup)
        if steps is None:
            assert self.steps is not None
            steps = max(1, int(self.steps * share))
        return self.model_copy(
            update={
                "steps": steps,
                "epochs": None,
                "warmup": min(self.warmup, steps // 5),
                "warmup_epochs": None,
            }
        )

    @property
    def length(self) -> str:
        """In words, as it is given."""
        return f"{self.steps} steps" if self.steps is not None else f"{self.epochs:g} epochs"
