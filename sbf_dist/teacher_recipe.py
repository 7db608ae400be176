"""The sections of a recipe that say who teaches: teachers, and students that become teachers."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from sbf_dist.schema import Above0, Name, Positive, Section, Side, equals
from sbf_dist.training_recipe import Training

HUBS = ("timm:", "torchvision:")  # how models begin that have published weights


class Teacher(Section):
    """One member of the ensemble: trained on the labels, or taken as it is."""

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
    start_from: Path | None = Field(
        None,
        exclude_if=equals(None),
        description="file of weights that the training starts from; a head with another number "
        "of classes is reinitialised; null: random weights",
    )
    pretrained: bool = Field(
        False,
        exclude_if=equals(False),
        description="with training: start from the weights that timm or torchvision publish; "
        "without: take the network with them as it is",
    )
    weights_key: str | None = Field(
        None,
        exclude_if=equals(None),
        description="where weights or start_from hold several state dicts: the one to take, e.g. "
        "model_ema",
    )
    weights_prefix: str | None = Field(
        None,
        exclude_if=equals(None),
        description="prefix of the names in weights or start_from, if several fit",
    )
    classes: Path | None = Field(
        None,
        exclude_if=equals(None),
        description="of a teacher with other classes than the images: file with a line for each of "
        "its classes in its order, its name and, after a tab, the name of the images' class if it "
        "is another; probabilities of classes that the images do not have are left out",
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
    views: Literal[1, 2] = Field(
        1,
        exclude_if=equals(1),
        description="views of an image over which its predictions are averaged; 2: the image and "
        "its mirror image, left to right",
    )
    weight: float = Field(1.0, gt=0, description="weight in the ensemble's mean")

    @model_validator(mode="after")
    def _comes_from_somewhere(self) -> Self:
        if self.training is not None and self.weights is not None:
            raise ValueError(
                "give either training or weights; a training that starts from weights has "
                "start_from instead"
            )
        if self.training is None and self.weights is None and not self.pretrained:
            raise ValueError("give either training or weights, or pretrained: true")
        if self.start_from is not None and self.training is None:
            raise ValueError(
                f"start_from = {str(self.start_from)!r} needs a training; weights takes the "
                "network as it is"
            )
        return self

    @model_validator(mode="after")
    def _starts_from_one_place(self) -> Self:
        file = self.weights or self.start_from
        if self.pretrained and file is not None:
            raise ValueError(
                f"pretrained = True and {str(file)!r} both say which weights it has; give one"
            )
        if self.pretrained and not self.model.startswith(HUBS):
            raise ValueError(
                f"pretrained = True needs a model of timm or torchvision, not {self.model!r}; "
                "give start_from: FILE instead"
            )
        choice = self.weights_key or self.weights_prefix
        if choice is not None and file is None:
            raise ValueError(f"weights_key or weights_prefix = {choice!r} needs a file of weights")
        return self

    @model_validator(mode="after")
    def _has_its_classes(self) -> Self:
        if self.classes is not None and self.training is not None:
            raise ValueError(
                f"classes = {str(self.classes)!r} is for a teacher that is not trained here: a "
                "training gives it the classes of the images"
            )
        return self


class SelfTraining(Section):
    """Rounds in which the student becomes a teacher and is trained again.

    Xie et al. 2020, "Self-training with Noisy Student improves ImageNet classification".
    """

    rounds: Positive = Field(1, description="trainings after the first distillation")
    with_teachers: bool = Field(
        True,
        description="the student of the round before joins the other teachers; false: it teaches "
        "alone",
    )
    weight: Above0 = Field(1.0, description="weight of that student in the ensemble's mean")
