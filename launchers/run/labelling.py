"""Pseudo-labels of a run, on every rank: what the teachers predict on the training images."""

import dataclasses
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from launchers.run.temperatures import fit_temperatures
from launchers.run.worker import Context, ensemble_of, evaluation_loader
from pipelines.agreement import check_workers_agree
from sbf_dist.distill import pseudo_labels
from sbf_dist.distill.teachers import TeacherEnsemble


def write_pseudo_labels(config: dict[str, Any]) -> dict[str, Any]:
    """Write what the teachers predict on every training image; chunks that are there are kept."""
    from launchers.on_ray import ray_train

    here = Context.of(config)
    check_workers_agree(here.index, here.device)  # the first stage with workers, perhaps
    folder = here.folder.pseudo_labels
    ids = np.sort(np.concatenate([here.index.parts[p] for p in ("labelled", "unlabelled")]))
    if here.rank == 0:
        pseudo_labels.begin(folder, pseudo_labels.origin(here.recipe, here.index.digest))
        here.folder.publish(folder.name)
    dist.barrier()
    here.fetch(folder.name)
    fit_temperatures(here, here.networks.teachers)
    ensemble = ensemble_of(here)
    ensemble.measure()
    parts = pseudo_labels.chunks(ids)
    for number in range(here.rank, len(parts), here.world_size):
        if pseudo_labels.chunk_path(folder, number).exists():
            continue
        write_chunk(here, ensemble, number, parts[number])
        here.folder.publish(folder.name)
        ray_train.progress({"title": "pseudo-labels", "step": number + 1, "steps": len(parts)})
    dist.barrier()
    if here.rank == 0:
        here.fetch(folder.name)
        pseudo_labels.finish(folder, ids)
        here.folder.publish(folder.name)
    costs = {name: dataclasses.asdict(cost) for name, cost in ensemble.costs().items()}
    return {"images": len(ids), "teachers": costs}


def write_chunk(here: Context, ensemble: TeacherEnsemble, number: int, ids: np.ndarray) -> None:
    probabilities = ensemble.average(
        [_predictions(here, ensemble, teacher, ids) for teacher in range(len(ensemble.members))]
    )
    ensemble.check()
    pseudo_labels.write_chunk(
        here.folder.pseudo_labels,
        number,
        ids,
        probabilities.numpy(),
        here.recipe.pseudo_labels,
    )


def _predictions(here: Context, ensemble: TeacherEnsemble, teacher: int, ids: np.ndarray) -> Tensor:
    """Return one teacher's probabilities of the images `ids`, in their order, on the CPU."""
    none = ids[:0]
    index = dataclasses.replace(
        here.index, parts={"labelled": none, "unlabelled": ids, "validation": none}
    )
    alone = dataclasses.replace(here, index=index, rank=0, world_size=1)
    batches = evaluation_loader(alone, ensemble.members[teacher].view, "unlabelled")
    answers = [
        (batch["id"].cpu(), ensemble.probabilities(teacher, batch["image"]).cpu())
        for batch in batches
    ]
    order = torch.cat([ids for ids, _ in answers]).argsort()
    return torch.cat([probabilities for _, probabilities in answers])[order]
