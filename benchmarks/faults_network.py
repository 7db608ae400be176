"""A small network that counts its training steps in a file, and takes its time with them.

It is as talkative as libraries are.
"""

import os
import time
from pathlib import Path

from torch import Tensor, nn

TALK = "faults_network: a network is made"


class Counting(nn.Sequential):
    """Convolution, batch norm, linear layer.

    diary  folder in which each process keeps the number of its forward passes in training mode, in
           a file that is named after it; None: they are not counted
    pause  seconds that each of them takes longer
    pace   a file that says, while it is there, "PASSES SECONDS": how many of them a process does as
           above; each that follows takes so many seconds longer
    """

    def __init__(
        self, num_classes: int, diary: str | None, pause: float, pace: str | None = None
    ) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Dropout(0.1),  # draws from the random state that a checkpoint must bring back
            nn.Linear(128, num_classes),
        )
        self._file = None if diary is None else Path(diary) / f"{os.getpid()}"
        self._pause = pause
        self._pace = None if pace is None else Path(pace)
        self._passes = 0

    def forward(self, images: Tensor) -> Tensor:
        if self.training and self._file is not None:
            self._passes += 1
            _overwrite(self._file, f"{self._passes:8d}")
            time.sleep(self._pause)
            self._keep_pace()
        return super().forward(images)

    def _keep_pace(self) -> None:
        """Wait as `pace` says, but no longer than it is there."""
        start = time.monotonic()
        while self._pace is not None:
            try:
                passes, seconds = self._pace.read_text().split() or ("0", "0")
            except FileNotFoundError:
                return
            if self._passes <= int(passes) or time.monotonic() - start >= float(seconds):
                return
            time.sleep(0.01)


def _overwrite(path: Path, text: str) -> None:
    """Put a text in the place of one as long: a reader never finds the file empty."""
    number = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.pwrite(number, text.encode(), 0)
    finally:
        os.close(number)


def make(
    num_classes: int, diary: str | None = None, pause: float = 0.0, pace: str | None = None
) -> nn.Module:
    """Return the network, as recipes name it; prints TALK as Python and as C++ do."""
    print(TALK)
    os.write(2, f"{TALK}\n".encode())
    return Counting(num_classes, diary, pause, pace)
