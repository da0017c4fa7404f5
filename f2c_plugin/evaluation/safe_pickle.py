"""Reads the pickle in a ``.bin`` file without running code from the file."""

import math
import pickle
import struct
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from f2c_plugin.errors import VerificationSetError


class _PlainUnpickler(pickle._Unpickler):
    """Accepts lists, tuples, bytes, bools, numbers, and NumPy arrays of bytes or bools. Imports nothing.

    Based on pickle's Python implementation. The C implementation allocates gigabytes for a memo index of
    2**31 in a file of nine bytes, and lets a file set attributes of any object that it can name.
    """

    stack: list[Any]
    read: Callable[[int], bytes]
    append: Callable[[Any], None]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    _build = staticmethod(dispatch[pickle.BUILD[0]])

    def load_build(self) -> None:
        if not isinstance(self.stack[-2], (_PickledArray, _PickledDtype)):
            raise VerificationSetError("it sets the state of an object that is not a NumPy array")
        self._build(self)

    dispatch[pickle.BUILD[0]] = load_build

    def load_bytearray8(self) -> None:  # pickle's own allocates the size that the file claims before it reads
        size, = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(size)))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8

    def find_class(self, module: str, name: str) -> Any:
        wanted = module.replace("numpy._core", "numpy.core"), name
        if wanted not in _STAND_INS:
            raise VerificationSetError(f"it asks for {module}.{name}, but a verification set holds only lists of images and "
                                       "labels: the file is damaged or malicious")
        return _STAND_INS[wanted]


class _PickledDtype:
    def __init__(self, code: object, *_: object):
        code = code.decode() if isinstance(code, bytes) else code
        if not isinstance(code, str) or code not in ("u1", "b1", "|u1", "|b1"):
            found = repr(code[:20]) if isinstance(code, str) else type(code).__name__
            raise VerificationSetError(f"it holds a NumPy array of type {found}, but images are uint8 and labels are bool")

    def __setstate__(self, state: object) -> None:
        pass  # byte order and alignment, which do not matter for single bytes


class _PickledArray:
    """Stands in for an array. Checks the pickled state before NumPy gets it."""

    def __init__(self, *_: object):
        self.array = np.empty(0, np.uint8)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, _, content = state
        plain = isinstance(dtype, _PickledDtype) and isinstance(content, (bytes, bytearray))
        plain = plain and isinstance(shape, tuple) and len(shape) <= 4 and all(isinstance(each, int) for each in shape)
        if not plain or len(content) != math.prod(shape):
            raise VerificationSetError("it holds a NumPy array whose content does not match its shape")
        self.array = np.frombuffer(content, np.uint8)


def _array_from_buffer(content: object, dtype: object, shape: object, order: object) -> _PickledArray:  # protocol 5
    array = _PickledArray()
    array.__setstate__((1, shape, dtype, order, content))
    return array


def _scalar(_: object, content: Any) -> bool:
    return bool(content[0])


def _encode_latin1(text: object, encoding: object) -> bytes:
    if not isinstance(text, str) or not isinstance(encoding, str) or encoding != "latin1":
        raise VerificationSetError("it holds bytes in an encoding that pickle never writes")
    return text.encode("latin1")


_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _array_from_buffer,
    ("numpy", "ndarray"): None,  # an argument of _reconstruct, which ignores it
    ("numpy", "dtype"): _PickledDtype,
    ("_codecs", "encode"): _encode_latin1,  # how protocol 2 writes bytes
}


def load_pickle(path: Path) -> tuple[list[Any], list[bool]]:
    """Read the images and the labels, whether pairs are the same, from a ``.bin`` file. Raises VerificationSetError."""
    if not path.is_file():
        raise VerificationSetError(f"{path}: no such file")
    try:
        # From memory, so that a read past the end costs no more than what is there.
        images, same = _PlainUnpickler(BytesIO(path.read_bytes()), encoding="bytes").load()
        images, same = _as_list(images), _as_list(same)
        if not all(isinstance(image, (bytes, np.ndarray)) for image in images):
            raise VerificationSetError("its images are not byte strings")
        if not all(isinstance(label, (bool, int, np.integer)) for label in same):
            raise VerificationSetError("its labels are not true or false")
        return images, [bool(label) for label in same]
    except VerificationSetError as error:
        raise VerificationSetError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise VerificationSetError(f"{path}: not a pickle of images and labels: {type(error).__name__}") from error


def _as_list(part: Any) -> list[Any]:
    if isinstance(part, _PickledArray):
        part = part.array
    if not isinstance(part, (list, tuple, np.ndarray)):
        raise VerificationSetError(f"found a {type(part).__name__} instead of a list")
    return [item.array if isinstance(item, _PickledArray) else item for item in part]
