"""Machines of a cluster that will be taken away: spot instances, nodes that are scaled down.

Ray knows of them from the cloud's notice, or from `ray drain-node`, and starts nothing on them.
Ray's controller imports this module with ray_train.py: it must not import torch.
"""

import ray
from ray._private import state  # Ray has no public function for it; Ray Train calls the same


def draining_nodes() -> dict[str, int]:
    """Return the nodes that will go: id, and when, in milliseconds since 1970 (0: not known)."""
    return dict(state.state.get_draining_nodes())


def staying_resources() -> dict[str, float]:
    """Return the resources of all nodes that are alive and will stay, by name."""
    leaving = draining_nodes()
    total: dict[str, float] = {}
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] not in leaving:
            for name, amount in node["Resources"].items():
                total[name] = total.get(name, 0.0) + amount
    return total
