"""The methods of a comparison by name, each with the settings that it is at its best with."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from sbf_dist.compare_recipe import Method
from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.one_shot import compress
from sbf_dist.peers.ghost import ghost
from sbf_dist.peers.low_rank import low_rank
from sbf_dist.peers.pruned import prune
from sbf_dist.settings import Compression

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
        "sbf": partial(_sbf, model, macs_share, images, seed),
    }
    return ways[method]()


def _sbf(model: nn.Module, macs_share: float, images: Tensor, seed: int) -> nn.Module:
    """Compress with the library's defaults but for S: how SBF enters comparisons."""
    settings = Compression(macs=macs_share, sources=8)
    # The network is not saved, so that its name need not be found out.
    apart = Calibration.of(images, sources=range(len(images)))  # each is a file of its own
    student, _ = compress(model, apart, settings, name=type(model).__name__, seed=seed)
    return student
