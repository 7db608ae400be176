"""Accuracy and predictions over all ranks, and batch norm statistics that all ranks share."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sbf_dist.layout import contiguous, needs_contiguous


@dataclass(frozen=True)
class Accuracy:
    """Shares of `count` images in [0, 1], and the mean cross-entropy in nats.

    agreement, kl: share of all images, labelled or not, of which a reference gives the same class,
    and the mean divergence from its predictions; None without one.
    """

    top1: float
    top5: float | None  # None for at most five classes
    loss: float
    count: int
    agreement: float | None = None
    kl: float | None = None


class Predictions(NamedTuple):
    """On the CPU: ids int64 (n,), probabilities float32 (n, classes)."""

    ids: Tensor
    probabilities: Tensor


def accuracy(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    device: torch.device | str,
    reference: nn.Module | None = None,
) -> Accuracy:
    """How well `model` classifies the images of all ranks' `batches` ("image", "label").

    Sums and counts are added over the ranks, so images that are shared out unevenly count alike;
    a rank may have none. Every rank gets the same result. Labels below 0 (unknown) are left out.
    With a `reference`, which sees the same images, predictions are compared with its own, too.
    """
    totals = torch.zeros(4, dtype=torch.float64, device=device)  # top-1, top-5, loss, count
    compared = _Compared(reference, device)
    classes = torch.zeros((), dtype=torch.int64, device=device)
    for batch, outputs in outputs_of(model, batches, device):
        every = outputs.float()
        known = batch["label"].to(device) >= 0
        logits, label = every[known], batch["label"].to(device)[known]
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == label[:, None]
        totals[0] += ranked[:, 0].sum()
        totals[1] += ranked.sum()
        totals[2] += F.cross_entropy(logits, label, reduction="sum")
        totals[3] += len(label)
        compared.add(batch, every)
        classes.fill_(logits.shape[1])
    if dist.is_initialized():
        dist.all_reduce(totals)
        dist.all_reduce(classes, op=dist.ReduceOp.MAX)
    top1, top5, loss, count = totals.tolist()
    assert count > 0, "no rank has a labelled image to evaluate on"
    agreement, kl = compared.result()
    return Accuracy(
        top1=top1 / count,
        top5=top5 / count if classes > 5 else None,
        loss=loss / count,
        count=round(count),
        agreement=agreement,
        kl=kl,
    )


class _Compared:
    """Compares predictions with those of a reference, if there is one, batch by batch."""

    def __init__(self, reference: nn.Module | None, device: torch.device | str) -> None:
        self._reference = reference
        self._device = device
        # images of the same class, divergence, count
        self._totals = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, batch: dict[str, Tensor], logits: Tensor) -> None:
        if self._reference is None:
            return
        ((_, outputs),) = outputs_of(self._reference, [batch], self._device)
        wanted = outputs.float()
        logs, known = logits.log_softmax(1), wanted.log_softmax(1)
        self._totals[0] += (logits.argmax(1) == wanted.argmax(1)).sum()
        self._totals[1] += (known.exp() * (known - logs)).sum()
        self._totals[2] += len(logits)

    def result(self) -> tuple[float, float] | tuple[None, None]:
        """Return agreement and divergence over all ranks; None without a reference."""
        if self._reference is None:
            return None, None
        if dist.is_initialized():
            dist.all_reduce(self._totals)
        same, divergence, count = self._totals.tolist()
        assert count > 0, "no rank has an image to compare on"
        return same / count, max(0.0, divergence / count)


def predict(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], device: torch.device | str
) -> Predictions:
    """This rank's `batches` ("id", "image") through softmax, in their order; no rank is asked."""
    ids, probabilities = [torch.empty(0, dtype=torch.int64)], []
    for batch, logits in outputs_of(model, batches, device):
        ids.append(batch["id"].cpu())
        probabilities.append(logits.float().softmax(dim=1).cpu())
    return Predictions(
        torch.cat(ids), torch.cat(probabilities) if probabilities else torch.empty(0, 0)
    )


def outputs_of(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], device: torch.device | str
) -> Iterator[tuple[dict[str, Tensor], Any]]:
    """Give each batch ("image", …) with what `model` returns for it in eval mode.

    The model is put back into the mode that it was in.
    """
    training = model.training
    model.eval()
    needed: bool | None = None
    try:
        for batch in batches:
            images = batch["image"].to(device, non_blocking=True)
            if needed is None:
                needed = needs_contiguous(model, images[:1])
            with torch.no_grad():
                outputs = model(contiguous(images) if needed else images)
            yield batch, outputs
    finally:
        model.train(training)


def synchronise_batchnorm(model: nn.Module, statistics: Mapping[str, Tensor] | None = None) -> None:
    """Give every rank the batch norm statistics of all ranks' images together, in place.

    `statistics`: the tensors by the names of the model's buffers; None: the buffers themselves.
    With mean μ_r and variance v_r on rank r of R, the mean is E[μ] and the variance is
    E[v] + E[μ²] − E[μ]² (the law of total variance; every rank has seen equally many images).
    SyncBatchNorm and layers without statistics are left alone. Without a process group nothing
    has to be done.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    if statistics is None:
        statistics = dict(model.named_buffers())
    layers = _layers_with_statistics(model)
    if not layers:
        return
    own_means = [statistics[_member(name, "running_mean")] for name in layers]
    own_variances = [statistics[_member(name, "running_var")] for name in layers]
    # One message for all layers, in fp64: E[μ²] − E[μ]² cancels.
    means = torch.cat(own_means).double()
    moments = torch.stack([means, torch.cat(own_variances).double() + means.square()])
    dist.all_reduce(moments)
    moments /= dist.get_world_size()
    mean, second = moments
    sizes = [len(one) for one in own_means]
    variance = (second - mean.square()).clamp_min(0)
    for own, m in zip(own_means, mean.split(sizes), strict=True):
        own.copy_(m)
    for own, v in zip(own_variances, variance.split(sizes), strict=True):
        own.copy_(v)


def batchnorm_statistics(model: nn.Module) -> list[str]:
    """Names of the buffers that synchronise_batchnorm makes the same on all ranks."""
    return [
        _member(layer, name)
        for layer in _layers_with_statistics(model)
        for name in ("running_mean", "running_var")
    ]


def _layers_with_statistics(model: nn.Module) -> list[str]:
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm)
        and not isinstance(layer, nn.SyncBatchNorm)
        and layer.running_mean is not None
    ]


def _member(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name
