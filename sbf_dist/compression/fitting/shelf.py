"""Tensors that are put aside: in memory up to a number of bytes, in a temporary file beyond it."""

import tempfile
from dataclasses import dataclass
from typing import IO

import torch
from torch import Tensor

from sbf_dist.errors import UserError

State = dict[str, Tensor]


@dataclass
class Kept:
    """What a shelf knows of tensors that it keeps.

    Each tensor is in memory, or `layouts` has its shape, strides, type and device, and the file its
    values, from `place` on; `room` are the bytes that the file has for them.
    """

    tensors: State
    layouts: dict[str, tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]]
    place: int
    room: int


class Shelf:
    """Keeps tensors, `memory` bytes of them in memory, the others in a file.

    The file has no name: it is gone with the shelf, or with the process, however that ends. It lies
    in the folder of temporary files (TMPDIR).
    """

    def __init__(self, memory: int) -> None:
        self._left = memory
        self._file: IO[bytes] | None = None
        self._end = 0
        self._free: list[tuple[int, int]] = []  # room and place of what has been given back

    def keep(self, tensors: State) -> Kept:
        """Keep tensors, which must not be changed afterwards. Raises UserError if that fails."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size <= self._left:
            self._left -= size
            return Kept(tensors, {}, 0, size)
        flat = {name: _flat(tensor) for name, tensor in tensors.items()}
        room, place = min((pair for pair in self._free if pair[0] >= size), default=(size, -1))
        if place >= 0:
            self._free.remove((room, place))
        else:
            place, self._end = self._end, self._end + size
        self._write(place, [part for part, _ in flat.values()], size)
        layouts = {
            name: (tensor.shape, strides, tensor.dtype, tensor.device)
            for (name, tensor), (_, strides) in zip(tensors.items(), flat.values(), strict=True)
        }
        return Kept({}, layouts, place, room)

    def get(self, kept: Kept) -> State:
        """Return copies of what is kept."""
        if not kept.layouts:
            return {name: tensor.clone() for name, tensor in kept.tensors.items()}
        assert self._file is not None
        self._file.seek(kept.place)
        found: State = {}
        for name, (shape, strides, dtype, device) in kept.layouts.items():
            flat = torch.empty(shape.numel(), dtype=dtype)
            buffer = _bytes_of(flat)
            read = self._file.readinto(buffer)  # type: ignore[attr-defined]
            assert read == len(buffer)
            found[name] = flat.as_strided(shape, strides).to(device)
        return found

    def give_back(self, kept: Kept) -> None:
        """Forget what is kept."""
        if kept.layouts:
            self._free.append((kept.room, kept.place))
        else:
            self._left += kept.room
        kept.tensors, kept.layouts = {}, {}

    def _write(self, place: int, parts: list[Tensor], size: int) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  (for passes)
            self._file.seek(place)
            for part in parts:
                left = _bytes_of(part)
                while left:  # Linux writes 2 GiB at a time
                    left = left[self._file.write(left) :]
        except OSError as error:
            raise UserError(
                f"cannot keep {size / 2**20:.0f} MiB of features in {tempfile.gettempdir()}: "
                f"{error.strerror}; name another folder by TMPDIR, or keep more of them in memory "
                "with feature_memory"
            ) from error


def _flat(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return a tensor's values as they lie in memory, on the CPU, and the strides to read them."""
    # Of a tensor without gaps this keeps the strides.
    whole = tensor.detach().clone(memory_format=torch.preserve_format).cpu()
    return whole.as_strided((whole.numel(),), (1,)), whole.stride()


def _bytes_of(flat: Tensor) -> memoryview:
    """Return the memory of a tensor of one axis, on the CPU."""
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
