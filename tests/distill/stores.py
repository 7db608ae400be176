"""Stores of pseudo-labels for tests, of random distributions."""

from pathlib import Path

import numpy as np
import torch

from sbf_dist.distill import pseudo_labels as store
from sbf_dist.distill.summaries import Summary

ORIGIN = {
    "teachers": "t" * 64,
    "weights": {"one": "1" * 64, "two": "2" * 64},
    "data": "d" * 64,
    "temperature": 1.5,
    "top_k": 3,
}
TEACHERS = ["one", "two"]


def distributions(images: int, classes: int, seed: int = 0) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(0, 3, (images, classes))
    raw = np.exp(logits)
    return (raw / raw.sum(1, keepdims=True)).astype(np.float32)


def summary(said: np.ndarray, k: int = 3) -> Summary:
    """What one teacher alone says."""
    return Summary.of(torch.tensor(said), [torch.tensor(said)], k)


def write(folder: Path, ids: np.ndarray, said: np.ndarray, k: int = 3, origin=ORIGIN) -> None:
    """Write a whole store; `ids` ascend."""
    store.begin(folder, origin)
    start = 0
    for number, part in enumerate(store.chunks(ids)):
        store.write_chunk(folder, number, part, summary(said[start : start + len(part)], k))
        start += len(part)
    names = [f"class-{number}" for number in range(said.shape[1])]
    store.finish(folder, ids, classes=names, teachers=TEACHERS)
