"""The methods of a comparison by name, each with the settings that it is at its best with."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from sbf_dist.budget import Budget
from sbf_dist.compare_recipe import Method
from sbf_dist.compression.reconstruct import compress
from sbf_dist.peers.ghost import ghost
from sbf_dist.peers.low_rank import low_rank
from sbf_dist.peers.pruned import prune

TITLES: dict[Method, str] = {
    "magnitude": "magnitude pruning",
    "magnitude-global": "magnitude pruning, global",
    "depgraph": "DepGraph",
    "depgraph-global": "DepGraph, global",
    "ghost": "Ghost",
    "low-rank": "low rank",
    "low-rank-filters": "low rank, filters' SVD",
    "sbf": "SBF",
}


def compressed(
    method: Method,
    model: nn.Module,
    macs_share: float,
    images: Tensor,
    *,
    model_name: str,
    classes: int,
    seed: int,
) -> nn.Module:
    """Bring `model` to `macs_share` of its multiply-adds; untrained, in eval mode.

    `images` (N, C, H, W) are calibration images. UserError if the method cannot get there.
    """
    magnitude = partial(prune, model, macs_share, images, importance="l1")
    depgraph = partial(prune, model, macs_share, images, importance="depgraph")
    ways: dict[Method, Callable[[], nn.Module]] = {
        "magnitude": partial(magnitude, everywhere=False),
        "magnitude-global": partial(magnitude, everywhere=True),
        "depgraph": partial(depgraph, everywhere=False),
        "depgraph-global": partial(depgraph, everywhere=True),
        "ghost": partial(ghost, model, macs_share, images, seed=seed),
        "low-rank": partial(low_rank, model, macs_share, images, basis="responses"),
        "low-rank-filters": partial(low_rank, model, macs_share, images, basis="filters"),
        "sbf": partial(_sbf, model, macs_share, images, model_name, classes, seed),
    }
    return ways[method]()


def _sbf(
    model: nn.Module, macs_share: float, images: Tensor, model_name: str, classes: int, seed: int
) -> nn.Module:
    """What the library does by itself: the one place that says how SBF enters comparisons."""
    student, _ = compress(
        model,
        images,
        model_name=model_name,
        classes=classes,
        budget=Budget(macs=macs_share),
        sources=8,
        seed=seed,
    )
    return student
