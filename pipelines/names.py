"""A column of file names: millions of them in little more memory than their letters."""

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

_CHUNK_NAMES = 65_536


class Names(Sequence[str]):
    """An unchangeable sequence of strings, kept as one block of text with offsets (Arrow).

    A list of 1.28 million names of ImageNet takes 150 MB and keeps the garbage collector busy, this
    takes 60 MB.
    """

    def __init__(self, names: "Iterable[str] | pa.Array | pa.ChunkedArray") -> None:
        if isinstance(names, Names):
            column = names.column
        elif isinstance(names, pa.ChunkedArray):
            column = names.cast(pa.large_string()).combine_chunks()
        elif isinstance(names, pa.Array):
            column = names.cast(pa.large_string())
        else:
            column = pa.array(names, pa.large_string())
        self.column: pa.Array = column

    def __len__(self) -> int:
        return len(self.column)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> "Names": ...
    def __getitem__(self, place: int | slice) -> "str | Names":
        if isinstance(place, slice):
            return Names(self.column[place])
        return self.column[int(place)].as_py()

    def __iter__(self) -> Iterator[str]:
        for chunk in self.chunks():
            yield from chunk

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and pc.index(self.column, name).as_py() >= 0

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Names):
            return self.column.equals(other.column)
        return isinstance(other, Sequence) and len(self) == len(other) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Names({len(self)}: {', '.join(self[:3])}, …)"

    def take(self, places: NDArray[np.int64]) -> list[str]:
        """The names at these places, in their order."""
        return self.column.take(pa.array(places)).to_pylist()

    def chunks(self) -> Iterator[list[str]]:
        """All names, some ten thousand at a time."""
        for start in range(0, len(self), _CHUNK_NAMES):
            yield self.column[start : start + _CHUNK_NAMES].to_pylist()
