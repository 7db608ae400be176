"""The plan: which channels of which layer are kept, rebuilt (and from what), or removed.

A plan is plain JSON that a person can read, diff and edit. It holds no weights: together with a
state dict it makes a converted network.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_serializer,
    model_validator,
)

from sbf_dist.errors import UserError
from sbf_dist.files import read_bytes, write_text

ALL = "all"


class SBFLayer(BaseModel):
    """A convolution that becomes an SBF layer."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["sbf"] = "sbf"
    channels: int = Field(gt=0, description="number of output channels")
    kept: list[int] = Field(
        description="output channels that keep their filter (the basis), ascending"
    )
    sources: list[list[int]] = Field(
        description="for each other channel, ascending, the kept channels it is rebuilt from; in "
        "the file 'all' where each is rebuilt from all of them"
    )
    transform_size: int = Field(description="m: side of the m x m transformations, odd")
    between: Literal["bn_relu"] | None = Field(
        None, description="what stands between basis and transformations: batch norm and ReLU"
    )
    macs_before: int = Field(description="multiply-adds of the dense layer")
    macs_after: int = Field(description="multiply-adds of the SBF layer")
    ms_before: float | None = Field(
        None, description="milliseconds of the dense layer alone, if the budget is a time"
    )
    ms_after: float | None = Field(
        None, description="milliseconds of the SBF layer alone, if the budget is a time"
    )
    error: float = Field(
        description="share of the variance of the dense layer's output that is not rebuilt"
    )
    reason: str = Field(description="why the layer has these values")

    @model_validator(mode="before")
    @classmethod
    def _all_are_listed(cls, content: Any) -> Any:
        if isinstance(content, dict) and content.get("sources") == ALL:
            kept, channels = content.get("kept"), content.get("channels")
            if isinstance(kept, list) and isinstance(channels, int):
                rebuilt = max(0, channels - len(kept))
                return {**content, "sources": [list(kept) for _ in range(rebuilt)]}
        return content

    @field_serializer("sources")
    def _abbreviate(self, sources: list[list[int]]) -> list[list[int]] | str:
        return ALL if len(sources) > 0 and all(row == self.kept for row in sources) else sources

    @model_validator(mode="after")
    def _is_consistent(self) -> "SBFLayer":
        kept = set(self.kept)
        if self.kept != sorted(kept) or not kept <= set(range(self.channels)) or not kept:
            raise ValueError(f"kept must be ascending channels out of {self.channels}")
        if len(self.sources) != self.channels - len(kept):
            raise ValueError(
                f"sources has {len(self.sources)} rows for "
                f"{self.channels - len(kept)} rebuilt channels"
            )
        if len({len(row) for row in self.sources}) > 1:
            raise ValueError("every rebuilt channel must have equally many sources")
        if [] in self.sources:
            raise ValueError("a rebuilt channel must have a source")
        if any(source not in kept for row in self.sources for source in row):
            raise ValueError("a source must be a kept channel")
        if self.transform_size < 1 or self.transform_size % 2 == 0:
            raise ValueError(f"transform_size = {self.transform_size} must be odd")
        return self


class DenseLayer(BaseModel):
    """A convolution that stays as it is, and why."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["dense"] = "dense"
    reason: str = Field(description="why it stays dense")
    macs: int = Field(description="its multiply-adds")
    ms: float | None = Field(None, description="milliseconds of the layer alone, if measured")
    convertible: bool = Field(description="whether it could have been an SBF layer")


NOT_JUDGED = "Not judged: "  # begins the sentence of an explanation that says why

NEW_IN_2 = ("criterion", "explanation", "removed", "arguments", "other_inputs")

Layer = Annotated[SBFLayer | DenseLayer, Field(discriminator="kind")]


class OtherInput(BaseModel):
    """An input of a network beside the images."""

    model_config = ConfigDict(extra="forbid")

    shape: tuple[int, ...] = Field(description="without the number of images")
    dtype: str = Field(description="'float': the network's own, or PyTorch's name, e.g. 'int64'")


class Removed(BaseModel):
    """Channels of one module that are cut off, by their numbers in the dense network."""

    model_config = ConfigDict(extra="forbid")

    out: list[int] = Field(
        [],
        description="output channels or features, ascending; of a normalisation or a depthwise "
        "convolution, which has one number of channels, also its input channels",
    )
    inp: list[int] = Field([], description="input channels or features, ascending")

    @model_validator(mode="after")
    def _is_a_list_of_channels(self) -> "Removed":
        for side, channels in (("out", self.out), ("inp", self.inp)):
            if channels != sorted(set(channels)) or (channels and channels[0] < 0):
                raise ValueError(f"{side} must be channels, ascending, each once")
        if not self.out and not self.inp:
            raise ValueError("out or inp must name a channel that is removed")
        return self


class Latency(BaseModel):
    """What the whole network took, dense and converted, measured side by side."""

    model_config = ConfigDict(extra="forbid")

    machine: str = Field(description="processor, threads and software it was measured with")
    batch: int = Field(gt=0, description="images in a forward pass")
    ms_before: float = Field(description="milliseconds of the dense network")
    ms_after: float = Field(description="milliseconds of the student")


class MeasuredFidelity(BaseModel):
    """How near the fitted network is to the dense one, on images that were held out."""

    model_config = ConfigDict(extra="forbid")

    images: int = Field(gt=0, description="held out, from other sources than those fitted to")
    agreement: float | None = Field(
        None, description="share of them of which both give the same class; None without classes"
    )
    agreement_sure: float | None = Field(
        None, description="the same where the dense network's probability is above 0.4"
    )
    kl: float | None = Field(
        None, description="mean KL divergence from the dense network's predictions, of logits"
    )
    error: float | None = Field(
        None, description="mean squared error of other outputs, in units of their variance"
    )
    divergence: float | None = Field(
        None, description="what decided, if it is neither kl nor error: their mean, or the user's"
    )

    def in_words(self) -> str:
        """Say it without the images: '98.1% of the dense network's classes, KL 0.012'."""
        words = []
        if self.agreement is not None:
            words.append(f"{self.agreement:.1%} of the dense network's classes")
        if self.kl is not None:
            words.append(f"KL {self.kl:.3g}")
        if self.error is not None:
            words.append(f"error {self.error:.2%} of the outputs' variance")
        if self.divergence is not None:
            words.append(f"divergence {self.divergence:.3g}")
        return ", ".join(words)


class Plan(BaseModel):
    """All convolutions of one network, by module name in forward order."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1, 2] = Field(2, description="1: from before channels could be removed")
    model: str = Field(
        description="name of the dense network, as sbf_dist.models.build takes it, or the class "
        "'package.module:Class' of a network that it does not know"
    )
    classes: int = Field(description="number of classes that it was built with, or 0")
    arguments: dict[str, Any] = Field({}, description="further ones that it was built with")
    input_shape: tuple[int, int, int] = Field(description="channels, height, width")
    other_inputs: list[OtherInput] = Field([], description="what it takes beside the images")
    budget: dict[str, float] = Field(description="the budget, e.g. {'macs': 0.5}")
    macs_before: int = Field(description="multiply-adds of the dense network, for one image")
    macs_after: int = Field(description="multiply-adds of the student")
    params_before: int = Field(description="parameters of the dense network")
    params_after: int = Field(description="parameters of the student")
    latency: Latency | None = Field(None, description="set if the budget is a time")
    criterion: str | None = Field(None, description="how the importance of channels was measured")
    explanation: list[str] = Field([], description="how the budget was shared out, in sentences")
    fidelity: MeasuredFidelity | None = Field(None, description="as fitted, before any training")
    removed: dict[str, Removed] = Field(
        {},
        description="by module name, what is cut off before SBF layers are put in; the channels "
        "of `layers` are numbered after it",
    )
    layers: dict[str, Layer] = Field(
        description="each convolution, by module name: an SBF layer, or dense and why"
    )

    @model_validator(mode="after")
    def _is_of_its_format(self) -> "Plan":
        if self.format == 1:
            for key in NEW_IN_2:
                if getattr(self, key):
                    raise ValueError(f"a plan of format 1 has no {key}: that is format 2")
        return self

    def digest(self) -> str:
        """Return the SHA-256 of the plan's canonical JSON, 64 hexadecimal digits."""
        text = self.model_dump_json(exclude_none=True, exclude=self._unused())
        return hashlib.sha256(text.encode()).hexdigest()

    def _unused(self) -> set[str]:
        """Fields that are left out of the JSON, as they are of plans from before there were any."""
        return {key for key in NEW_IN_2 if not getattr(self, key)}

    def summary(self) -> str:
        """Say in one line what is converted and what it saves."""
        converted = sum(isinstance(layer, SBFLayer) for layer in self.layers.values())
        summary = (
            f"{converted} of {len(self.layers)} convolutions converted, "
            f"{self.macs_before / 1e6:.2f} → {self.macs_after / 1e6:.2f} M multiply-adds"
        )
        if self.removed:
            summary = f"{summary}, {self._removed_channels()} channels removed"
        if self.latency is not None:
            summary += f", {self.latency.ms_before:.2f} → {self.latency.ms_after:.2f} ms"
        if self.fidelity is not None:
            first, _, rest = self.fidelity.in_words().partition(", ")
            summary += f", {first} on {self.fidelity.images} images held out"
            summary += f" ({rest})" if rest else ""
        for line in self.explanation:
            _, found, why = line.partition(NOT_JUDGED)
            if found:
                summary += f", not judged: {why.removesuffix('.')}"
        return summary

    def _removed_channels(self) -> int:
        return sum(len(self.removed[name].out) for name in self.layers if name in self.removed)

    def save(self, path: Path) -> None:
        """Write the plan as JSON, one line for each short list."""
        write_text(path, _readable_json(self))

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Read a plan; UserError if the file is missing or not a plan."""
        try:
            return cls.model_validate_json(read_bytes(path).decode())
        except FileNotFoundError:
            raise UserError(f"plan {path} does not exist") from None
        except (UnicodeDecodeError, IsADirectoryError) as error:
            raise UserError(f"plan {path} is not a plan: {error}") from None
        except ValidationError as error:
            first = error.errors()[0]
            # The third part of a layer's place is its kind, which is no key in the file.
            in_layer = first["loc"][:1] == ("layers",)
            where = ".".join(
                str(p) for i, p in enumerate(first["loc"]) if not (in_layer and i == 2)
            )
            wrong = first["msg"].removeprefix("Value error, ")
            raise UserError(f"plan {path}: {where or 'file'}: {wrong}") from None


def _readable_json(plan: Plan) -> str:
    """JSON with two-space indentation in which lists of numbers stay on one line."""
    text = json.dumps(plan.model_dump(exclude_none=True, exclude=plan._unused()), indent=2)
    number_list = re.compile(r"\[\n[\s\d,]+\]")  # a string holds no raw newline
    return number_list.sub(lambda match: re.sub(r"\s+", " ", match[0]), text) + "\n"
