"""Files of weights: written as safetensors, read from whatever holds a state dict of tensors."""

import argparse
import json
import logging
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sbf_dist.errors import UserError
from sbf_dist.files import replacing
from sbf_dist.heads import head_of, is_known
from sbf_dist.state_views import (
    BATCH_COUNT,
    EXTRA_STATE,
    State,
    StateView,
    first_parts,
    some,
    views_of,
)
from sbf_dist.surgery import deep_copy, unwrapped

logger = logging.getLogger(__name__)

AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")  # heads in torchvision's published weights
DEPTH = 3  # of dicts in dicts in which a state dict is looked for


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the state dict of `model` as safetensors, in one step.

    What modules return from get_extra_state and is no tensor is written as JSON into the file's
    metadata. Raises UserError for extra state that JSON cannot hold.
    """
    save_state(model.state_dict(), path)


def save_state(state: Mapping[str, Any], path: Path) -> None:
    """Write a state dict as `save_weights` does."""
    # Cloned: safetensors refuses one tensor under two names, as shared modules have.
    tensors, extra = {}, {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            tensors[name] = value.detach().cpu().contiguous().clone()
        else:
            extra[name] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = _metadata(extra)
    with replacing(path) as partial:
        save_file(tensors, partial, metadata)


def _metadata(extra: State) -> dict[str, str] | None:
    if not extra:
        return None
    for name, value in extra.items():
        try:
            same = json.loads(json.dumps(value)) == value
        except (TypeError, ValueError):
            same = False
        if not same:
            raise UserError(
                f"extra state {name} is a {type(value).__name__}: only tensors, and what JSON "
                "keeps, can be saved"
            )
    return {EXTRA_STATE: json.dumps(extra)}


def load_weights(
    model: nn.Module,
    path: Path,
    *,
    key: str | None = None,
    prefix: str | None = None,
    new_head: bool = False,
) -> str | None:
    """Load a file of weights into `model`; return a line on what was found, None if nothing is odd.

    The file is safetensors', or torch.save's, zipped or of PyTorch before 1.6, of which tensors,
    numbers, strings and lists alone are unpickled. The state dict may lie in other dicts
    ("state_dict", "model_ema") and its names may have something before them ("module.", "net.",
    "backbone."): both are found by what fits `model`. Where several fit, `key` ("a.b" is b in a)
    and `prefix` choose. As load_state_dict does, floating-point types are converted and the batch
    counts of old files are filled in. `new_head`: where the head alone differs, in the number of
    classes, `model` keeps its own. Raises UserError, in one line that names the file, where nothing
    or more than one thing fits; `model` is then as it was.
    """
    model = unwrapped(model)
    states = _states(path, _read(path), key)
    own = model.state_dict()
    found = [view for name, state in states.items() for view in views_of(name, state, own, prefix)]
    if getattr(model, "aux_logits", None) is False:  # torchvision's, built without these heads
        for view in found:
            view.drop(AUXILIARY)
    if not found:
        raise UserError(
            f"weights {path} have no name that begins with {prefix!r}; their names begin with "
            f"{some(first_parts(states.values()))}"
        )
    if new_head:
        for view in found:
            view.fit_head(own, head_of(model), known=is_known(model))
    fitting = [view for view in found if view.misfit(own) is None]
    if not fitting:
        nearest = max(found, key=lambda view: len(view.state.keys() & own.keys()))
        if not _is_converted(model, nearest):
            raise UserError(f"weights {path}{nearest.place()} {nearest.misfit(own)}")
        fitting = [nearest]
    if len(fitting) > 1:
        raise UserError(_ambiguous(path, fitting))
    (view,) = fitting
    for name, value in own.items():
        if name.endswith(BATCH_COUNT):
            view.state.setdefault(name, value)
    load_state(model, view.state, view.versions)
    return view.describe(path)


def load_state(model: nn.Module, state: Mapping[str, Any], versions: Any = None) -> None:
    """Load a whole state dict into `model`.

    `versions` are those of the modules that wrote it, as state_dict() keeps them in _metadata. A
    safetensors file does not tell them, without which some modules refuse to load (torchvision's
    MNASNet): they are then taken to be those of `model`. Raises RuntimeError as load_state_dict
    does.
    """
    versioned = model.state_dict()
    if versions is not None:
        versioned._metadata = versions  # type: ignore[attr-defined]
    versioned.clear()  # which leaves the versions
    versioned.update(state)
    model.load_state_dict(versioned)


def _is_converted(model: nn.Module, view: StateView) -> bool:
    """Tell whether the network's own code takes the names of older versions and converts them."""
    if view.state.keys() == model.state_dict().keys():
        return False
    try:
        load_state(deep_copy(model), view.state, view.versions)
    except RuntimeError as error:
        logger.debug("%s: %s", type(model).__name__, error)
        return False
    return True


def _ambiguous(path: Path, fitting: list[StateView]) -> str:
    keys = list(dict.fromkeys(view.key for view in fitting))
    if len(keys) > 1:
        named = ", ".join(key or "the file itself" for key in keys)
        return (
            f"weights {path} hold {len(keys)} state dicts that fit, {named}: choose a weights key"
        )
    named = ", ".join(repr(view.prefix) for view in fitting)
    return f"weights {path} fit with {len(fitting)} prefixes, {named}: choose a weights prefix"


# ---------------------------------------------------------------- reading


def _read(path: Path) -> Any:
    """Return what a file holds."""
    if not path.exists():
        raise UserError(f"weights {path} do not exist")
    if path.is_fifo():  # which would be waited for
        raise UserError(f"weights {path} are a pipe; give a file")
    if path.is_file() and _is_pickled(path):
        return _read_pickled(path)
    try:
        return read_safetensors(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"weights {path} are neither a safetensors file nor torch.save's: {error}"
        ) from None


def read_safetensors(path: Path) -> State:
    """Return what `save_weights` wrote: tensors, and extra states that are none.

    Raises SafetensorError, OSError or ValueError for any other file.
    """
    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        extra = json.loads((file.metadata() or {}).get(EXTRA_STATE, "{}"))
    return {**state, **extra}


def is_whole(path: Path) -> bool:
    """Whether there is a file of `save_weights` that is as long as it says; no tensor is read."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def _is_pickled(path: Path) -> bool:
    """Tell whether a file is torch.save's: a zip archive, or pickles one after the other."""
    with path.open("rb") as file:
        start = file.read(9)
    return zipfile.is_zipfile(path) or (start[:1] == b"\x80" and start[8:] != b"{")


def _read_pickled(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise UserError(
                    f"weights {path} are a TorchScript archive: write the state dict of the "
                    "network with torch.save"
                )
    try:
        # A namespace, which training scripts put beside the weights, only has attributes.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # in a damaged file the unpickler stumbles over anything
        what = re.search(r"GLOBAL ([\w.]+)", str(error))
        named = f" ({what[1]})" if what else ""
        raise UserError(
            f"weights {path} hold more than tensors{named}, which is not unpickled, or are "
            "damaged: write the state dict alone, best with safetensors.torch.save_file"
        ) from None


def _states(path: Path, content: Any, key: str | None) -> dict[str, State]:
    """Return the state dicts in a file's content by key, '' for the content itself."""
    found = dict(_state_dicts(content, "", DEPTH))
    if not found:
        raise UserError(f"weights {path} are not a state dict: expected tensors by name")
    if key is None:
        return found
    if key not in found:
        keys = [name for name in found if name]
        message = f"there are {some(keys)}" if keys else "the state dict is the file itself"
        raise UserError(f"weights {path} have no state dict in {key!r}; {message}")
    return {key: found[key]}


def _state_dicts(content: Any, key: str, depth: int) -> Iterator[tuple[str, State]]:
    if not isinstance(content, Mapping):
        return
    if _is_state(content):
        yield key, content  # type: ignore[misc]
        return
    for name, value in content.items() if depth else ():
        yield from _state_dicts(value, f"{key}.{name}" if key else str(name), depth - 1)


def _is_state(content: Mapping) -> bool:
    return any(isinstance(value, Tensor) for value in content.values()) and all(
        isinstance(name, str) and (isinstance(value, Tensor) or name.endswith(EXTRA_STATE))
        for name, value in content.items()
    )
