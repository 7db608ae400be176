"""A run at work: what its stages need from outside."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from launchers.display import Display
from launchers.interruption import held_back
from launchers.run.folder import RunFolder
from launchers.run.networks import Networks
from launchers.run.shares import has_unlabelled, numbers_of_workers
from launchers.run.worker_pool import WorkerPool
from sbf_dist import tracking
from sbf_dist.recipe import Recipe

Result = dict[str, Any]


@dataclass
class Session:
    """A run at work: its networks (with recipe and folder), display, MLflow run and workers."""

    networks: Networks
    display: Display
    tracker: tracking.Run
    pool: WorkerPool

    @property
    def recipe(self) -> Recipe:
        return self.networks.recipe

    @property
    def folder(self) -> RunFolder:
        return self.networks.folder

    @cached_property
    def num_classes(self) -> int:
        """The outputs of all networks, one for each class of the images."""
        return int(self.folder.read_result("prepare")["classes"])

    def numbers_of_workers(self) -> list[int]:
        """How many workers there may be, once the images are prepared. UserError if none fits."""
        unlabelled = bool(has_unlabelled(self.recipe, self.folder))
        return numbers_of_workers(self.recipe, unlabelled=unlabelled)

    def launch(
        self,
        worker: Callable[[Result], Result],
        name: str,
        log_to: tracking.Run,
        *,
        reached: Callable[[], object] | None = None,
    ) -> Result:
        """Run `worker` on all ranks, for the stage or the round `name`.

        reached  says how far it is, if it writes no checkpoints (see attempts.run_workers)
        """
        if not self.pool.has_begun:
            self.display.wait("starting the workers")
        kept = self.pool.kept()
        # They import Ray, which reads what WorkerPool has set.
        with held_back():
            from launchers.on_ray import attempts
            from launchers.on_ray.local_ray import take_printed

        config = {
            # Workers do not talk to the tracking store, whose URI may hold a password.
            "recipe": self.recipe.model_dump(mode="json", exclude={"tracking"}),
            "runs": self.folder.place_of_runs,
            "driver": self.folder.session,
            "group": name,
            "mlflow_run": self.tracker.run_id,
            "journals": str(log_to.journals.relative_to(self.folder.root)),
        }

        def show(record: dict[str, Any]) -> None:
            self.display.show(record)
            take_printed()  # not at the end alone, before which this process may be killed

        self.folder.publish()
        answer = attempts.run_workers(
            worker,
            config,
            name=name,
            storage=self.folder.place_of_checkpoints,
            logs=self.folder.logs,
            counts=self.numbers_of_workers(),
            progress=attempts.Progress(show, reached),
            kept=kept,
        )
        self.folder.fetch()
        return answer
