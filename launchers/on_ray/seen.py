"""What a Ray cluster has: its machines, CPUs and GPUs."""

from launchers.on_ray.local_ray import local_ray


def seen_by_ray(address: str) -> str:
    """Say what the cluster at `address` has. UserError if it cannot be reached."""
    with local_ray(1, address=address):
        import ray

        machines = sum(bool(node["Alive"]) for node in ray.nodes())
        total = ray.cluster_resources()
    cpus, gpus = total.get("CPU", 0), total.get("GPU", 0)
    return f"{address} has {machines} machines, {cpus:g} CPUs, {gpus:g} GPUs"
