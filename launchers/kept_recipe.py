"""The recipe of a run as its folder keeps it: what results depend on."""

from pathlib import Path

from sbf_dist.files import read_json
from sbf_dist.recipe import Recipe, validate


def kept_recipe(path: Path) -> Recipe:
    """Read a run's recipe.json. UserError if it is damaged, or of another version."""
    # Workers are not kept; any number is right here, and some trainings need GPUs to be valid.
    return validate(read_json(path) | {"workers": {"gpus": 1}}, (), f"recipe {path}")
