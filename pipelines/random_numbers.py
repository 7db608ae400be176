"""The random numbers of each sample: functions of the seed and the place in the stream alone."""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

# The first half of Philox' keys with such a second half is ours; epochs use small numbers.
_KEY = 2**63
_BLOCK = 4  # numbers that one count of Philox gives


class Purpose(IntEnum):
    """What numbers are for: each purpose has a stream of its own."""

    VIEW = 0
    OPERATIONS = 1
    STRONG_VIEW = 2
    STRONG_OPERATIONS = 3
    MIXUP = 4


def uniform_numbers(
    purpose: Purpose, seed: int, position: int, samples: int, numbers: int
) -> NDArray[np.float64]:
    """Numbers in [0, 1), (samples, numbers), of the samples at position, position + 1, …

    A sample's numbers are the same in whatever batch it is asked for. How many numbers a sample has
    must stay the same for a purpose, or they all change.
    """
    blocks = -(-numbers // _BLOCK)
    generator = np.random.Generator(
        np.random.Philox(
            key=np.array([seed, _KEY + purpose], dtype=np.uint64),
            # A Python int: numpy takes it as the 256-bit counter that it is.
            counter=blocks * position,
        )
    )
    return generator.random((samples, _BLOCK * blocks))[:, :numbers]
