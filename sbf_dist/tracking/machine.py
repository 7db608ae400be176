"""How busy a node is, logged beside a training, under the names of MLflow's own monitor.

That one talks to the store itself and stops where it does not answer, so psutil is read here.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from sbf_dist.tracking.run import Series

SECONDS = 30.0  # between two measurements
_MEGABYTE = 1e6


@contextmanager
def measured_node(journals: Path, node: int) -> Iterator[None]:
    """Log CPU, memory, disk, network and GPUs of this machine while the context lasts.

    The names are system/node-N/…; the steps count measurements, on from those of before.
    """
    ended = threading.Event()
    thread = threading.Thread(
        target=_measure, args=(Series(journals), f"system/node-{node}/", ended), daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _measure(series: Series, prefix: str, ended: threading.Event) -> None:
    network = psutil.net_io_counters()
    psutil.cpu_percent()  # it counts from the call before
    last = series.last_step(f"{prefix}cpu_utilization_percentage")
    step = 0 if last is None else last + 1
    while not ended.wait(SECONDS):
        series.log_metrics(
            {f"{prefix}{name}": value for name, value in _usage(network).items()}, step
        )
        step += 1
    series.flush()


def _usage(network_before: tuple[int, ...] | None) -> dict[str, float]:
    """Percentages and megabytes; those of the network since the start."""
    memory = psutil.virtual_memory()
    disk = psutil.disk_usage("/")
    found = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / _MEGABYTE,
        "system_memory_usage_percentage": memory.percent,
        "disk_usage_percentage": disk.percent,
        "disk_available_megabytes": disk.free / _MEGABYTE,
    }
    network = psutil.net_io_counters()
    if network is not None and network_before is not None:
        sent, received = (network[i] - network_before[i] for i in range(2))
        found |= {
            "network_receive_megabytes": received / _MEGABYTE,
            "network_transmit_megabytes": sent / _MEGABYTE,
        }
    return found | _gpus()


def _gpus() -> dict[str, float]:
    """Memory of the GPUs that this process has, none where it has none."""
    import torch

    if not torch.cuda.is_available():
        return {}
    found: dict[str, float] = {}
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        found[f"gpu_{number}_memory_usage_megabytes"] = (total - free) / _MEGABYTE
        found[f"gpu_{number}_memory_usage_percentage"] = 100 * (total - free) / total
    return found
