"""The user's own code that builds networks, by name: a function in a file or in a module.

Only what the user names is run: nothing that a saved student or a plan says comes here.
"""

import difflib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from sbf_dist.errors import UserError


def build(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Build the network `name`: 'path/to/file.py:function' or 'package.module:function'.

    A relative path, and a module that is not installed, are looked for in the working directory.
    The function, or class, is called with `arguments`. Raises UserError, in one line, if there is
    no such function, if it does not take the arguments or fails, or returns no module.
    """
    with _function(name) as function:
        try:
            inspect.signature(function).bind(**arguments)
        except TypeError as error:
            what = f"the arguments {dict(arguments)}" if arguments else "no arguments"
            raise UserError(f"model {name!r} cannot be built with {what}: {error}") from None
        except ValueError:
            pass  # it has no signature: the call will tell
        try:
            network = function(**arguments)
        except UserError:
            raise
        except Exception as error:  # whatever the user's code raises
            raise UserError(f"model {name!r} fails: {_in_one_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise UserError(f"model {name!r} returns a {type(network).__name__}: it must be a module")
    return network


def complete(name: str, classes: int | None, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return `arguments` with `num_classes`, if the function of that name has such a parameter.

    Unless it is given already, or `classes` is None.
    """
    if classes is None or "num_classes" in arguments:
        return dict(arguments)
    with _function(name) as function:
        takes_classes = _takes_classes(function)
    return dict(arguments) | ({"num_classes": classes} if takes_classes else {})


@contextmanager
def _function(name: str) -> Iterator[Callable[..., Any]]:
    """Find a function, beside which modules can be imported as long as the context lasts."""
    place, _, attribute = name.rpartition(":")
    is_file = place.endswith(".py")
    with _importable(Path(place).parent if is_file else Path()):
        holder = _file(name, Path(place)) if is_file else _module(name, place)
        yield _attribute(name, holder, attribute)


def _file(name: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"model {name!r}: there is no file {path}")
    # A name that no other file's module has, so that none takes another's place.
    own_name = f"sbf_dist_user_{path.resolve().as_posix().replace('/', '_').removesuffix('.py')}"
    if own_name in sys.modules:
        return sys.modules[own_name]
    spec = importlib.util.spec_from_file_location(own_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[own_name] = module  # where dataclasses and others look for their module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[own_name]
        if isinstance(error, Exception):
            raise UserError(f"model {name!r}: {path} fails: {_in_one_line(error)}") from error
        raise
    return module


def _module(name: str, place: str) -> Any:
    try:
        return pkgutil.resolve_name(f"{place}:")
    except ModuleNotFoundError as error:
        raise UserError(
            f"model {name!r} is unknown: there is no module {error.name!r} (a file is named as "
            "path/to/file.py:function)"
        ) from None
    except Exception as error:  # whatever the user's code raises
        raise UserError(
            f"model {name!r}: importing {place} fails: {_in_one_line(error)}"
        ) from error


def _attribute(name: str, holder: Any, attribute: str) -> Callable[..., Any]:
    value = holder
    for part in attribute.split("."):
        value = getattr(value, part, None)
    if callable(value):
        return value
    known = [key for key, one in vars(holder).items() if callable(one) and not key.startswith("_")]
    near = difflib.get_close_matches(attribute, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(f"model {name!r}: it has no function {attribute!r}{hint}")


def _takes_classes(function: Callable[..., Any]) -> bool:
    try:
        return "num_classes" in inspect.signature(function).parameters
    except ValueError:
        return False


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let modules beside the user's code be imported, as Python does for a script."""
    place = str(folder.resolve())
    sys.path.insert(0, place)
    try:
        yield
    finally:
        sys.path.remove(place)
