"""Parameters that a training leaves as they are, by patterns of their names."""

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sbf_dist.errors import UserError

NAMED = 4  # names in a message


def frozen_names(network: nn.Module, patterns: Sequence[str], *, key: str = "freeze") -> list[str]:
    """Return the names of the parameters that match one of `patterns`, as of shells.

    UserError, which begins with `key`, for a pattern that matches none, and where they leave
    nothing to train.
    """
    return matching([name for name, _ in network.named_parameters()], patterns, key=key)


def matching(names: Sequence[str], patterns: Sequence[str], *, key: str) -> list[str]:
    """Return those of the names of parameters that match, as frozen_names does."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"{key}: no parameter matches {pattern!r}; {_similar(pattern, names)}")
    found = [name for name in names if any(fnmatchcase(name, p) for p in patterns)]
    if names and len(found) == len(names):
        raise UserError(f"{key}: {list(patterns)} matches all parameters, so none is trained")
    return found


def freeze(network: nn.Module, patterns: Sequence[str]) -> None:
    """Leave parameters that match out of the training, before an engine is built.

    Batch norms none of whose parameters is trained stay in evaluation mode: they normalise with
    the statistics that they have, which do not move. UserError as frozen_names.
    """
    if not patterns:
        return
    frozen = set(frozen_names(network, patterns))
    for name, parameter in network.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    for module in network.modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, _BatchNorm) and own and not any(p.requires_grad for p in own):
            # Its mode is set before each pass: engines put the whole network into training mode.
            module.register_forward_pre_hook(_evaluate)
            module.eval()


def _evaluate(module: nn.Module, _: object) -> None:
    module.training = False


def _similar(pattern: str, names: Sequence[str]) -> str:
    """Name parameters whose names are like a pattern, or its beginning."""
    begun = [name for name in names if name.startswith(pattern.rstrip("*.") + ".")]
    if begun:
        return f"did you mean '{pattern.rstrip('*.')}.*'?"
    plain = pattern.replace("*", "").strip(".")
    modules = list(dict.fromkeys(part for name in names for part in _beginnings(name)))
    near = difflib.get_close_matches(plain, modules, n=NAMED, cutoff=0.5)
    return f"similar are {', '.join(near)}" if near else f"there are {', '.join(names[:NAMED])}, …"


def _beginnings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
