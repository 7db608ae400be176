import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import Field

from sbf_dist.recipe import Recipe
from sbf_dist.schema import Positive, Section

SCRIPTS = Path(__file__).parents[2] / "docs" / "scripts"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recipe_page = script("recipe_page")
command_page = script("command_page")


@pytest.mark.parametrize("made", [recipe_page, command_page], ids=["recipes", "command line"])
def test_the_page_is_what_the_program_says(made):
    assert made.PAGE.read_text() == made.page(), f"run python docs/scripts/{made.__name__}.py"


def test_every_key_of_a_recipe_has_a_row():
    page = recipe_page.page()
    found = recipe_page._parts(Recipe)
    keys = {name for part in found for name in part.section.model_fields}
    assert len(keys) > 100
    assert [key for key in keys if f"| `{key}` |" not in page] == []


def test_links_to_sections_lead_to_headings():
    page = recipe_page.page()
    headings = {
        line.lstrip("# ").replace(".", "").lower() for line in page.splitlines() if line[:1] == "#"
    }
    links = {part.partition(")")[0] for part in page.split("](#")[1:]}
    assert len(links) > 10
    assert links <= headings


class Silent(Section):
    """A part of which one key is not explained."""

    told: Positive = Field(1, description="what it is")
    untold: Positive = 1


def test_a_key_without_a_description_is_refused():
    with pytest.raises(ValueError, match=r"Silent\.untold has no description"):
        recipe_page._table(Silent, {})


class Numbers(Section):
    """Types and limits."""

    share: float | None = Field(None, gt=0, lt=1, description="a share")
    count: int | tuple[int, int] = Field(1, description="a number, or from to")
    sides: list[Positive] = Field([8], min_length=1, description="some numbers")


def test_types_limits_and_defaults_are_in_words():
    rows = recipe_page._table(Numbers, {}).splitlines()[2:]
    assert rows == [
        "| `share` | number > 0, < 1 or `null` | `null` | a share |",
        "| `count` | whole number or [whole number, whole number] | `1` | a number, or from to |",
        "| `sides` | list: whole number ≥ 1 (at least 1) | `[8]` | some numbers |",
    ]
