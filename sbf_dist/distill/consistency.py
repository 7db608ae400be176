"""Weak → strong consistency: what is predicted on a weak view is the target on a strong one."""

import torch
from torch import Tensor
from torch.nn import functional as F


def consistency(
    strong_scores: Tensor, weak_probabilities: Tensor, threshold: float
) -> tuple[Tensor, Tensor]:
    """Return the loss, and the share of the images that have a target, both scalars.

    strong_scores: (N, classes), logarithms of the student's probabilities on strong views;
    weak_probabilities: (N, classes), of the same images' weak views, without gradient. The target
    is the most probable class there, where its probability is `threshold` at least. The loss is
    the cross-entropy, summed over these images and divided by N: few confident ones count little
    (FixMatch, Sohn et al., arXiv 2001.07685, equation 4).
    """
    confidence, target = weak_probabilities.detach().max(1)
    confident = (confidence >= threshold).to(strong_scores.dtype)
    losses = F.nll_loss(strong_scores, target, reduction="none")
    return torch.mean(confident * losses), confident.mean()
