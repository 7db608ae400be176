"""Places for workers that this job holds on a cluster: asked for, and given back.

Ray calls a set of places that are taken together a placement group.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager


@contextmanager
def asked_for(place: Mapping[str, float], count: int) -> Iterator[None]:
    """Ask for `count` places of these resources while the context lasts.

    An autoscaler starts machines for what is asked for and not there. What is asked for goes with
    this process, however it ends.
    """
    import ray

    asked = ray.util.placement_group([dict(place)] * count)
    try:
        yield
    finally:
        ray.util.remove_placement_group(asked)


def give_back() -> None:
    """Give back all places that this job holds, with the processes in them.

    Ray Train leaves them behind where its workers have started and not met.
    """
    import ray
    from ray import PlacementGroupID
    from ray.util.placement_group import PlacementGroup

    job = ray.get_runtime_context().get_job_id()
    for name, group in ray.util.placement_group_table().items():
        # The id of whatever a job makes ends with the job's.
        if name.endswith(job) and group["state"] != "REMOVED":
            ray.util.remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(name)))
