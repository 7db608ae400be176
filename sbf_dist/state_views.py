"""A state dict of a file, seen from behind a prefix of its names, beside that of a network."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sbf_dist.heads import is_within

EXTRA_STATE = "_extra_state"  # ends the names of what a module's get_extra_state returns
BATCH_COUNT = "num_batches_tracked"  # which batch norms of PyTorch before 0.4.1 do not have
COMPILED = "_orig_mod."  # what torch.compile puts into names, wherever the compiled module stands
NAMED = 4  # entries in a message

State = dict[str, Any]  # tensors by name, and extra states


@dataclass
class StateView:
    """A state dict in a file, seen from behind a prefix of its names.

    left_out  names that do not begin with the prefix
    versions  of the modules that wrote it, as state_dict() keeps them
    head      what became of the head, in words; "" where it is like all other layers
    """

    key: str
    prefix: str
    state: State
    left_out: list[str]
    versions: Any
    head: str = ""

    def drop(self, prefixes: tuple[str, ...]) -> None:
        self.state = {n: x for n, x in self.state.items() if not n.startswith(prefixes)}

    def misfit(self, own: Mapping[str, Any]) -> str | None:
        """Say how the state differs from `own`, that of the network, or None if it fits."""
        for name in own:
            if name not in self.state and not name.endswith(BATCH_COUNT):
                return f"lack {name}, which the model has"
        shared = [name for name in own if name in self.state and not name.endswith(EXTRA_STATE)]
        unlike = [name for name in shared if not _same_shape(self.state[name], own[name])]
        if unlike:
            return self._other_shape(unlike, own)
        for name in self.state:
            if name not in own:
                return f"have {name}, which the model does not know"
        for name in shared:
            value, wanted = self.state[name], own[name]
            if value.is_meta:
                return f"hold no values: {name} is on the meta device"
            if wanted.is_floating_point() and not value.is_floating_point():
                return (
                    f"are not floating-point numbers: {name} is {_type(value)}, the model wants "
                    f"{_type(wanted)} (quantized weights are not read)"
                )
        return None

    def _other_shape(self, unlike: list[str], own: Mapping[str, Any]) -> str:
        name = unlike[0]
        message = (
            f"do not fit: {name} is {_shape(self.state[name])}, the model wants {_shape(own[name])}"
        )
        pairs = {(_shape(self.state[n])[:1], _shape(own[n])[:1]) for n in unlike}
        rest = all(_shape(self.state[n])[1:] == _shape(own[n])[1:] for n in unlike)
        if len(pairs) == 1 and rest and len({n.rpartition(".")[0] for n in unlike}) == 1:
            ((theirs, ours),) = pairs
            if theirs and ours and theirs != ours:
                message += f"; only this layer differs: a head of {theirs[0]} outputs for {ours[0]}"
        return message

    def fit_head(self, own: Mapping[str, Any], heads: tuple[str, ...], *, known: bool) -> None:
        """Take the head of `own`, that of the network, where the state's has other classes.

        `heads`: the modules that are the head. Of a network that is not `known` it may be another
        layer, if that is the only one that differs.
        """
        unlike = [n for n in own if n in self.state and not _same_shape(self.state[n], own[n])]
        layers = tuple(dict.fromkeys(name.rpartition(".")[0] for name in unlike))
        if not layers:
            self.head = f"head {', '.join(heads)} taken over"
            return
        is_head = all(is_within(f"{layer}.", heads) for layer in layers)
        if not (is_head or (not known and len(layers) == 1)):
            return
        shapes = [(_shape(self.state[name]), _shape(own[name])) for name in unlike]
        classes = {(theirs[:1], ours[:1]) for theirs, ours in shapes}
        if len(classes) != 1 or any(theirs[1:] != ours[1:] for theirs, ours in shapes):
            return
        if any(not theirs or not ours for theirs, ours in classes):  # a number has no classes
            return
        (((theirs,), (ours,)),) = classes
        self.state |= {name: own[name] for name in own if is_within(name, layers)}
        self.head = (
            f"head {', '.join(layers)} reinitialised: {theirs} classes in the file, {ours} in the "
            "network"
        )

    def place(self) -> str:
        """Say where in the file the state is."""
        where = f", in {self.key!r}" if self.key else ""
        return f"{where}, behind {self.prefix!r}," if self.prefix else where

    def describe(self, path: Path) -> str | None:
        """Return a line on where the state was found."""
        parts = []
        if self.key:
            parts.append(f"taken from {self.key!r}")
        if self.prefix:
            parts.append(f"names without {self.prefix!r}")
        if self.left_out:
            parts.append(f"left out: {some(self.left_out)}")
        if self.head:
            parts.append(self.head)
        return f"weights {path}: {', '.join(parts)}" if parts else None


def views_of(
    key: str, state: State, own: Mapping[str, Any], prefix: str | None
) -> Iterator[StateView]:
    """Look at a state dict from behind `prefix`, or from behind each that could be one."""
    versions = getattr(state, "_metadata", None)
    state = {name: _dense(value) for name, value in state.items()}
    if not any(COMPILED in name for name in own):
        versions = None if any(COMPILED in name for name in state) else versions
        state = {name.replace(COMPILED, ""): value for name, value in state.items()}
    if prefix is not None:
        if not prefix.endswith("."):
            prefix = f"{prefix}." if prefix else ""
        prefixes = [prefix] if any(name.startswith(prefix) for name in state) else []
    else:
        prefixes = _prefixes(state, own)
    for before in prefixes:
        inside = {n.removeprefix(before): x for n, x in state.items() if n.startswith(before)}
        left_out = [name for name in state if not name.startswith(before)]
        yield StateView(key, before, inside, left_out, None if before else versions)


def _prefixes(state: State, own: Mapping[str, Any]) -> list[str]:
    """Return what stands before as many of the network's own names as before any."""
    counts = Counter({"": len(own.keys() & state.keys())})
    by_end: dict[str, list[str]] = {}
    for name in own:
        by_end.setdefault(name.rpartition(".")[2], []).append(name)
    for name in state:
        for candidate in by_end.get(name.rpartition(".")[2], ()):
            if name.endswith(f".{candidate}"):
                counts[name.removesuffix(candidate)] += 1
    most = max(counts.values())
    return [before for before, number in counts.items() if number == most]


def _dense(value: Any) -> Any:
    return value.to_dense() if isinstance(value, Tensor) and value.is_sparse else value


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _same_shape(value: Any, wanted: Any) -> bool:
    # PyTorch before 0.4 had no tensors without dimensions: load_state_dict takes (1,) for them.
    return _shape(value) == _shape(wanted) or (_shape(wanted) == () and _shape(value) == (1,))


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def first_parts(states: Iterable[State]) -> list[str]:
    """Return what names of state dicts begin with, to their first dot, in quotes, each once."""
    names = (name.replace(COMPILED, "") for state in states for name in state)
    return list(dict.fromkeys(repr("".join(name.partition(".")[:2])) for name in names))


def some(names: Any) -> str:
    """List the first names, and how many others there are."""
    first = [str(name) or "the file itself" for name in names]
    more = f" and {len(first) - NAMED} more" if len(first) > NAMED else ""
    return ", ".join(first[:NAMED]) + more
