"""Mixup and cutmix on the device: images, labels and the teachers' probabilities alike."""

import torch
from torch import Tensor

Batch = dict[str, Tensor]


def mixup(batch: Batch) -> Batch:
    """Combine each image with its partner, as the batch says; pass on a batch that does not say.

    Taken from the batch: "mixup_partner" int64 (N,), the partner's place; "mixup_share" (N,), the
    share λ of the image itself; "mixup_box" int64 (N, 4), if there: top, left, bottom, right of the
    box that shows the partner, empty where the two are blended.
        mixup (Zhang et al. 2018)   x = λ x + (1 − λ) x_partner
        cutmix (Yun et al. 2019)    x_partner inside the box, x outside
    Strong views, "strong", if there, are combined as the images are.
    Added: "partner_label" (N,) and "share" (N,), for the cross-entropy (see DistillationTask).
    "teacher", if there, becomes λ t + (1 − λ) t_partner: stored probabilities are added before,
    those of teachers that see the combined image itself after.
    """
    if "mixup_partner" not in batch:
        return batch
    rest = {key: value for key, value in batch.items() if not key.startswith("mixup_")}
    partner, share = batch["mixup_partner"], batch["mixup_share"]
    combined = {"partner_label": batch["label"][partner], "share": share}
    for view in ("image", "strong"):
        if view in batch:
            combined[view] = _combined_images(batch[view], partner, share, batch.get("mixup_box"))
    if "teacher" in batch:
        combined["teacher"] = _blend(batch["teacher"], partner, share)
    return rest | combined


def _combined_images(images: Tensor, partner: Tensor, share: Tensor, box: Tensor | None) -> Tensor:
    blended = _blend(images, partner, share)
    if box is None:
        return blended
    height, width = images.shape[2:]
    inside_rows = _between(height, box[:, 0], box[:, 2])
    inside_columns = _between(width, box[:, 1], box[:, 3])
    inside = (inside_rows[:, :, None] & inside_columns[:, None, :])[:, None]
    cut = torch.where(inside, images[partner], images)
    is_cut = (box[:, 2] > box[:, 0]) & (box[:, 3] > box[:, 1])
    return torch.where(is_cut[:, None, None, None], cut, blended)


def _between(length: int, low: Tensor, high: Tensor) -> Tensor:
    """Whether each place 0 … length − 1 is in [low, high), (N, length)."""
    place = torch.arange(length, device=low.device)
    return (place >= low[:, None]) & (place < high[:, None])


def _blend(values: Tensor, partner: Tensor, share: Tensor) -> Tensor:
    weight = share.to(values.dtype).reshape(-1, *[1] * (values.dim() - 1))
    return torch.lerp(values[partner], values, weight)
