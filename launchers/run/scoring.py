"""Rows of a run's table, on every rank: accuracy, and agreement with the dense network."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from launchers.run.building import build_network
from launchers.run.networks import Row
from launchers.run.worker import Context, ensemble_of, validation
from sbf_dist.distill.teachers import TeacherEnsemble
from sbf_dist.settings import View
from sbf_dist.train.evaluate import Accuracy, accuracy

SMALLEST = torch.finfo(torch.float32).tiny  # probability whose logarithm is a number


def evaluate_networks(config: dict[str, Any]) -> dict[str, Any]:
    """Measure every row of the table on the validation part, over all ranks.

    Its accuracy, and how far what was made of the compressed teacher still agrees with it.
    """
    from launchers.on_ray import ray_train

    here = Context.of(config)
    rows = here.networks.rows()
    results: dict[str, Any] = {}
    for number, row in enumerate(rows, 1):
        results[row.name] = dataclasses.asdict(score(here, row))
        ray_train.progress({"title": "evaluate", "step": number, "steps": len(rows)})
    return results


def score(here: Context, row: Row) -> Accuracy:
    if len(row.members) > 1 or not row.members[0].asked.is_plain:
        view = here.recipe.data.view if len(row.members) > 1 else row.members[0].view
        ensemble = ensemble_of(here, row.members)
        found = accuracy(_EnsembleAsNetwork(ensemble, view), validation(here, view), here.device)
        ensemble.check()
        return found
    (network,) = row.members
    model = build_network(network, here.num_classes, network.weights).to(here.device)
    reference = None
    dense = here.networks.compressed
    if network.name != dense.name and network.model == dense.model:
        reference = build_network(dense, here.num_classes, dense.weights).to(here.device)
    return accuracy(model, validation(here, network.view), here.device, reference)


class _EnsembleAsNetwork(nn.Module):
    """An ensemble that answers with log-probabilities, as a network does with logits."""

    def __init__(self, ensemble: TeacherEnsemble, view: View) -> None:
        super().__init__()
        self.ensemble = ensemble
        self.view = view

    def forward(self, images: Tensor) -> Tensor:
        return self.ensemble(images, self.view).clamp_min(SMALLEST).log()
