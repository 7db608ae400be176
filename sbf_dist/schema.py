"""Recipes as YAML files: read, changed by overrides, checked field by field, errors in one line."""

import difflib
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
)
from pydantic_core import ErrorDetails

from sbf_dist import strict_yaml
from sbf_dist.errors import UserError, without_credentials
from sbf_dist.files import read_bytes
from sbf_dist.object_storage import ObjectFolder, is_address

Positive = typing.Annotated[int, Field(ge=1)]
MAX_STEPS, MAX_EPOCHS = 10**9, 10**6  # counted by numbers of 64 bits, with the images of a step
Steps = typing.Annotated[int, Field(ge=1, le=MAX_STEPS)]
Epochs = typing.Annotated[float, Field(gt=0, le=MAX_EPOCHS)]
Share = typing.Annotated[float, Field(gt=0, le=1)]
Above0 = typing.Annotated[float, Field(gt=0)]
_MAX_SHOWN = 200  # characters of a value in a message
MAX_BYTES = 1_000_000  # of a recipe
MAX_NAME = 100  # characters; file systems have a limit, and names get endings
MAX_SEED = 2**63 - 1  # of which random generators take 64 bits, and a run counts on from it
# No dot in front: "." and ".." are folders that exist.
Name = typing.Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$", max_length=MAX_NAME)]
Seed = typing.Annotated[int, Field(ge=0, le=MAX_SEED)]
Side = typing.Annotated[int, Field(ge=8, le=4096)]  # of square images, pixels
# What lies beside the folders of runs.
_TAKEN = ("data", "mlflow.db", "mlflow-artifacts", "mlruns")


def _is_free(name: str) -> str:
    if name.lower() in _TAKEN or name.lower().startswith("mlflow.db"):
        raise ValueError("must not be a reserved name under runs/, as this is")
    return name


def _path_or_address(value: object) -> Path | str:
    if isinstance(value, Path):
        return value
    if not isinstance(value, str):
        raise ValueError("must be a path, or an address as s3://BUCKET/FOLDER")
    if not is_address(value):
        return Path(value)
    try:
        return ObjectFolder.at(value).address
    except UserError as error:
        raise ValueError(str(error)) from None


# A folder of this machine as a Path, or the address of one in an object store as a string, which a
# Path would spoil: it makes s3:/x of s3://x.
Place = typing.Annotated[Path | str, PlainValidator(_path_or_address)]
RunName = typing.Annotated[Name, AfterValidator(_is_free)]


class Section(BaseModel):
    """A part of a recipe; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def equals(default: object) -> Callable[[object], bool]:
    """Return the condition, for a key that earlier versions did not have, to leave it out.

    At its default it is not stored, so that a run of an earlier version is the run that it was.
    """
    return lambda value: value == default


Whole = typing.TypeVar("Whole", bound=Section)  # a whole recipe, of a run or of a comparison


def load_as(schema: type[Whole], path: Path, overrides: typing.Sequence[str] = ()) -> Whole:
    """Read a recipe; `overrides` are KEY=VALUE with dots in KEY and YAML in VALUE.

    Raises UserError that names the key, its value, and what would be right.
    """
    try:
        data = read_bytes(path, MAX_BYTES + 1)
        if not data and path.is_fifo():
            raise UserError(f"recipe {path} is a pipe that nobody writes to; give a file")
        if len(data) > MAX_BYTES:
            raise UserError(f"recipe {path} is larger than {MAX_BYTES} bytes: not a recipe")
        content = strict_yaml.load(data.decode())
    except FileNotFoundError:
        raise UserError(f"recipe {path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"recipe {path} is not YAML: it is a folder") from None
    except OSError as error:
        raise UserError(f"recipe {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {path} is not YAML: {error}") from None
    except strict_yaml.NotARecipeError as error:
        raise UserError(f"recipe {path} {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"recipe {path} must be a mapping of keys to values")
    return validate_as(schema, content, overrides, f"recipe {path}")


def validate_as(
    schema: type[Whole], content: dict[str, Any], overrides: typing.Sequence[str], origin: str
) -> Whole:
    """Return the recipe in `content`, changed by `overrides`; errors begin with `origin`.

    Raises UserError as `load_as` does.
    """
    content = _unshared(content)
    for override in overrides:
        _override(content, override)
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{origin}: {explain(schema, error)}") from None


def _unshared(content: Any) -> Any:
    """Copy what YAML's aliases share, so that an override changes one place only."""
    if isinstance(content, dict):
        return {key: _unshared(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_unshared(value) for value in content]
    return content


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} must look like distill.training.steps=100")
    try:
        value = strict_yaml.load(text)
    except strict_yaml.NotARecipeError:
        raise UserError(
            f"override {_shortened(override)}: {_shortened(text)} is not a YAML value"
        ) from None
    *parents, last = key.split(".")
    place: Any = content
    for depth, part in enumerate(parents):
        place = _step(place, part, override, ".".join(parents[:depth]))
        if place is None:
            empty = ".".join(parents[: depth + 1])
            raise UserError(f"override {override!r}: {empty} is not set; set the whole section")
    if isinstance(place, list):
        _step(place, last, override, ".".join(parents))
        place[int(last)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise UserError(f"override {override!r}: {'.'.join(parents)} has no keys")


def _step(place: Any, part: str, override: str, where: str) -> Any:
    if isinstance(place, list):
        if not part.isdecimal() or int(part) >= len(place):
            entries = f"the entries 0 to {len(place) - 1}" if place else "no entries"
            raise UserError(f"override {override!r}: {where} has {entries}")
        return place[int(part)]
    if isinstance(place, dict):
        return place.setdefault(part, {})
    raise UserError(f"override {override!r}: {where} has no keys")


def explain(schema: type[BaseModel], error: ValidationError) -> str:
    """Return the first error of a recipe as one line."""
    errors = error.errors()
    # A key that is wrongly written is missing as well: say what was written.
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    key = ".".join(str(part) for part in first["loc"] if not _is_choice(part))
    if first["type"] == "extra_forbidden":
        known = _fields_at(schema, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        return f"{key} is not a known key; {hint}"
    if first["type"] == "missing":
        return f"{key} is missing"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" and message.startswith("must"):
        return f"{key} = {_shortened(first['input'])} {message}"
    if first["type"] == "value_error":
        return f"{key}: {message}" if key else message
    words = [e["ctx"]["expected"] for e in errors if _is_word_for(e, first)]
    demand = " or ".join([_demand(first["type"], message), *words])
    return f"{key} = {_shortened(first['input'])} {demand}"


def _is_choice(part: int | str) -> bool:
    """Whether a part of an error's place is one of the types that a key may have, not a key."""
    return isinstance(part, str) and part.startswith(("constrained-", "literal["))


def _is_word_for(error: ErrorDetails, first: ErrorDetails) -> bool:
    """Whether an error says which word would be right in the place of the first error."""
    place = first["loc"][:-1]
    is_word = error is not first and error["type"] == "literal_error"
    return is_word and _is_choice(first["loc"][-1]) and error["loc"][:-1] == place


def _shortened(value: Any) -> str:
    """Return a value as it is written in a message."""
    text = without_credentials(repr(value))
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def _demand(kind: str, message: str) -> str:
    """Turn pydantic's 'Input should be …' into 'must be …'."""
    if kind in ("model_type", "model_attributes_type"):
        return "must be a mapping of keys to values"
    if kind == "path_type":
        return "must be a path"
    if kind == "string_pattern_mismatch":
        return "must be letters, digits, '_', '-' and '.', with no '.' in front"
    if "should" not in message:
        return f"is wrong: {message[0].lower()}{message[1:]}"
    return "must" + message.partition("should")[2].partition(", unable to parse")[0]


def _fields_at(schema: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the section at `location`."""
    section: Any = schema
    for part in location:
        if isinstance(part, int):
            continue
        section = _section_of(section.model_fields[part].annotation)
    return list(section.model_fields)


def _section_of(annotation: Any) -> Any:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation
    candidates = [_section_of(inner) for inner in typing.get_args(annotation)]
    return next(c for c in candidates if isinstance(c, type) and issubclass(c, Section))
