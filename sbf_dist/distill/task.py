"""What a student is trained on: labels, and the teachers' probabilities."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = dict[str, Tensor]
UNLABELLED = -1


class DistillationTask(nn.Module):
    """The student with its loss.

    forward takes a batch with "image" (N, 3, H, W), "label" (N,), -1 where unknown, and, where
    there are teachers, "teacher" (N, classes), their probabilities. It returns "loss" and its
    parts: "cross_entropy" on the labelled images and "divergence", KL(teacher || student), on all
    images. Both are means over the images that they are about. Of a batch after mixup, the
    cross-entropy is that with the label, times "share", plus that with the partner's, times the
    rest. `label_smoothing`: share of each label that is given to all classes alike.
    """

    def __init__(
        self, student: nn.Module, *, label_weight: float = 1.0, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        self.student = student
        self.label_weight = label_weight
        self.label_smoothing = label_smoothing

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss and its parts, all scalars."""
        scores = self.student(batch["image"]).float().log_softmax(1)
        cross_entropy = _cross_entropy(scores, batch, self.label_smoothing)
        if "teacher" not in batch:
            return {"loss": cross_entropy}
        divergence = F.kl_div(scores, batch["teacher"], reduction="batchmean")
        return {
            "loss": self.label_weight * cross_entropy + divergence,
            "cross_entropy": cross_entropy,
            "divergence": divergence,
        }


def _cross_entropy(scores: Tensor, batch: Batch, smoothing: float) -> Tensor:
    """The mean over labelled images; 0 where there are none."""
    label = batch["label"]
    weights = [(label, torch.ones_like(scores[:, 0]))]
    if "partner_label" in batch:
        share = batch["share"].to(scores.dtype)
        weights = [(label, share), (batch["partner_label"], 1 - share)]
    # Sums over masks instead of indexing: no wait for the device, and no NaN where no image is
    # labelled.
    total = torch.zeros((), device=scores.device)
    mass = torch.zeros((), device=scores.device)
    for wanted, weight in weights:
        losses = F.nll_loss(scores, wanted, ignore_index=UNLABELLED, reduction="none")
        if smoothing:
            everywhere = -scores.mean(1) * (wanted != UNLABELLED)
            losses = (1 - smoothing) * losses + smoothing * everywhere
        total = total + (weight * losses).sum()
        mass = mass + (weight * (wanted != UNLABELLED)).sum()
    return total / torch.where(mass > 0, mass, 1)


def stored_targets(
    ids: Tensor, classes: Tensor, probabilities: Tensor, *, num_classes: int
) -> Callable[[Batch], Batch]:
    """Return a function that adds "teacher" (N, num_classes) to a batch by sample id.

    ids: (n,) ascending; classes, probabilities: (n, k), as stored_labels.StoredLabels has them. A
    batch with a sample that has no pseudo-label is our own bug.
    """

    def annotate(batch: Batch) -> Batch:
        place = torch.searchsorted(ids, batch["id"]).clamp(max=len(ids) - 1)
        assert bool((ids[place] == batch["id"]).all()), "an image has no pseudo-label"
        # Batch by batch: the full distributions of all of ImageNet would take 5 GB.
        full = full_distributions(classes[place].long(), probabilities[place].float(), num_classes)
        return batch | {"teacher": full}

    return annotate


def full_distributions(classes: Tensor, probabilities: Tensor, num_classes: int) -> Tensor:
    """Return distributions over all classes, (N, num_classes), of the k most probable, (N, k) each.

    What is not stored is shared out evenly; where the stored ones, rounded, are more than 1
    together, all are scaled.
    """
    images, stored = probabilities.shape
    total = probabilities.sum(1, keepdim=True)
    rest = (1 - total).clamp(min=0) / max(1, num_classes - stored)
    full = rest.expand(images, num_classes).scatter(1, classes, probabilities)
    return full / total.clamp(min=1)


def sharpened(probabilities: Tensor, temperature: float) -> Tensor:
    """Return distributions (N, classes) to the power of 1 / temperature, scaled to sums of 1.

    Source: Berthelot et al., MixMatch, arXiv 1905.02249, equation 7.
    """
    if temperature == 1:
        return probabilities
    powers = probabilities ** (1 / temperature)
    return powers / powers.sum(1, keepdim=True)
