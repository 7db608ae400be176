"""Ray Train's trainer without the helpers that a training without Ray Data does not need."""

from typing import Any

from ray.train import Result
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from launchers.local_ray import runs_locally

# Each is one more process of 125 MB that imports Ray Data before the training can start.
_UNUSED = {"DatasetsCallback"}
# On one machine there is nobody to ask for more nodes, and placement groups die with their Ray.
# The cleaner, besides, asks the API server, which is not there: 12 s of waiting at the end.
_UNUSED_LOCALLY = {"PlacementGroupCleanerCallback"}


class SmallTrainer(DataParallelTrainer):
    """Ray Train's DataParallelTrainer, the helpers left out before its controller is started.

    Not a TorchTrainer, which is this class with Ray's TorchConfig: see process_group.py.
    Ray has no switch for them, so this is done in the one method through which they all pass.
    Where a later Ray names them differently, they are just started again.
    """

    def _initialize_and_run_controller(self, **parts: Any) -> Result:
        local = runs_locally()
        unused = _UNUSED | _UNUSED_LOCALLY if local else _UNUSED
        parts["callbacks"] = [c for c in parts["callbacks"] if type(c).__name__ not in unused]
        if local:
            policy = parts["scaling_policy"]
            for method in ("_send_resource_request", "_maybe_send_resource_request"):
                if hasattr(policy, method):
                    setattr(policy, method, _ask_nobody)
            policy._cancel_resource_request = _ask_nobody
        return super()._initialize_and_run_controller(**parts)


def _ask_nobody() -> None:
    """In place of asking an autoscaler for nodes."""
