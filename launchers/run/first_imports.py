"""What a worker imports while the driver prepares the first work for it."""

from typing import Any


def import_libraries(_: dict[str, Any]) -> None:
    """Import what trainings need, on a worker: seconds that the first of them does not wait."""

    import launchers.run.training  # noqa: F401
    from launchers.on_ray import ray_train
    from sbf_dist.train.engine import quiet_deepspeed

    quiet_deepspeed(ray_train.place().device)
