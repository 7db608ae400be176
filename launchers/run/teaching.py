"""Whether a student's teachers are asked on each crop, or their stored predictions are read.

`distill.targets: auto` is decided once for each training, before its first step. A training that
goes on on another device keeps what was decided.
"""

import logging
from dataclasses import asdict

import torch
import torch.distributed as dist

from launchers.estimate.teachers import Choice, choose
from launchers.run.building import build_network
from launchers.run.network import Network
from launchers.run.worker import Context
from sbf_dist.errors import UserError
from sbf_dist.files import read_json, write_json

_log = logging.getLogger(__name__)


def choice_for(here: Context, network: Network) -> Choice | None:
    """Return what a student is trained towards, on all ranks alike; None: no teacher is asked."""
    job = network.job
    assert job is not None
    distill = job.distill
    if distill is None or not distill.asks_teachers:
        return None
    if distill.targets != "auto":
        return Choice(distill.targets, "set by distill.targets")
    found: list[Choice | None] = [_kept_or_chosen(here, network) if here.rank == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(found, device=here.device)
    return found[0]


def _kept_or_chosen(here: Context, network: Network) -> Choice:
    """Return the choice that is kept beside the training's result, if its networks cost the same.

    Otherwise make it, and keep it.
    """
    from launchers.estimate.trainings import Planned, Traced  # half a second

    assert network.job is not None
    with torch.random.fork_rng(devices=[]):  # weights are drawn, and thrown away
        trained, *teachers = (
            Traced.of(build_network(one, here.num_classes, None), one.input_shape, one.asked.views)
            for one in (network, *here.networks.teachers)
        )
    costs = [one.asked_macs for one in (trained, *teachers)]
    kept = network.targets
    if kept.exists():
        try:
            content = read_json(kept)
        except UserError as error:
            _log.warning("%s; whether teachers are asked live is decided anew", error)
            content = {}
        if content.get("costs") == costs:
            return Choice(content["targets"], content["reason"])
    planned = Planned(
        name=network.name,
        job=network.job,
        trained=trained,
        teachers=tuple(teachers),
        steps=None,
    )
    memory = None
    if here.device.type == "cuda":
        memory = torch.cuda.get_device_properties(here.device).total_memory
    pairs = here.recipe.data.augmentation.mixes
    choice = choose(planned, workers=here.world_size, pairs=pairs, device_bytes=memory)
    write_json(kept, asdict(choice) | {"costs": costs})
    here.folder.publish(kept.parent.name)
    return choice
