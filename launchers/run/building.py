"""A network of a run as a module: its architecture, its plan applied, weights loaded."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from launchers.run.networks import Network
from sbf_dist import models
from sbf_dist.compression.convert import convert
from sbf_dist.compression.plan import Plan
from sbf_dist.weights import load_weights


def build_network(
    network: Network,
    num_classes: int,
    weights: Path | None,
    say: Callable[[str], None] | None = None,
) -> nn.Module:
    """Build a network with `weights`, or with random ones. UserError for weights that do not fit.

    `weights` is network.weights for the network as it came out of its training, and what its
    training starts from for the network before. `say` is called with the line on what was found
    in a file that holds more than the network's weights, or other names.
    """
    model = models.build(network.model, num_classes, network.arguments)
    if network.plan is not None:
        model = convert(model, Plan.load(network.plan))
    if weights is not None:
        found = load_weights(model, weights)
        if found is not None and say is not None:
            say(found)
    return model
