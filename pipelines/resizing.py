"""From crops to a normalised batch on the CPU, by PyTorch.

DALI's resize takes 0.75 ms on a core for a crop of a photograph to 224 × 224, twice what decoding
the crop takes; PyTorch's, for bytes in channels_last, 0.09 ms. Both use the same triangular filter.
"""

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pipelines.graphs import Form

_DTYPES = {"float32": torch.float32, "float16": torch.float16}
_LEVELS = 255.0


def resized_batch(crops: Sequence[Tensor], mirror: NDArray[Any], form: Form) -> Tensor:
    """Resize, mirror and normalise uint8 crops (h, w, 3): (b, 3, s, s) in channels_last.

    mirror is (b,): 1 where left and right change places.
    """
    side = form.image_size
    squares = torch.empty(len(crops), side, side, 3, dtype=torch.uint8)
    for square, crop, flip in zip(squares, crops, mirror, strict=True):
        resized = F.interpolate(
            crop.permute(2, 0, 1)[None], size=(side, side), mode="bilinear", antialias=True
        )[0]
        square.copy_((resized.flip(2) if flip else resized).permute(1, 2, 0))
    # By whole rows: a broadcast over three numbers at a time would take three times as long.
    rows = squares.view(len(crops), side, 3 * side).float()
    scale = torch.tensor([1 / (_LEVELS * value) for value in form.std]).repeat(side)
    shift = torch.tensor([-m / s for m, s in zip(form.mean, form.std, strict=True)]).repeat(side)
    rows = rows.mul_(scale).add_(shift).to(_DTYPES[form.dtype])
    return rows.view(len(crops), side, side, 3).permute(0, 3, 1, 2)
