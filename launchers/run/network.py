"""One network of a run: what it is built of, how it is trained and, as a teacher, asked."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sbf_dist.distill_recipe import Distill
from sbf_dist.models import Architecture
from sbf_dist.settings import View
from sbf_dist.training_recipe import Training

ENDING_OF_TARGETS = ".targets"  # of the name of a file beside the results of trainings


@dataclass(frozen=True)
class Job:
    """How a network is trained.

    group    the name under which its checkpoints are kept: its stage, or its round
    start    file of the weights that it starts from; None: random ones
    distill  what a student is taught by; None: it is trained on labels alone
    """

    group: str
    training: Training
    seed: int
    start: Path | None = None
    distill: Distill | None = None


@dataclass(frozen=True)
class Asked:
    """How a teacher is asked.

    weight   in the mean of the ensemble
    views    of an image that its answers are averaged over
    classes  file of its classes; None: they are those of the images
    """

    weight: float = 1.0
    views: int = 1
    classes: Path | None = None

    @property
    def is_plain(self) -> bool:
        """Whether its answer is that of its network to one view."""
        return self.views == 1 and self.classes is None


@dataclass(frozen=True)
class Network:
    """One network of a run.

    title            in the table of results
    model            as sbf_dist.models.build takes it, with `arguments`
    view             how it sees an image
    weights          file of its weights
    result           file of what its training came to, without which it is not done
    plan             file of the plan that turns the model into an SBF network; None: it is dense
    job              how it is trained; None: its weights are given, or fitted without training
    reads            keys of the recipe that its training depends on, sections by their prefix
    published        file of weights from elsewhere, which it has or, with a job, starts from
    weights_choice   where several things in that file fit: the key and the prefix to take
    asked            of a teacher: how it is asked
    """

    name: str
    title: str
    model: str
    view: View
    weights: Path
    result: Path
    plan: Path | None = None
    job: Job | None = None
    reads: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    published: Path | None = None
    weights_choice: tuple[str | None, str | None] = (None, None)
    asked: Asked = Asked()

    def architecture(self, num_classes: int) -> Architecture:
        """Return what the network is built of, with so many classes."""
        return Architecture.of(self.model, num_classes, self.arguments)

    @property
    def targets(self) -> Path:
        """The file that keeps whether its teachers are asked live, see teaching.py."""
        return self.result.with_suffix(f"{ENDING_OF_TARGETS}.json")

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return (3, self.view.image_size, self.view.image_size)
