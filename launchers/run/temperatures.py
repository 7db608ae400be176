"""Temperatures of the teachers that are fitted on the validation part, on every rank."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from launchers.run.network import Network
from launchers.run.worker import Context, ensemble_of, validation
from sbf_dist.distill.teachers import TeacherEnsemble
from sbf_dist.distill.temperature import (
    FittedTemperature,
    fit_temperature,
    read_temperatures,
    write_temperatures,
)
from sbf_dist.errors import UserError

_log = logging.getLogger(__name__)


def fit_temperatures(here: Context, teachers: Sequence[Network]) -> None:
    """Fit those of the teachers that have none yet, where the recipe says so, and keep them."""
    if here.recipe.pseudo_labels.temperature != "fit":
        return
    file = here.folder.temperatures
    try:
        known = read_temperatures(file)
    except UserError as error:  # on all ranks alike
        if here.rank == 0:
            _log.warning("%s: they are fitted anew", str(error).partition(";")[0])
        known = {}
    missing = [teacher for teacher in teachers if teacher.name not in known]
    for teacher in missing:
        fitted = _fit(here, teacher)
        if here.rank == 0:
            assert fitted is not None
            known[teacher.name] = fitted
            write_temperatures(file, known)
    if missing:
        if here.rank == 0:
            here.folder.publish(file.parent.name)
        if here.world_size > 1:
            dist.barrier()
        here.fetch(file.parent.name)


def _fit(here: Context, teacher: Network) -> FittedTemperature | None:
    """Let every rank ask the teacher about its share of the images; rank 0 fits."""
    if not len(here.index.parts["validation"]):
        raise UserError("pseudo_labels.temperature = 'fit' needs validation images with labels")
    ensemble = ensemble_of(here, [teacher], fitted=False)
    (member,) = ensemble.members
    answers = _answers(here, ensemble)
    ensemble.check()
    shares: list[Any] = [answers]
    if here.world_size > 1:
        shares = [None] * here.world_size
        dist.all_gather_object(shares, answers)
    if here.rank != 0:
        return None
    logits = torch.cat([logits for logits, _ in shares if logits is not None], 1)
    labels = torch.cat([labels for _, labels in shares])
    if member.mapping is not None:
        member.mapping = member.mapping.to(torch.device("cpu"))
    return fit_temperature(member, logits, labels)


def _answers(here: Context, ensemble: TeacherEnsemble) -> tuple[torch.Tensor | None, torch.Tensor]:
    logits, labels = [], [torch.empty(0, dtype=torch.int64)]
    for batch in validation(here, ensemble.members[0].view):
        known = batch["label"] >= 0
        logits.append(ensemble.logits(0, batch["image"])[:, known.to(here.device)].cpu())
        labels.append(batch["label"][known].cpu())
    return (torch.cat(logits, 1) if logits else None), torch.cat(labels)
