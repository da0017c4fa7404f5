"""Reads the pickle in a ``.bin`` file without running code from the file."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from f2c_plugin.errors import VerificationSetError
from f2c_plugin.utils.git_lfs import NOT_FETCHED, is_lfs_pointer
from f2c_plugin.utils.plain_pickle import BYTES, PlainUnpickler, Refused

_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|S\d{1,8}|O8?)")


class _PickledDtype:
    def __init__(self, code: Any, *_: object):
        code = code.decode() if isinstance(code, bytes) else code
        if not isinstance(code, str) or not _DTYPE.fullmatch(code):
            found = code[:20] if isinstance(code, str) else type(code).__name__
            raise Refused(f"holds a NumPy array of type {found}, but images are bytes or uint8 and answers bool or numbers")
        self.dtype = np.dtype(code)

    def set_state(self, state: Any) -> None:
        big_endian = state[1] in (">", b">")
        self.dtype = self.dtype.newbyteorder(">" if big_endian else "<")


class _PickledArray:
    """Stands in for an array, as a list of its items, or for uint8 the array itself. Checks what NumPy gets."""

    def __init__(self, *_: object):
        self.items: Any = []

    def set_state(self, state: Any) -> None:
        _, shape, dtype, _, content = state
        if not isinstance(shape, tuple) or not all(type(each) is int and each >= 0 for each in shape):
            raise Refused("holds a NumPy array without a shape")
        if math.prod(shape) != max(shape, default=1):  # by rows or by columns, other images would make a pair
            raise Refused(f"holds a NumPy array of shape {str(shape)[:40]}, but images and answers stand in a row")
        values: Any = content if isinstance(content, list) else np.frombuffer(content, dtype.dtype)
        if len(values) != math.prod(shape):
            raise Refused("holds a NumPy array whose content does not match its shape")
        self.items = values.tolist() if isinstance(values, np.ndarray) and values.dtype != np.uint8 else values


def _array_from_buffer(content: object, dtype: object, shape: object, order: object) -> _PickledArray:  # protocol 5
    array = _PickledArray()
    array.set_state((1, shape, dtype, order, content))
    return array


def _scalar(dtype: Any, content: Any) -> Any:
    return _array_from_buffer(content, dtype, (1,), None).items[0]


def _bytearray(content: object = b"", encoding: object = "latin-1") -> bytes:  # of a number, Python's would be that long
    if isinstance(content, str) and encoding == "latin-1":
        return content.encode("latin-1")
    if not isinstance(content, bytes):
        raise Refused("holds a bytearray in a form that pickle never writes")
    return content


class _SetUnpickler(PlainUnpickler):
    content = "verification sets"
    names: ClassVar[Mapping[tuple[str, str], Any]] = {
        **BYTES,
        **{(builtins, "bytearray"): _bytearray for builtins in ("builtins", "__builtin__")},
        **{(f"numpy.{core}.{module}", name): stand_in for core in ("core", "_core") for module, name, stand_in in [
            ("multiarray", "_reconstruct", _PickledArray), ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _array_from_buffer)]},
        ("numpy", "ndarray"): None,  # an argument of _reconstruct, which ignores it
        ("numpy", "dtype"): _PickledDtype,
    }

    def build(self, instance: Any, state: Any) -> None:
        if not isinstance(instance, (_PickledArray, _PickledDtype)):
            super().build(instance, state)
        instance.set_state(state)


def load_pickle(path: Path) -> tuple[list[bytes], list[bool]]:
    """Read the encoded images and the answers, whether pairs are the same, from a ``.bin`` file of Python 2 or 3.

    Images may be bytes, bytearrays or uint8 arrays; answers bools or numbers 0 and 1; both in lists, tuples or
    NumPy arrays. Raises VerificationSetError.
    """
    if not path.is_file():
        raise VerificationSetError(f"{path}: {'a folder, not a .bin file' if path.is_dir() else 'no such file'}")
    content = path.read_bytes()
    try:
        if is_lfs_pointer(content):
            raise Refused(NOT_FETCHED)
        images, same = (_as_list(part) for part in _SetUnpickler(content, encoding="bytes").load())
        return [_image(i, each) for i, each in enumerate(images)], [_answer(i, each) for i, each in enumerate(same)]
    except Refused as error:
        raise VerificationSetError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise VerificationSetError(f"{path}: not a pickle of images and answers: {type(error).__name__}") from error


def _as_list(part: Any) -> list[Any]:
    part = part.items if isinstance(part, _PickledArray) else part
    if not isinstance(part, (list, tuple, np.ndarray)):
        raise Refused(f"holds a {type(part).__name__} in place of a list")
    return list(part)


def _image(number: int, image: Any) -> bytes:
    image = image.items if isinstance(image, _PickledArray) else image
    if not isinstance(image, (bytes, bytearray, np.ndarray)):
        raise Refused(f"image {number} is a {type(image).__name__}, not the bytes of a JPEG")
    return bytes(image)


def _answer(number: int, answer: Any) -> bool:
    if not isinstance(answer, (bool, int, float, np.generic)) or answer not in (0, 1):
        found = repr(answer)[:40] if isinstance(answer, (int, float, np.generic)) else f"a {type(answer).__name__}"
        raise Refused(f"the answer for pair {number} is {found}, not true or false")
    return bool(answer)
