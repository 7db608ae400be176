"""Recipes as rows of keys and values, those first in which runs differ."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sbf_dist.errors import without_credentials

_ABSENT = "-"


@dataclass(frozen=True)
class KeyRow:
    """One key, and its value in each of the recipes."""

    key: str
    values: tuple[str, ...]

    @property
    def differs(self) -> bool:
        return len(set(self.values)) > 1


def key_rows(recipes: Sequence[Mapping[str, Any] | None]) -> list[KeyRow]:
    """Return all keys of some recipes (None: not known) in their order."""
    flat = [dict(_flattened(recipe or {})) for recipe in recipes]
    keys = dict.fromkeys(key for recipe in flat for key in recipe)
    return [KeyRow(key, tuple(r.get(key, _ABSENT) for r in flat)) for key in keys]


def _flattened(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        parts = list(value.items())
    elif isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
        parts = [(str(number), entry) for number, entry in enumerate(value)]
    else:
        text = value if isinstance(value, str) else json.dumps(value)
        yield prefix, without_credentials(text)
        return
    for key, entry in parts:
        yield from _flattened(entry, f"{prefix}.{key}" if prefix else str(key))
