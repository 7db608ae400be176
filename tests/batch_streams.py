"""Streams of batches that tell what is still alive of them."""

import weakref

import torch


class Stream:
    """Batches that are made when they are asked for; tells how many were alive at once."""

    def __init__(self, sizes, shape=(3, 4, 4)):
        self.sizes, self.shape = sizes, shape
        self.alive, self.most, self.made = 0, 0, 0

    def __iter__(self):
        for index, size in enumerate(self.sizes):
            images = torch.full((size, *self.shape), float(index))
            self.alive += 1
            self.most = max(self.most, self.alive)
            self.made += 1
            weakref.finalize(images.untyped_storage(), self._gone)
            yield images
            del images

    def _gone(self):
        self.alive -= 1
