"""Tensors that are put aside."""

import os
import tempfile
from pathlib import Path

import pytest
import torch

from sbf_dist.compression.fitting.shelf import Shelf
from sbf_dist.errors import UserError


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 4, 5, 6, generator=generator)
    return {
        "plain": x,
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(1, 3),
        "double": x.double(),
        "bfloat16": x.bfloat16(),
        "truth": x > 0,
        "expanded": x[:1].expand(3, 4, 5, 6),
        "part": x[:, 1:3],
        "numbers": torch.arange(7),
        "none": x[:0],
        "one": x[0, 0, 0, 0],
    }


@pytest.mark.parametrize("memory", [0, 4000, 2**20])
def test_what_is_put_aside_comes_back_as_it_was(memory):
    shelf = Shelf(memory)
    kept = [shelf.keep(tensors(seed)) for seed in range(4)]
    for seed, one in enumerate(kept):
        for name, tensor in shelf.get(one).items():
            wanted = tensors(seed)[name]
            assert torch.equal(tensor, wanted) and tensor.dtype == wanted.dtype, name
            if name in ("plain", "channels last", "transposed"):
                assert tensor.stride() == wanted.stride(), name


@pytest.mark.parametrize("memory", [0, 2**20])
def test_what_comes_back_is_a_copy(memory):
    shelf = Shelf(memory)
    kept = shelf.keep(tensors(0))
    shelf.get(kept)["plain"].zero_()
    assert torch.equal(shelf.get(kept)["plain"], tensors(0)["plain"])


def test_memory_that_is_given_back_is_used_again():
    x = torch.ones(1000)
    shelf = Shelf(x.nbytes)
    one = shelf.keep({"x": x})
    assert shelf.keep({"x": x}).layouts  # in the file
    shelf.give_back(one)
    assert not shelf.keep({"x": x}).layouts


def test_room_in_the_file_that_is_given_back_is_used_again():
    shelf = Shelf(0)
    for count in range(50):
        kept = [shelf.keep({"x": torch.full((1000,), float(count))}) for _ in range(3)]
        assert all(float(shelf.get(one)["x"][-1]) == count for one in kept)
        for one in kept:
            shelf.give_back(one)
    assert os.fstat(shelf._file.fileno()).st_size == 3 * 4000


def test_nothing_is_left_in_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    shelf = Shelf(0)
    shelf.keep(tensors(0))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(UserError, match=r"missing: No such file or directory; .*TMPDIR"):
        Shelf(0).keep(tensors(0))


def test_a_full_disk_is_named():
    shelf = Shelf(0)
    with Path("/dev/full").open("wb", buffering=0) as full:
        shelf._file = full
        with pytest.raises(UserError, match=r"cannot keep 38 MiB .*No space left on device"):
            shelf.keep({"x": torch.zeros(10**7)})
