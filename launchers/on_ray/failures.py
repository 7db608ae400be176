"""What ended an attempt at a training, and how many more attempts it gets.

Ray's controller imports this module with ray_train.py: it must not import torch.
"""

import re
from collections.abc import Callable

from sbf_dist.recipe import Workers

# What the ranks that are left raise when one is gone.
_PEER_IS_GONE = re.compile(
    r"Connection (closed by peer|reset by peer|refused)|Broken pipe|Socket closed|"
    r"Timed out waiting|NCCL error: remote process exited",
    re.IGNORECASE,
)

# Where Ray says that a worker's machine is gone; of its address, Ray Train's words or Ray's.
_MACHINE_IS_GONE = "its node has died"
_ADDRESS = re.compile(r"node_ip='([^']+)'|\bip: (\S+)")


class StoppedError(Exception):
    """A training ended because the driver asked for it; its state is in a checkpoint."""


class AttemptError(Exception):
    """An attempt that ended before its time.

    lost     whether processes or machines died, rather than the program raising an error
    cause    on one line
    details  all that is known: tracebacks
    """

    def __init__(self, *, lost: bool, cause: str, details: str) -> None:
        super().__init__(cause)
        self.lost = lost
        self.cause = cause
        self.details = details


class NoPlaceError(AttemptError):
    """The workers of an attempt have found no place in time."""


def judged_start(error: Exception, details: str) -> AttemptError:
    """Return what kept workers from starting, or from meeting, or Ray Train from going on."""
    cause = getattr(error, "cause", error)  # Ray wraps what a worker has raised
    first = str(cause).strip().splitlines()
    text = f"{type(cause).__name__}: {first[0]}" if first else type(cause).__name__
    lost = _is_of_ray(cause) or bool(_PEER_IS_GONE.search(str(cause)))
    return AttemptError(lost=lost, cause=f"the workers did not start: {text}", details=details)


def judged(worker_failures: dict[int, Exception], details: str) -> AttemptError:
    """Return what the errors of the workers, by rank, come from.

    Where one process is lost, the others raise errors of their own, about its silence.
    """
    dead = {rank: error for rank, error in worker_failures.items() if _is_of_ray(error)}
    if dead:
        ranks = ", ".join(map(str, sorted(dead)))
        hung = any("hanging" in str(error) for error in dead.values())
        machines = sorted(filter(None, map(_lost_machine, dead.values())))
        what = "died or hung" if hung else "died"
        what += f" with machine {', '.join(machines)}" if machines else ""
        return AttemptError(lost=True, cause=f"worker {ranks} {what}", details=details)
    own = [item for item in worker_failures.items() if not _PEER_IS_GONE.search(str(item[1]))]
    if not own:
        return AttemptError(lost=True, cause="a worker died", details=details)
    rank, error = min(own, key=lambda item: item[0])
    first = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {first[0]}" if first else type(error).__name__
    return AttemptError(lost=False, cause=f"worker {rank} raised {text}", details=details)


def _lost_machine(error: Exception) -> str | None:
    """Return the address of the machine that a worker was lost with, where that is the reason."""
    found = _ADDRESS.search(str(error)) if _MACHINE_IS_GONE in str(error) else None
    return (found[1] or found[2]) if found else None


def _is_of_ray(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] == "ray"


class Budget:
    """Counts failures of each kind without a new checkpoint in between.

    progress: what has been reached, anything that compares; a change of it begins the counts anew.
    """

    def __init__(self, workers: Workers, progress: Callable[[], object]) -> None:
        self._most = {True: workers.max_lost, False: workers.max_failures}
        self._keys = {True: "workers.max_lost", False: "workers.max_failures"}
        self._counts = {True: 0, False: 0}
        self._progress = progress
        self._reached = progress()

    def charge(self, failure: AttemptError) -> bool:
        """Count a failure; whether another attempt may be made."""
        reached = self._progress()
        if reached != self._reached:
            self._reached = reached
            self._counts = {True: 0, False: 0}
        self._counts[failure.lost] += 1
        return self._counts[failure.lost] <= self._most[failure.lost]

    def described(self, failure: AttemptError) -> str:
        """Return how far the budget of this kind of failure is used up."""
        count, most = self._counts[failure.lost], self._most[failure.lost]
        times = "once" if count == 1 else f"{count} times"
        return f"{times} without a new checkpoint ({self._keys[failure.lost]} = {most})"
