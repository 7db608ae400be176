"""The settings of `sbf compress`: one network, images and a budget, without any training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from sbf_dist.recipe import Data, OneShotCompression
from sbf_dist.schema import Section, Seed, equals, validate_as


class _WithoutRounds(OneShotCompression):
    """The settings of compression, without the rounds that need training."""

    @model_validator(mode="before")
    @classmethod
    def _has_no_rounds(cls, content: Any) -> Any:
        if isinstance(content, dict) and "rounds" in content:
            content = dict(content)
            rounds = content.pop("rounds")
            if rounds != 1:
                raise ValueError(
                    f"rounds = {rounds!r} must be 1 here: there is no training between rounds "
                    "(sbf run has it)"
                )
        return content


class OneShot(Section):
    """One network that is compressed in one step."""

    model: str = Field(
        description="network, e.g. timm:resnet50, cifar_resnet20 or nets/mine.py:function "
        "(sbf_dist.models.build)"
    )
    arguments: dict[str, Any] = Field(
        {},
        exclude_if=equals({}),
        description="further arguments that the network is built with, e.g. in_chans",
    )
    weights: Path = Field(description="safetensors file, or a state dict of torch.save")
    seed: Seed = Field(0, description="seed of all random numbers")
    data: Data
    compress: _WithoutRounds


def validate(content: dict[str, Any], overrides: Sequence[str], origin: str) -> OneShot:
    """Check the settings of one compression, as sbf_dist.recipe.validate does those of a run."""
    return validate_as(OneShot, content, overrides, origin)
