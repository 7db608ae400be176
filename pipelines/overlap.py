"""Images that are in two parts, found by their content."""

from concurrent.futures import ThreadPoolExecutor
from os import sched_getaffinity
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.index import DataIndex
from sbf_dist.files import sha256

Ids = NDArray[np.int64]
Digests = NDArray[np.uint8]


def in_validation(index: DataIndex, ids: Ids, digests: Digests | None) -> list[tuple[int, int]]:
    """Return those of the images `ids` that the validation part has, too: pairs of both ids.

    They have the same bytes, by SHA-256. Only images of the same size, in bytes and pixels, are
    compared: of photographs, whose files have all sizes, those are few.

    digests  uint8 (n, 32): the SHA-256 of each image of the index, zeros where it is not known yet;
             None: of none. Files are read for those that are not known.
    """
    if not len(ids) or not len(index.parts["validation"]):
        return []
    sizes = np.stack([index.file_bytes, *index.sizes.T])
    keys = np.array([1_000_003, 8191, 1]) @ sizes  # of other sizes may be the same: no harm is done
    held_out = index.parts["validation"]
    ids, held_out = (
        ids[np.isin(keys[ids], keys[held_out])],
        held_out[np.isin(keys[held_out], keys[ids])],
    )
    contents = _contents(index, np.concatenate([ids, held_out]), digests)
    known = {contents[one]: one for one in reversed(held_out.tolist())}
    return [(one, known[contents[one]]) for one in ids.tolist() if contents[one] in known]


def _contents(index: DataIndex, ids: Ids, digests: Digests | None) -> dict[int, bytes]:
    """Return the digests of some images, read where they are not known."""
    unknown = ids if digests is None else ids[~digests[ids].any(axis=1)]
    files = index.take_files(unknown)
    root = index.root
    assert isinstance(root, Path) or not files, "an object store has digests of all its images"
    with ThreadPoolExecutor(2 * len(sched_getaffinity(0))) as pool:
        read = pool.map(lambda name: bytes.fromhex(sha256(Path(str(root), name))), files)
        found = dict(zip(unknown.tolist(), read, strict=True))
    for one in ids.tolist():
        if one not in found:
            assert digests is not None
            found[one] = digests[one].tobytes()
    return found
