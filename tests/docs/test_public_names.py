import inspect
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

import sbf_dist

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
NAMES = re.findall(r"^::: ([\w.]+)$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("name", sbf_dist.__all__)
def test_a_public_name_is_on_the_page_and_documented(name):
    assert f"sbf_dist.{name}" in NAMES
    value = getattr(sbf_dist, name)
    assert inspect.getdoc(value)
    for member in undocumented(value):
        pytest.fail(f"{name}.{member} has no docstring")


def undocumented(value: object) -> list[str]:
    """Return the public methods and properties of a class, and fields, that say nothing."""
    if not inspect.isclass(value):
        return []
    fields = getattr(value, "__dataclass_fields__", {})
    own = {
        name: member
        for name, member in vars(value).items()
        if not name.startswith("_")
        and name not in fields  # which the class's docstring tells
        and (inspect.isroutine(member) or isinstance(member, property))
    }
    silent = [name for name, member in own.items() if not inspect.getdoc(getattr(value, name))]
    if issubclass(value, BaseModel):
        silent += [name for name, field in value.model_fields.items() if not field.description]
    return silent


def test_a_member_without_a_docstring_is_found():
    class Silent:
        def spoken(self) -> None:
            """Say something."""

        def unspoken(self) -> None:
            pass

        @property
        def hidden(self) -> int:
            return 1

    assert undocumented(Silent) == ["unspoken", "hidden"]
