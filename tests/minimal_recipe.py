"""A recipe as short as one can be, and what is said of a wrong one."""

from pathlib import Path

import pytest

from sbf_dist import recipe
from sbf_dist.errors import UserError

MINIMAL = """
name: tiny
data: {source: digits, image_size: 16}
teachers:
  - {name: one, model: cifar_resnet8, training: {steps: 100}}
  - {name: two, model: cifar_resnet14, weights: two.safetensors}
compress: {teacher: one, macs: 0.5}
distill: {training: {steps: 50}}
"""


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as refused:
        recipe.load(path, overrides)
    message = str(refused.value)
    assert "\n" not in message
    assert "pydantic" not in message
    assert "nput" not in message, "pydantic's words, not the user's"
    return message
