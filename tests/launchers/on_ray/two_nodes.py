"""A cluster of two nodes on this machine, one of which is drained in the middle of a training.

Prints, as JSON, what the training came to and what was warned of. test_draining.py starts it.
"""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from ray.cluster_utils import Cluster

from launchers.on_ray.attempts import run_workers
from launchers.on_ray.local_ray import local_ray
from launchers.on_ray.worker_group import KeptWorkers
from sbf_dist.recipe import Workers


def drain(node: str, checkpoints: Path, announced: Path) -> None:
    """Once there is a checkpoint, announce that a node will be taken away; then make a file."""
    while not list(checkpoints.glob("*/manifest.json")):
        time.sleep(0.1)
    subprocess.run(
        [
            Path(sys.executable).with_name("ray"),
            "drain-node",
            f"--address={os.environ['RAY_ADDRESS']}",
            f"--node-id={node}",
            "--reason=DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message=spot",
            "--deadline-remaining-seconds=300",
        ],
        check=True,
        capture_output=True,
    )
    announced.touch()


def main(folder: Path) -> None:
    """Train on two nodes, of which one goes."""
    import tiny_worker

    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("launchers").addHandler(handler)
    cluster = Cluster()
    cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
    other = cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
    os.environ["RAY_ADDRESS"] = cluster.address
    storage = folder / "runs"
    with local_ray(workers=1, most=2):
        arguments = (other.node_id, storage / "tiny", folder / "announced")
        threading.Thread(target=drain, args=arguments, daemon=True).start()
        with KeptWorkers(Workers(count=(1, 2), cpus=1)) as kept:
            result = run_workers(
                tiny_worker.train,
                {"diary": str(folder), "announced": str(folder / "announced")},
                name="tiny",
                storage=storage,
                logs=folder / "logs",
                kept=kept,
                counts=[1, 2],
            )
    cluster.shutdown()
    print(json.dumps({"start": result["start"], "warnings": warnings}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
