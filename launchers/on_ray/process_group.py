"""How Ray Train's workers become one torch process group.

Ray's own TorchConfig would do, but it makes Ray's controller import torch, which costs a start
three seconds and 350 MB, and its rendezvous listens on all addresses of the machine. This module
is imported by the controller: it must not import torch at its top.
"""

import os
import socket
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import ray
from ray.train.backend import Backend, BackendConfig

from launchers.on_ray.local_ray import LOOPBACK

_TIMEOUT = timedelta(minutes=30)


@dataclass
class ProcessGroupConfig(BackendConfig):
    """`backend` is that of torch.distributed: "gloo" or "nccl"."""

    backend: str

    @property
    def backend_cls(self) -> type[Backend]:
        return _ProcessGroup


class _ProcessGroup(Backend):
    share_cuda_visible_devices = True  # as Ray's own: the GPUs of one machine talk to each other

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        address = worker_group.execute_single(0, _rendezvous)
        size = len(worker_group)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank, _join, address, backend_config.backend, rank, size
                )
                for rank in range(size)
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        # Nothing to wait for: the processes end with their training. A broken group would hang.
        return


# On rank 0, from when its address is given to the others until they have joined.
_listening: list[socket.socket] = []


def _rendezvous() -> str:
    """Where the ranks meet, decided on rank 0: a file on one machine, else a port of rank 0's."""
    host = ray.util.get_node_ip_address()
    if host == LOOPBACK:
        return f"file://{Path(tempfile.mkdtemp(prefix='sbf-rendezvous-')) / 'store'}"
    _listening.append(listening_socket(host))
    port = _listening[-1].getsockname()[1]
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def listening_socket(host: str) -> socket.socket:
    """Return a socket that listens at a free port of this address alone.

    A store that opens its own would listen on all addresses of the machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.socket(family)
    opened.bind((host, 0))
    opened.listen(128)
    return opened


def interface_of(address: str) -> str:
    """Return the name of this machine's network interface that has `address`.

    RuntimeError: none has it.
    """
    interfaces = psutil.net_if_addrs()
    for name, entries in interfaces.items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return name
    raise RuntimeError(f"no network interface has the address {address}, but {interfaces}")


def tcp_store(address: str, rank: int, world_size: int, opened: socket.socket | None) -> Any:
    """Return the store at tcp://HOST:PORT; on rank 0 it is served on the socket `opened`."""
    import torch.distributed as dist

    parts = urlsplit(address)
    assert parts.hostname is not None
    assert parts.port is not None
    return dist.TCPStore(
        parts.hostname,
        parts.port,
        world_size,
        is_master=rank == 0,
        timeout=_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=None if opened is None else opened.detach(),
    )


def _join(address: str, backend: str, rank: int, world_size: int) -> None:
    import torch
    import torch.distributed as dist
    from ray import train

    context = train.get_context()
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(context.get_local_rank()),
        LOCAL_WORLD_SIZE=str(context.get_local_world_size()),
    )
    # The workers' own sockets: on the way that Ray's take, the loopback on one machine. Left alone,
    # Gloo takes the address that the machine's name has there, which is often 127.0.1.1.
    interface = interface_of(ray.util.get_node_ip_address())
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    if backend == "nccl":
        from ray.train.torch import get_device

        torch.cuda.set_device(get_device())
    if address.startswith("file:"):
        meeting: dict[str, Any] = {"init_method": address}
    else:
        opened = _listening.pop() if rank == 0 else None
        meeting = {"store": tcp_store(address, rank, world_size, opened)}
    dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=_TIMEOUT, **meeting)
