"""Reads the pickle in a ``.bin`` file without running code from it."""

import math
import pickle
import struct
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from f2c_plugin.errors import VerificationSetError


class _PlainUnpickler(pickle._Unpickler):
    """Lists, tuples, bytes, bools, numbers, and NumPy arrays of bytes or bools. Nothing is imported.

    Built on pickle's Python implementation: the one in C takes gigabytes for a memo index of 2**31
    in a file of nine bytes, and lets a file set attributes of whatever it can name.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def load_build(self):
        if not isinstance(self.stack[-2], (_PickledArray, _PickledDtype)):
            raise VerificationSetError("it sets the state of something that is no NumPy array")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def load_bytearray8(self):  # pickle's own takes as much memory as the file says before it reads any of it
        size, = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(size)))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8

    def find_class(self, module, name):
        try:
            return _STAND_INS[module.replace("numpy._core", "numpy.core"), name]
        except KeyError:
            pass
        raise VerificationSetError(f"it asks for {module}.{name}; a verification set needs only lists of images and "
                                   "answers, so the file is damaged or malicious")


class _PickledDtype:
    def __init__(self, code, *_):
        code = code.decode() if isinstance(code, bytes) else code
        if not isinstance(code, str) or code not in ("u1", "b1", "|u1", "|b1"):
            found = repr(code[:20]) if isinstance(code, str) else type(code).__name__
            raise VerificationSetError(f"it holds a NumPy array of type {found}; images are uint8, answers bool")

    def __setstate__(self, state):
        pass  # byte order and alignment, of no meaning for single bytes


class _PickledArray:
    """Stands for an array until its state comes; never hands the state to NumPy unseen."""

    def __init__(self, *_):
        self.array = np.empty(0, np.uint8)

    def __setstate__(self, state):
        _, shape, dtype, _, content = state
        plain = isinstance(dtype, _PickledDtype) and isinstance(content, (bytes, bytearray))
        plain = plain and isinstance(shape, tuple) and len(shape) <= 4 and all(isinstance(each, int) for each in shape)
        if not plain or len(content) != math.prod(shape):
            raise VerificationSetError("it holds a NumPy array whose content does not match its shape")
        self.array = np.frombuffer(content, np.uint8)


def _array_from_buffer(content, dtype, shape, order):  # protocol 5
    array = _PickledArray()
    array.__setstate__((1, shape, dtype, order, content))
    return array


def _scalar(_, content):
    return bool(content[0])


def _encode_latin1(text, encoding):
    if not isinstance(text, str) or not isinstance(encoding, str) or encoding != "latin1":
        raise VerificationSetError("it holds bytes in an encoding that pickle does not write")
    return text.encode("latin1")


_STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _array_from_buffer,
    ("numpy", "ndarray"): None,  # an argument of _reconstruct, of no meaning here
    ("numpy", "dtype"): _PickledDtype,
    ("_codecs", "encode"): _encode_latin1,  # how protocol 2 writes bytes
}


def load_pickle(path: Path) -> tuple[list[Any], list[bool]]:
    """The images and answers in a ``.bin`` file.

    Raises:
        VerificationSetError: the file is missing, damaged, or holds anything else.
    """
    if not path.is_file():
        raise VerificationSetError(f"{path}: no such file")
    try:
        # From memory, where reading what is not there takes no more than what is.
        images, same = _PlainUnpickler(BytesIO(path.read_bytes()), encoding="bytes").load()
        images, same = ([item.array if isinstance(item, _PickledArray) else item for item in part]
                        for part in (_as_list(images), _as_list(same)))
        if not all(isinstance(image, (bytes, np.ndarray)) for image in images):
            raise VerificationSetError("its images are not byte strings")
        if not all(isinstance(answer, (bool, int, np.integer)) for answer in same):
            raise VerificationSetError("its answers are not true or false")
        return images, [bool(answer) for answer in same]
    except VerificationSetError as error:
        raise VerificationSetError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise VerificationSetError(f"{path}: not a verification set, a pickle of images and answers: {type(error).__name__}") from error


def _as_list(part):
    if isinstance(part, _PickledArray):
        part = part.array
    if not isinstance(part, (list, tuple, np.ndarray)):
        raise VerificationSetError(f"found a {type(part).__name__} where a list should be")
    return part
