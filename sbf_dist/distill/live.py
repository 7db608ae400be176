"""Targets of teachers that see the very images that the student sees, mixed or not."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sbf_dist.distill.features import KEY, Watched
from sbf_dist.distill.teachers import TeacherEnsemble, translate
from sbf_dist.settings import View

Batch = dict[str, Tensor]


def live_targets(ensemble: TeacherEnsemble, view: View) -> Callable[[Batch], Batch]:
    """Return what adds "teacher" (N, classes), the ensemble's probabilities, to a batch.

    `view` is the student's, of which the batch's images are. Patient and consistent teachers
    (Beyer et al., arXiv 2106.05237).
    """
    return lambda batch: batch | {"teacher": ensemble(batch["image"], view)}


def feature_targets(
    ensemble: TeacherEnsemble,
    member: int,
    view: View,
    layers: Sequence[str],
    live: Callable[[Batch], Batch] | None,
) -> Callable[[Batch], Batch]:
    """Return what adds "features:LAYER" (N, C, h, w) of a member of the ensemble to a batch.

    `live` asks the whole ensemble: the features are those of the same forward pass, and its targets
    are added as well. Without it the member is run alone.
    """
    network = ensemble.members[member].network
    watched = Watched(network, layers)

    def annotate(batch: Batch) -> Batch:
        with watched as found:
            if live is not None:
                batch = live(batch)
            else:
                own = translate(batch["image"], view, ensemble.members[member].view)
                _run(network, own, ensemble.dtype)
        return batch | {KEY + name: values for name, values in found.items()}

    return annotate


@torch.no_grad()
def _run(network: nn.Module, images: Tensor, dtype: torch.dtype | None) -> None:
    with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
        network(images)
