"""The methods of a comparison by name, each with the settings that it is at its best with."""

from torch import Tensor, nn

from sbf_dist.compare_recipe import Method
from sbf_dist.compress.budget import Budget
from sbf_dist.compress.reconstruct import compress
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
    match method:
        case "magnitude":
            return prune(model, macs_share, images, importance="l1", everywhere=False)
        case "magnitude-global":
            return prune(model, macs_share, images, importance="l1", everywhere=True)
        case "depgraph":
            return prune(model, macs_share, images, importance="depgraph", everywhere=False)
        case "depgraph-global":
            return prune(model, macs_share, images, importance="depgraph", everywhere=True)
        case "ghost":
            return ghost(model, macs_share, images, seed=seed)
        case "low-rank":
            return low_rank(model, macs_share, images, basis="responses")
        case "low-rank-filters":
            return low_rank(model, macs_share, images, basis="filters")
        case "sbf":
            return _sbf(model, macs_share, images, model_name, classes, seed)


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
