"""Writes docs/recipes.md: every key of a recipe, from the schema that checks it.

python docs/scripts/recipe_page.py
"""

import collections.abc
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import annotated_types
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from sbf_dist.compare_recipe import Comparison
from sbf_dist.compress_recipe import OneShot
from sbf_dist.recipe import Recipe
from sbf_dist.schema import Name, Place, RunName, Section

PAGE = Path(__file__).parents[1] / "recipes.md"
INTRODUCTION = """\
# Recipes

A recipe is a YAML file with the settings of a run. The folder `recipes/` holds those to start
from: `recipes/folder.yaml` for your own images, `recipes/digits.yaml` for the demo. Any key can be
changed on the command line, with dots between its parts and YAML after the equals sign:

    sbf run recipes/folder.yaml data.root=photos compress.macs=0.35 'workers.count=[2, 8]'

An unknown key, a wrong type or a value outside the limits is refused in one line before anything
starts. `sbf run RECIPE --dry-run` checks a recipe and estimates what the run needs.

A finished stage records which keys it has read. If you change one of them later, the run stops and
names the stage to repeat ([architecture](../ARCHITECTURE.md#a-run)). These may change at any time:
keys of `workers`, `checkpoints` and `tracking`, and of a training `log_every`, `checkpoint_every`,
`profile_steps`, `skip_bad_steps` and `compile`. A training that is not finished resumes from its
last checkpoint with more `steps` or `epochs`, and with other `images_at_once` or `accumulation`.

This page is generated from the schema (`python docs/scripts/recipe_page.py`); a test compares the
two.
"""
SETTINGS_OF_COMPRESS = """\
`sbf compress` takes these as `KEY=VALUE`. Sections are those of a run's recipe; `compress` has
neither `teacher` nor `rounds` here.
"""
COMPARISON = """\
`sbf compare` takes it. Sections that are not described here are those of a run's recipe.
"""
_WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path"}
_PAGE = re.compile(r"docs/([\w-]+)\.md")
_OR_NULL = " or `null`"
_NAMED = {
    Name: "letters, digits, `_`, `-`, `.`; at most 100",
    RunName: "letters, digits, `_`, `-`, `.`; at most 100",
    Place: "path or address (`s3://BUCKET/FOLDER`)",
}


@dataclasses.dataclass(frozen=True)
class Part:
    """A section of a recipe, and the places where it stands."""

    section: type[Section]
    places: list[str]

    @property
    def heading(self) -> str:
        """Its place, or its own name if it has several or is part of an entry of a list."""
        own_name = len(self.places) > 1 or ".N." in self.places[0]
        return self.places[0].rpartition(".")[2] if own_name else self.places[0]

    @property
    def anchor(self) -> str:
        """What GitHub and MkDocs make of the heading."""
        return self.heading.replace(".", "").lower()


def page() -> str:
    """Return the whole page. ValueError names a key or section without a description."""
    parts = _parts(Recipe)
    anchors = {part.section: part.anchor for part in parts}
    own = [part for part in _parts(Comparison) if part.section not in anchors]
    anchors |= {part.section: part.anchor for part in own}
    lines = [INTRODUCTION]
    lines += ["## Recipe of a run\n", _table(Recipe, anchors)]
    lines += [_part(part, anchors) for part in parts]
    lines += ["## Settings of sbf compress\n", SETTINGS_OF_COMPRESS, _table(OneShot, anchors)]
    lines += ["## Recipe of a comparison\n", COMPARISON, _table(Comparison, anchors)]
    lines += [_part(part, anchors) for part in own]
    return "\n".join(lines).rstrip() + "\n"


def _part(part: Part, anchors: dict[type[Section], str]) -> str:
    lines = [f"### {part.heading}\n", f"{_description(part.section)}\n"]
    if len(part.places) > 1:
        lines.append(f"The same keys in {', '.join(f'`{place}`' for place in part.places)}.\n")
    return "\n".join([*lines, _table(part.section, anchors)])


def _parts(whole: type[Section]) -> list[Part]:
    """Return the sections below one in the order in which they are declared, each once."""
    found: dict[type[Section], list[str]] = {}

    def visit(section: type[Section], place: str) -> None:
        for name, field in section.model_fields.items():
            inner = _section(field.annotation)
            if inner is None:
                continue
            several = "N." if typing.get_origin(field.annotation) is list else ""
            here = f"{place}{name}"
            known = inner in found
            found.setdefault(inner, []).append(here)
            if not known:
                visit(inner, f"{here}.{several}")

    visit(whole, "")
    return [Part(section, places) for section, places in found.items()]


def _section(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    inner = (_section(argument) for argument in typing.get_args(annotation))
    return next((section for section in inner if section is not None), None)


def _description(section: type[Section]) -> str:
    if not section.__doc__:
        raise ValueError(f"{section.__name__} has no docstring")
    return inspect.cleandoc(section.__doc__)


def _table(section: type[Section], anchors: dict[type[Section], str]) -> str:
    rows = ["| key | values | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        cells = (f"`{name}`", _values(field), _default(field), _meaning(section, name, anchors))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _meaning(section: type[Section], name: str, anchors: dict[type[Section], str]) -> str:
    field = section.model_fields[name]
    inner = _section(field.annotation)
    text = field.description
    if text is None and inner is not None:
        text = _description(inner).partition(".")[0]
        text = text[0].lower() + text[1:]
    if not text:
        raise ValueError(f"{section.__name__}.{name} has no description")
    text = _PAGE.sub(r"[\1](\1.md)", text)
    if inner in anchors:
        return f"{text} ([keys](#{anchors[inner]}))"
    return text


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if isinstance(field.default, Section):
        return "its keys' defaults"
    return f"`{_yaml(field.default)}`"


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(_yaml(entry) for entry in value)}]"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _values(field: FieldInfo) -> str:
    if any(getattr(entry, "pattern", None) for entry in field.metadata):
        return _NAMED[Name]
    kind, null, _ = _kind(field.annotation).partition(_OR_NULL)
    return f"{kind} {_limits(field.metadata)}".strip() + null


def _kind(annotation: Any) -> str:
    """Return what may be written for a type, its limits included."""
    named = next((words for kind, words in _NAMED.items() if kind is annotation), None)
    if named:
        return named
    if typing.get_origin(annotation) is not None:
        return _compound(typing.get_origin(annotation), typing.get_args(annotation))
    return "section" if _section(annotation) else _WORDS[annotation]


def _compound(origin: Any, inner: tuple[Any, ...]) -> str:
    """Return the same for a type that is made of others."""
    if origin is typing.Annotated:
        return f"{_kind(inner[0])} {_limits(_flat(inner[1:]))}".strip()
    if origin in (typing.Union, types.UnionType):
        shown = [_kind(kind) for kind in inner if kind is not types.NoneType]
        if shown == [_WORDS[int], _WORDS[float]]:
            shown = [_WORDS[float]]
        return " or ".join(shown) + (_OR_NULL if types.NoneType in inner else "")
    words = {
        typing.Literal: lambda: ", ".join(f"`{value}`" for value in inner),
        list: lambda: "list of sections" if _section(inner[0]) else f"list: {_kind(inner[0])}",
        tuple: lambda: f"[{', '.join(_kind(kind) for kind in inner)}]",
        dict: lambda: "mapping",
        collections.abc.Callable: lambda: "function (in Python)",
    }
    return words[origin]()


def _flat(metadata: Iterable[Any]) -> list[Any]:
    return [
        limit
        for entry in metadata
        for limit in (entry.metadata if isinstance(entry, FieldInfo) else [entry])
    ]


def _limits(metadata: list[Any]) -> str:
    words = []
    for limit in metadata:
        for kind, sign, attribute in (
            (annotated_types.Gt, ">", "gt"),
            (annotated_types.Ge, "≥", "ge"),
            (annotated_types.Lt, "<", "lt"),
            (annotated_types.Le, "≤", "le"),
        ):
            if isinstance(limit, kind):
                words.append(f"{sign} {_bound(getattr(limit, attribute))}")
        if isinstance(limit, annotated_types.MinLen):
            words.append(f"(at least {limit.min_length})")
    return ", ".join(words)


def _bound(value: Any) -> str:
    if value == 2**63 - 1:
        return "2^63 - 1"
    return f"{value:,}" if value >= 10**6 else f"{value:g}"


if __name__ == "__main__":
    PAGE.write_text(page())
