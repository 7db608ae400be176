"""What an archive holds, set by set: names, classes, and how to read each image."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

PARTS = ("train", "val")


@dataclass(frozen=True, eq=False)
class Catalogue:
    """The images of a set, in the order in which they are read fastest.

    classes   folder name → the name that people use, sorted by folder name; a label is a position
    files     "train/CLASS/NAME" or "val/CLASS/NAME", as they will lie on the disk
    labels    int64 (n,)
    sizes     int64 (n,): bytes of each image, or as many as it may take at most
    read      the bytes of image i, as a file would hold them; called from several threads
    """

    classes: dict[str, str]
    files: list[str]
    labels: NDArray[np.int64]
    sizes: NDArray[np.int64]
    read: Callable[[int], bytes]

    def __len__(self) -> int:
        return len(self.files)


@dataclass
class Entries:
    """Files of a catalogue that is being collected."""

    files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def add(self, part: str, folder: str, name: str, size: int) -> None:
        self.files.append(f"{part}/{folder}/{name}")
        self.folders.append(folder)
        self.sizes.append(size)

    def catalogue(self, classes: dict[str, str], read: Callable[[int], bytes]) -> Catalogue:
        label_of = {folder: label for label, folder in enumerate(sorted(classes))}
        return Catalogue(
            classes={folder: classes[folder] for folder in sorted(classes)},
            files=self.files,
            labels=np.array([label_of[folder] for folder in self.folders], dtype=np.int64),
            sizes=np.array(self.sizes, dtype=np.int64),
            read=read,
        )
