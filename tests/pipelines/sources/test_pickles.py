import io
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from archive_makers import python2_pickle

from pipelines.sources import pickles
from sbf_dist.errors import UserError

BATCH = {
    b"batch_label": b"training batch 1 of 5",
    b"labels": [6, 9, 0, 255, 70000],
    b"data": np.arange(60, dtype=np.uint8).reshape(5, 12),
    b"filenames": [b"leptodactylus_pentadactylus_s_000004.png", b"x" * 300],
}


def same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, np.ndarray):
            assert value.dtype == other[key].dtype
            assert np.array_equal(value, other[key])
        else:
            assert value == other[key]


def test_a_pickle_of_python_2_is_read_as_the_unpickler_would():
    data = python2_pickle(BATCH)
    assert b"cnumpy.core.multiarray\n_reconstruct\n" in data  # the very names of the archive
    same(pickles.load(data, "data_batch_1"), BATCH)
    same(pickle.loads(data, encoding="bytes"), BATCH)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_pickles_of_python_3_are_read_as_well(protocol):
    same(pickles.load(pickle.dumps(BATCH, protocol), "data_batch_1"), BATCH)


def test_arrays_in_the_order_of_fortran_keep_their_rows():
    batch = {b"data": np.asfortranarray(BATCH[b"data"])}
    same(pickles.load(python2_pickle(batch), "data_batch_1"), batch)


class Runs:
    """A pickle that writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (exec, (f"open({str(self.path)!r}, 'w')",))


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path, protocol):
    data = pickle.dumps({b"data": Runs(tmp_path / "ran")}, protocol)
    with pytest.raises(UserError, match=r"batch: .*asks for (__builtin__|builtins)\.exec; it was"):
        pickles.load(data, "batch")
    assert not (tmp_path / "ran").exists()
    pickle.loads(data)  # the same bytes do harm elsewhere
    assert (tmp_path / "ran").exists()


RUN = b"cos\nsystem\n"
ARGUMENT = b"U\x04true"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (RUN + b"(" + ARGUMENT + b"tR.", "asks for os.system"),
        (b"(S'true'\nios\nsystem\n.", "instruction INST"),
        (b"(" + RUN + ARGUMENT + b"o.", "instruction OBJ"),
        (b"\x80\x02" + RUN + ARGUMENT + b"\x85\x81.", "instruction NEWOBJ"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93" + ARGUMENT + b"\x85R.", "asks for os.system"),
        (b"\x80\x04\x8c\x05numpy\x8c\x08core.sys\x93.", "asks for numpy.core.sys"),
        (b"cnumpy\nload\n.", "asks for numpy.load"),
        (b"cnumpy.core.multiarray\nscalar\n.", "asks for numpy.core.multiarray.scalar"),
        (b"Pid\n.", "instruction PERSID"),
        (b"\x80\x02\x82\x01.", "instruction EXT1"),
        (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".", r"BYTEARRAY8|bytearray8"),
        (b"\x80\x03}r" + struct.pack("<I", 2**31 - 1) + b".", "memo entry 2147483647"),
        (b"\x80\x03\x8e" + struct.pack("<Q", 2**40) + b"x.", "is not a pickle"),
        (b"c_codecs\nencode\n}U\x01xK\x01sb.", "changes a function"),
        (b"cnumpy.core.multiarray\n_reconstruct\n}U\x01xK\x01sb.", "changes a function"),
        (b"c_codecs\nencode\n(X\x01\x00\x00\x00aU\x03hextR.", "asks for the encoding b'hex'"),
        (b"", "is not a pickle"),
        (b"}", "is not a pickle"),
        (b"(lp0\n.", "holds a list instead of a dictionary"),
        (b"}K\x01K\x01s.", "has the key 1"),
    ],
)
def test_what_cifar_does_not_hold_is_refused(data, message):
    with pytest.raises(UserError, match=message) as raised:
        pickles.load(data, "batch")
    assert "\n" not in str(raised.value)


def array_pickle(shape: bytes, code: bytes = b"u1", data: bytes = b"1234") -> bytes:
    """{b"data": an array} with a shape and type of anybody's choice."""
    kind = (
        b"cnumpy\ndtype\n(U\x02"
        + code
        + b"K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    state = b"(K\x01" + shape + kind + b"\x89U" + bytes([len(data)]) + data + b"tb"
    return b"}U\x04data" + array + state + b"s."


def test_arrays_are_checked_before_they_are_made():
    good = pickles.load(array_pickle(b"(K\x02K\x02t"), "batch")[b"data"]
    assert good.tolist() == [[49, 50], [51, 52]]
    bad = {
        array_pickle(b"(J\xff\xff\xff\x7fJ\xff\xff\xff\x7ft"): "impossible shape",
        array_pickle(b"(J\xfe\xff\xff\xffJ\xfe\xff\xff\xfft"): "impossible shape",
        array_pickle(b"(K\x03K\x02t"): "in 4 bytes",
        array_pickle(b"(K\x04t", b"O8"): "array of type 'O8'",
        array_pickle(b"(K\x04t", b"u2"): "array of type 'u2'",
    }
    for data, message in bad.items():
        with pytest.raises(UserError, match=message):
            pickles.load(data, "batch")


def test_an_array_of_objects_is_refused():
    file = io.BytesIO()
    pickle.dump({b"data": np.array([{}, []], dtype=object)}, file, protocol=2)
    with pytest.raises(UserError, match="without its bytes"):
        pickles.load(file.getvalue(), "batch")
