"""Batches of a set in a store, and of the same in a folder."""

import torch

from pipelines.loader import EvalLoader, TrainLoader
from pipelines.reader import Reader
from sbf_dist.object_storage import ObjectFolder
from sbf_dist.settings import Augmentation, View

VIEW = View(image_size=16, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


NUM_SHARDS = 6


SELECTION = {"labelled_per_class": 2, "validation": None, "seed": 1}


def training(index, cache, *, parts=("labelled", "unlabelled"), pixels="none"):
    reader = Reader(shard_cache=cache, cache=pixels)
    return TrainLoader(
        index,
        parts,
        reader,
        batch_size=7,
        view=VIEW,
        augmentation=Augmentation(),
        seed=3,
    )


def taken(loader, count):
    return [{key: value.clone() for key, value in next(loader).items()} for _ in range(count)]


def same(one, other):
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(one, other, strict=True)
    )


def evaluated(index, cache):
    loader = EvalLoader(index, "validation", Reader(shard_cache=cache), batch_size=4, view=VIEW)
    return [{key: value.clone() for key, value in batch.items()} for batch in loader]


def change(address, name, at=None):
    """Give a shard in the store another content of the same size; all of it, or one byte."""
    folder = ObjectFolder.at(address)
    data = bytearray(folder.read(name))
    for place in range(len(data)) if at is None else (at,):
        data[place] ^= 255
    folder.write(name, bytes(data))
