"""Settings of loaders by their names, put into the objects that they belong to."""

from dataclasses import fields
from typing import Any

from pipelines.reader import Reader
from sbf_dist.settings import View

_OF_READER = {field.name for field in fields(Reader)}
_OF_VIEW = set(View.model_fields)


def grouped(**settings: Any) -> dict[str, Any]:
    """Keyword arguments of a loader: `reader`, `view`, and what is left of the settings."""
    reader = {name: settings.pop(name) for name in _OF_READER & settings.keys()}
    view = {name: settings.pop(name) for name in _OF_VIEW & settings.keys()}
    return {"reader": Reader(**reader), "view": View(**view)} | settings
