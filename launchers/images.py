"""Images in this process, without workers: to calibrate on, and to compare exports on."""

import dataclasses

import numpy as np
import torch

from launchers import networks
from pipelines.index import DataIndex
from pipelines.loader import EvalLoader
from sbf_dist.recipe import Recipe


def calibration_images(recipe: Recipe, index: DataIndex) -> torch.Tensor:
    """Return random training images as the student sees them in evaluation."""
    ids = np.sort(np.concatenate([index.parts[part] for part in ("labelled", "unlabelled")]))
    generator = np.random.default_rng(recipe.seed)
    wanted = min(recipe.compress.images, len(ids))
    return evaluation_images(recipe, index, np.sort(generator.choice(ids, wanted, replace=False)))


def evaluation_images(recipe: Recipe, index: DataIndex, ids: np.ndarray) -> torch.Tensor:
    """Return the evaluation views of `ids`, (N, 3, H, W), in channels_last."""
    # DALI takes its buffers back when a batch dies.
    return torch.cat([batch["image"].clone() for batch in evaluation_loader(recipe, index, ids)])


def evaluation_loader(recipe: Recipe, index: DataIndex, ids: np.ndarray) -> EvalLoader:
    """Return the batches of `ids` as the student sees them in evaluation."""
    none = ids[:0]
    view = networks.student_view(recipe)
    return EvalLoader(
        dataclasses.replace(index, parts={"labelled": none, "unlabelled": none, "validation": ids}),
        "validation",
        batch_size=64,
        image_size=view.size,
        crop=recipe.data.crop,
        mean=view.mean,
        std=view.std,
        rank=0,
        world_size=1,
        threads=recipe.data.threads,
    )
