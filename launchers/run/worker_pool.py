"""Ray and the workers of a run, started at the first stage that needs them, or before."""

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

from launchers.interruption import held_back
from launchers.run.first_imports import import_libraries
from launchers.run.folder import RunFolder
from launchers.run.shares import expected_numbers_of_workers
from sbf_dist.recipe import Recipe

if TYPE_CHECKING:  # of Ray, which reads the environment that local_ray sets when it is imported
    from launchers.on_ray.worker_group import KeptWorkers


class WorkerPool:
    """The workers of a run, which stay until the context ends, or until end()."""

    def __init__(self, recipe: Recipe, folder: RunFolder) -> None:
        self._recipe = recipe
        self._folder = folder
        self._resources = ExitStack()
        self._kept: KeptWorkers | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """End the workers and this run's Ray, if they were started."""
        self._kept = None
        self._resources.close()

    @property
    def has_begun(self) -> bool:
        """Whether the workers were started before."""
        return self._kept is not None

    def kept(self) -> "KeptWorkers":
        """Return the workers, with Ray started or joined."""
        if self._kept is None:
            from launchers.on_ray.local_ray import local_ray

            workers = self._recipe.workers
            ray = local_ray(
                workers.least,
                workers.cpus,
                workers.gpus,
                most=workers.most,
                output=self._folder.worker_log,
            )
            self._resources.enter_context(ray)
            with held_back():
                from launchers.on_ray.worker_group import KeptWorkers

            self._kept = self._resources.enter_context(KeptWorkers(workers))
        return self._kept

    def begin(self) -> None:
        """Start Ray and let workers start in the background, where they are this machine's own.

        On a cluster they begin when they are needed: others may have the machines until then.
        """
        if os.environ.get("RAY_ADDRESS"):
            return
        kept = self.kept()
        with held_back():
            from launchers.on_ray import attempts

        attempts.begin_workers(
            import_libraries,
            storage=self._folder.files_of_ray,
            kept=kept,
            counts=expected_numbers_of_workers(self._recipe, self._folder),
        )
