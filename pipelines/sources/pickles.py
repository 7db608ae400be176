"""CIFAR's pickles, read without running what a pickle can run."""

import io
import pickle
import pickletools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbf_dist.errors import UserError

# What a dictionary of strings, numbers, lists and arrays consists of. The rest (persistent and
# extension objects, instances of classes, buffers from elsewhere) is refused before unpickling.
_OPCODES = {
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP", "MEMOIZE",
    "PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET",
    "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT",
    "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "EMPTY_TUPLE", "TUPLE", "TUPLE1",
    "TUPLE2", "TUPLE3", "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_DICT", "DICT", "SETITEM",
    "SETITEMS", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD",
}  # fmt: skip
_DTYPES: dict[str, np.dtype[Any]] = {
    "u1": np.dtype(np.uint8),
    "i4": np.dtype("<i4"),
    "i8": np.dtype("<i8"),
}


def load(data: bytes, name: str) -> dict[bytes, Any]:
    """The dictionary in `data`: keys and Python 2 strings as bytes, arrays of bytes or integers.

    The names that numpy's pickles refer to stand for small classes of this file, which only take
    down shape, type and bytes; every other name is refused. No foreign code runs, numpy's included.
    UserError, naming `name`, for anything but such a dictionary.
    """
    try:
        _check_opcodes(data)
        content = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except _RefusedError as error:
        raise UserError(
            f"{name}: is not a pickle of CIFAR's, {error}; it was not unpickled"
        ) from None
    except Exception as error:  # the unpickler raises whatever nonsense leads it to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name}: is not a pickle of CIFAR's ({reason})") from error
    if not isinstance(content, dict):
        raise UserError(f"{name}: holds a {type(content).__name__} instead of a dictionary")
    result: dict[bytes, Any] = {}
    for key, value in content.items():
        as_bytes = key.encode() if isinstance(key, str) else key
        if not isinstance(as_bytes, bytes):
            raise UserError(f"{name}: has the key {key!r}, which is not a string")
        try:
            result[as_bytes] = value.array() if isinstance(value, _Array) else value
        except _RefusedError as error:
            raise UserError(f"{name}: {as_bytes.decode(errors='replace')}: {error}") from None
    return result


class _RefusedError(Exception):
    """The pickle holds what CIFAR's do not."""


def _check_opcodes(data: bytes) -> None:
    """Refuse unknown instructions, and memo places far beyond what the pickle can fill."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if opcode.name not in _OPCODES:
            raise _RefusedError(f"it has the instruction {opcode.name}")
        if opcode.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > count + 1:
            raise _RefusedError(f"it uses the memo entry {argument}")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _RefusedError(f"it asks for {module}.{name}"[:200]) from None


class _Type:
    """What stands for numpy.dtype."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        self.code = code.decode() if isinstance(code, bytes) else code

    def __setstate__(self, state: Any) -> None:
        if len(state) < 2 or state[1] not in (b"|", "|", b"<", "<"):
            raise _RefusedError("it has an array of another byte order")


class _Array:
    """What stands for numpy.ndarray: takes the state down, and checks it when it is asked for."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> NDArray[Any]:
        match self.state:
            case (_, tuple() as shape, _Type() as kind, fortran, bytes() as data):
                pass
            case _:
                raise _RefusedError("it has an array without its bytes")
        dtype = _DTYPES.get(kind.code) if isinstance(kind.code, str) else None
        if dtype is None:
            raise _RefusedError(f"it has an array of type {kind.code!r}"[:200])
        if not all(isinstance(side, int) and 0 <= side <= len(data) for side in shape):
            raise _RefusedError("it has an array of an impossible shape")
        flat = np.frombuffer(data, dtype)
        if int(np.prod(shape, dtype=object)) != len(flat):
            raise _RefusedError(f"it has an array of shape {shape} in {len(data)} bytes")
        return flat.reshape(shape, order="F" if fortran else "C")


class _Function:
    """What stands for a function. A pickle cannot change it: it takes no state."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise _RefusedError("it changes a function")


class _Reconstruct(_Function):
    __slots__ = ()

    def __call__(self, *_: Any) -> _Array:
        return _Array()


class _Encode(_Function):
    """How Python 3 writes bytes in protocol 2."""

    __slots__ = ()

    def __call__(self, text: str, encoding: str) -> bytes:
        if encoding not in ("latin1", b"latin1"):
            raise _RefusedError(f"it asks for the encoding {encoding!r}"[:200])
        return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy._core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _Encode(),
}
