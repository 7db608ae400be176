"""The user's own code that builds networks, by name: a function in a file or in a module.

Only what the user names is run: nothing that a saved student or a plan says comes here.
"""

import ast
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


def source_files(name: str) -> dict[str, Path]:
    """Return the files that the code of `name` is in, by their paths from its folder.

    Its own file, and those of this folder that it imports, directly or not; of an installed
    package, files of this package only. Found in import statements, without running the code:
    what is imported in other ways, or read as data, is not among them. Raises UserError if there
    is no such file or module.
    """
    place = name.rpartition(":")[0]
    if place.endswith(".py"):
        path = Path(place)
        if not path.is_file():
            raise UserError(f"model {name!r}: there is no file {path}")
        folder, only, waiting = path.parent, None, [path]
    else:
        folder, only = _folder_of_module(name, place)
        waiting = list(_files_of(folder, place))
    found: dict[str, Path] = {}
    while waiting:
        file = waiting.pop()
        key = file.relative_to(folder).as_posix()
        if key in found:
            continue
        found[key] = file
        for module in _imported(file, file.parent.relative_to(folder).parts):
            top = module.partition(".")[0]
            # This project's own files are known by its version.
            if top == only if only is not None else top != __name__.partition(".")[0]:
                waiting += _files_of(folder, module)
    return found


def _folder_of_module(name: str, place: str) -> tuple[Path, str | None]:
    """Return the folder that a module's package is in, and the only package of it that counts.

    None in the working directory, where all is the user's.
    """
    top = place.partition(".")[0]
    with _importable(Path()):
        try:
            spec = importlib.util.find_spec(top)
        except ValueError:  # of a module without a specification
            spec = None
    if spec is None:
        raise UserError(f"model {name!r} is unknown: there is no module {top!r}")
    places = list(spec.submodule_search_locations or ()) or [spec.origin or ""]
    folder = Path(places[0]).parent
    return folder, None if folder.resolve() == Path().resolve() else top


def _files_of(folder: Path, module: str) -> Iterator[Path]:
    """Yield the files in `folder` that importing `module` runs: of its packages, then its own."""
    place = folder
    for part in module.split("."):
        place = place / part
        for file in (place / "__init__.py", place.with_name(f"{part}.py")):
            if file.is_file():
                yield file
                break


def _imported(file: Path, package: tuple[str, ...]) -> Iterator[str]:
    """Yield the modules, and what may be modules, that a file of a package imports.

    modulefinder of Python 3.11 does this too, but fails at packages without __init__.py.
    """
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # it cannot run either
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *([node.module] if node.module else [])))
            yield base
            yield from (f"{base}.{alias.name}".lstrip(".") for alias in node.names)


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
