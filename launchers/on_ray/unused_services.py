"""Leaves out processes of Ray that a run on one machine does not use; lets a wait for it end.

The only place that reaches into Ray's own parts. Ray has no public setting for any of this, so it
is done for the version of Ray that it was written for, and for no other: there Ray starts
everything, and the results are the same.

What it saves, measured with Ray 2.60.0 and one worker on two cores that were busy with other work,
twice each: 7 processes instead of 11, 0.85 GB at the peak instead of 1.37 (shared pages counted
once), Ray is up after 8 to 13 s instead of 14 to 15, and a training that does nothing is over after
50 to 54 s instead of 56 to 74.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

WRITTEN_FOR = "2.60"  # of Ray; its patch releases are taken to be alike
# The autoscaler's monitor, the log monitor and the API server.
SERVICES = ("start_monitor", "start_log_monitor", "start_api_server")
# Prints twenty lines of a raylet's log where it dies. On one machine they are kept in the run's
# folder instead; on a cluster they stay with the machine, which the run names.
MESSAGES = "listen_error_messages"
# A process that imports Ray Data before a training can start.
CALLBACKS = {"DatasetsCallback"}
# On one machine there is nobody to ask for more nodes, and placement groups end with their Ray.
# The cleaner, besides, asks the API server, which is not there: 12 s of waiting at the end.
CALLBACKS_ON_ONE_MACHINE = {"PlacementGroupCleanerCallback"}
REQUESTS_FOR_NODES = (
    "_send_resource_request",
    "_maybe_send_resource_request",
    "_cancel_resource_request",
)
_LOOK_SECONDS = 0.2


class LeftError(Exception):
    """A training was not waited for any longer; its workers may be there still."""


def is_known_version() -> bool:
    """Whether Ray is of the version that this module was written for."""
    import ray

    return ray.__version__.rpartition(".")[0] == WRITTEN_FOR


@contextmanager
def services_left_out() -> Iterator[None]:
    """Keep ray.init, in this context, from starting SERVICES."""
    if not is_known_version():
        yield
        return
    from ray._private.node import Node

    with ExitStack() as stack:
        for method in SERVICES:
            stack.enter_context(mock.patch.object(Node, method, _start_nothing))
        stack.enter_context(messages_left_out())
        yield


@contextmanager
def messages_left_out() -> Iterator[None]:
    """Keep ray.init, in this context, from printing later what Ray's servers say when one dies."""
    if not is_known_version():
        yield
        return
    from ray._private import worker

    with mock.patch.object(worker, MESSAGES, _listen_to_nothing):
        yield


def _listen_to_nothing(*_: Any) -> None:
    """In place of printing what Ray's servers say when one of them, or a worker, has died."""


def _start_nothing(node: Any, **_: Any) -> None:
    node._webui_url = None


def read_environment_again() -> None:
    """Make a Ray that was imported before read its environment variables again.

    A program that starts Ray once does not need this: it imports Ray when they are set.
    """
    if not is_known_version():
        return
    from ray._private import ray_constants
    from ray._raylet import (  # type: ignore[attr-defined]
        AuthenticationTokenLoader,
    )
    from ray._raylet import Config as RayletConfig  # type: ignore[attr-defined]

    AuthenticationTokenLoader.instance().reset_cache()
    RayletConfig.initialize("")
    ray_constants.ENABLE_RAY_CLUSTER = ray_constants.env_bool(
        ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, True
    )


def trainer_class(*, on_one_machine: bool, leave: threading.Event) -> Any:
    """Return Ray Train's TorchTrainer; on the known version, one without unused callbacks.

    There its fit() raises LeftError soon after `leave` is set.
    """
    from ray.train.torch import TorchTrainer

    if not is_known_version():
        return TorchTrainer
    unused = CALLBACKS | (CALLBACKS_ON_ONE_MACHINE if on_one_machine else set())

    class SmallTrainer(TorchTrainer):
        """A TorchTrainer whose controller gets no callback that is unused here."""

        def _initialize_and_run_controller(self, **parts: Any) -> Any:
            parts["callbacks"] = [c for c in parts["callbacks"] if type(c).__name__ not in unused]
            if on_one_machine:
                for method in REQUESTS_FOR_NODES:
                    setattr(parts["scaling_policy"], method, _request_nothing)
            controller = _controller(parts)
            _wait_for(controller.run.remote(), leave)
            return _wait_for(controller.get_result.remote(), leave)

    return SmallTrainer


def _controller(parts: dict[str, Any]) -> Any:
    """Start Ray Train's controller on this node, as its trainer does."""
    import ray
    from ray.train.v2._internal import constants
    from ray.train.v2._internal.execution.controller import TrainController

    here = ray.get_runtime_context().get_node_id()
    environment = {
        constants.RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR: (
            constants.DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE
        ),
        **constants.get_env_vars_to_propagate(),
    }
    actor = ray.remote(
        num_cpus=0,
        label_selector={ray._raylet.RAY_NODE_ID_KEY: here},  # type: ignore[attr-defined]
        runtime_env={"env_vars": environment},
    )(TrainController)
    return actor.remote(**parts)


def _wait_for(answer: Any, leave: threading.Event) -> Any:
    """Return the answer of an actor, or raise LeftError.

    ray.get waits for good where the raylet has died. A thread that still waits there when Ray is
    shut down uses what has been freed: it never returns, or the process dies.
    """
    import ray

    while not ray.wait([answer], timeout=_LOOK_SECONDS)[0]:
        if leave.is_set():
            raise LeftError("nobody waits for the workers any more")
    return ray.get(answer)


def _request_nothing() -> None:
    """In place of asking an autoscaler for nodes."""
