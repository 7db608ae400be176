"""Runs that an earlier version began: they keep the defaults of that version."""

from launchers.run.folder import RunFolder
from sbf_dist.recipe import Recipe

# Keys of `distill` whose default has changed, and what it was.
_BEFORE = {"targets": "stored", "label_weight": 0.5}


def as_begun(recipe: Recipe, folder: RunFolder) -> tuple[Recipe, list[str]]:
    """Return the recipe with the defaults that a run was begun with, and lines on which they are.

    That concerns keys that the recipe does not set, of a folder whose recipe has the old default.
    """
    if not folder.recipe.exists():
        return recipe, []
    recorded = folder.read_recipe().get("distill", {})
    distill = recipe.distill
    kept = {
        key: value
        for key, value in _BEFORE.items()
        if key not in distill.model_fields_set
        and recorded.get(key) == value
        and getattr(distill, key) != value
    }
    if not kept:
        return recipe, []
    named = " and ".join(f"distill.{key} = {value}" for key, value in kept.items())
    line = (
        f"{named}: this run keeps the defaults of the version that started it; use another name "
        "(name=…) for the current defaults"
    )
    return recipe.model_copy(update={"distill": distill.model_copy(update=kept)}), [line]
