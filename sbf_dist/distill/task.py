"""What a student is trained on: labels, and the teachers' probabilities."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbf_dist.distill.consistency import consistency
from sbf_dist.distill.features import KEY, FeatureLoss, Watched
from sbf_dist.distill_recipe import Consistency, Weight

Batch = dict[str, Tensor]
UNLABELLED = -1


class DistillationTask(nn.Module):
    """The student with its loss.

    forward takes a batch with "image" (N, 3, H, W), "label" (N,), -1 where unknown, and what the
    parts of the loss need. It returns "loss" and the parts that the batch has targets for:
        cross_entropy  on the labelled images. Of a batch after mixup, that with the label, times
                       "share", plus that with the partner's, times the rest. `label_smoothing`:
                       share of each label that is given to all classes alike
        divergence     KL(teacher || student) on all images, with "teacher" (N, classes), the
                       teachers' probabilities
        consistency    on all images, with "strong" (N, 3, H, W), see consistency.py. "confident" is
                       the share of images with a target; it is not part of the loss
        features       with "features:LAYER" (N, C, h, w) for each layer of `features`, see
                       features.py
    Each is a mean over the images that it is about. The loss is the sum of weight times part, or
    the cross-entropy alone where there is nothing else. Weights [start, end] follow "progress", the
    share of the training that is over, a scalar in the batch.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        label_weight: Weight = 1.0,
        label_smoothing: float = 0.0,
        teacher_weight: Weight = 1.0,
        consistency: Consistency | None = None,
        features: FeatureLoss | None = None,
        feature_weight: Weight = 1.0,
    ) -> None:
        super().__init__()
        self.student = student
        self.label_smoothing = label_smoothing
        self.consistency = consistency
        self.features = features
        self._weights: dict[str, Weight] = {
            "cross_entropy": label_weight,
            "divergence": teacher_weight,
            "consistency": consistency.weight if consistency is not None else 0.0,
            "features": feature_weight,
        }
        self._watched = Watched(student, [] if features is None else features.layers)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss and its parts, all scalars."""
        images = batch["image"]
        is_consistent = self.consistency is not None and "strong" in batch
        seen = torch.cat([images, batch["strong"]]) if is_consistent else images
        # One pass for both views: batch norm sees all of them.
        with self._watched as found:
            logits = self.student(seen)
        scores, *strong = logits.float().log_softmax(1).split(len(images))
        parts = {"cross_entropy": _cross_entropy(scores, batch, self.label_smoothing)}
        if "teacher" in batch:
            parts["divergence"] = F.kl_div(scores, batch["teacher"], reduction="batchmean")
        if is_consistent:
            assert self.consistency is not None
            by_ensemble = self.consistency.target == "ensemble"
            known = batch["teacher"] if by_ensemble else scores.detach().exp()
            loss, confident = consistency(strong[0], known, self.consistency.threshold)
            parts |= {"consistency": loss, "confident": confident}
        if self.features is not None:
            parts |= _feature_part(self.features, batch, found)
        if len(parts) == 1:
            return {"loss": parts["cross_entropy"]}
        progress = batch.get("progress")
        weighted = [
            weight_at(weight, progress) * parts[name]
            for name, weight in self._weights.items()
            if name in parts
        ]
        return {"loss": torch.stack(weighted).sum(), **parts}


def _feature_part(
    features: FeatureLoss, batch: Batch, found: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The part "features"; empty where the batch has no features of the teacher."""
    wanted = {name: batch[KEY + name] for name in features.layers if KEY + name in batch}
    if not wanted:
        return {}
    weak = {name: values[: len(batch["image"])] for name, values in found.items()}
    return {"features": features(weak, wanted)}


def weight_at(weight: Weight, progress: Tensor | None) -> float | Tensor:
    """Return a weight after a share of the training, `progress`, a scalar tensor."""
    if not isinstance(weight, tuple):
        return weight
    assert progress is not None, "a weight that changes needs to know how far the training is"
    start, end = weight
    return start + (end - start) * progress


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
