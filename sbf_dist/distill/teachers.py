"""The teacher ensemble: the mean of the probabilities of several frozen networks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbf_dist.settings import View


class TeacherEnsemble:
    """Frozen teachers with their weights and views.

    It is not an nn.Module: an engine that wraps a task must never find it, and its networks never
    leave evaluation mode.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        views: Sequence[View],
        weights: Sequence[float],
        *,
        temperature: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`dtype` is that of autocast in the teachers' forward passes; None: full precision."""
        assert len(networks) == len(views) == len(weights) > 0
        self.networks = [network.eval().requires_grad_(False) for network in networks]
        self.views = list(views)
        self.weights = [weight / sum(weights) for weight in weights]
        self.temperature = temperature
        self.dtype = dtype

    @torch.no_grad()
    def __call__(self, images: Tensor, view: View) -> Tensor:
        """Return the ensemble's probabilities (N, classes) on images of the view `view`.

        Each teacher gets the images resized and normalised to its own view.
        """
        return self.average(
            [
                self.probabilities(index, translate(images, view, own))
                for index, own in enumerate(self.views)
            ]
        )

    @torch.no_grad()
    def probabilities(self, index: int, images: Tensor) -> Tensor:
        """Return one teacher's softened probabilities on images of its own view."""
        with torch.autocast(images.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            logits = self.networks[index](images)
        return (logits.float() / self.temperature).softmax(1)

    def average(self, probabilities: Sequence[Tensor]) -> Tensor:
        """Return the weighted mean of the teachers' probabilities, each (N, classes)."""
        terms = zip(self.weights, probabilities, strict=True)
        return torch.stack([weight * term for weight, term in terms]).sum(0)


def translate(images: Tensor, view: View, to: View) -> Tensor:
    """Turn normalised images (N, 3, H, W) of one view into those of another."""
    if to.image_size != view.image_size:
        size = (to.image_size, to.image_size)
        images = F.interpolate(
            images, size=size, mode="bilinear", antialias=True, align_corners=False
        )
    if (to.mean, to.std) != (view.mean, view.std):
        old_mean, old_std, new_mean, new_std = (
            images.new_tensor(values)[:, None, None]
            for values in (view.mean, view.std, to.mean, to.std)
        )
        images = (images * old_std + old_mean - new_mean) / new_std
    return images
