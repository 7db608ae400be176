"""What the training of a network came to, kept beside its weights, and whether it can be used."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from launchers.run.network import Network
from sbf_dist.errors import UserError
from sbf_dist.files import read_json, sha256, write_json
from sbf_dist.weights import is_whole, read_safetensors

_WEIGHTS = "weights_sha256"

_log = logging.getLogger(__name__)


def is_trained(network: Network) -> bool:
    """Whether a training is done: there are its weights, and after them what it came to.

    A warning where one of the two files is damaged; the training is not done then, and goes on from
    its last checkpoint.
    """
    if not (network.weights.exists() and network.result.exists()):
        return False
    try:
        kept = read_json(network.result).get(_WEIGHTS)
    except UserError as error:
        fault = str(error)
    else:
        # Earlier versions noted no digest.
        whole = is_whole(network.weights) if kept is None else sha256(network.weights) == kept
        if whole:
            return True
        fault = f"weights {network.weights} are damaged"
    _log.warning(
        "%s; the training of %s goes on from its last checkpoint, if there is one",
        fault,
        network.name,
    )
    return False


def keep(network: Network, outcome: Mapping[str, Any]) -> None:
    """Let a training count as done. UserError, and it is not done, where it has diverged."""
    wrong = [key for key, value in outcome.items() if not _is_finite(value)]
    if not wrong:
        state = read_safetensors(network.weights)
        wrong = [name for name, value in state.items() if not _is_finite(value)]
    if wrong:
        network.weights.unlink(missing_ok=True)
        raise UserError(
            f"{network.name} has diverged: after its training, {wrong[0]} is not finite; lower its "
            "learning rate or lengthen its warm-up, and repeat the stage (--again)"
        )
    write_json(network.result, {**outcome, _WEIGHTS: sha256(network.weights)})


def read(network: Network) -> dict[str, Any]:
    """Return what a training that is done came to."""
    content = read_json(network.result)
    return {key: value for key, value in content.items() if key != _WEIGHTS}


def check_finite(name: str, model: nn.Module, path: Path | None = None) -> None:
    """UserError, naming the network and the file, where a weight is not finite."""
    for key, value in model.state_dict().items():
        if not _is_finite(value):
            of = f" of {path}" if path is not None else ""
            raise UserError(f"{name}: the weights{of} are not finite: {key}")


def check_scores(name: str, scores: Mapping[str, Any]) -> None:
    """UserError, naming the network, where a figure of it is not finite."""
    for key, value in scores.items():
        if not _is_finite(value):
            raise UserError(
                f"{name}: its {key} is {value}: the network's predictions are not finite; repeat "
                "the stage that made it (--again)"
            )


def _is_finite(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    return not isinstance(value, float) or math.isfinite(value)
