"""Reads pickles from elsewhere: imports nothing, and takes little more memory than the pickle has bytes."""

import pickle
import struct
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import Any, ClassVar

_Load = Callable[[Any], None]
_DISPATCH: dict[int, _Load] = {**pickle._Unpickler.dispatch}


class Refused(Exception):
    """What a file must not hold. The message continues a sentence that begins with the file's name."""


def _on(*opcodes: bytes) -> Callable[[_Load], _Load]:
    """Use this method for these opcodes instead of pickle's own."""
    def register(load: _Load) -> _Load:
        _DISPATCH.update(dict.fromkeys((opcode[0] for opcode in opcodes), load))
        return load
    return register


def _encode(text: object, encoding: object) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise Refused("holds bytes in an encoding that pickle never writes")
    return text.encode("latin1")


# What protocols 0 to 2 write bytes with.
BYTES: Mapping[tuple[str, str], Callable[..., bytes]] = {("_codecs", "encode"): _encode, ("__builtin__", "bytes"): lambda: b""}


class PlainUnpickler(pickle._Unpickler):
    """Accepts lists, dictionaries, tuples, strings, bytes, numbers, and what ``names`` stands for.

    Based on pickle's Python implementation. The C implementation allocates gigabytes for a memo index of
    2**31 in a file of nine bytes, and lets a file set attributes of any object that it can name.

    Attributes:
        content: what such a file holds, in plural, for errors.
        names: what stands for the classes and functions that a file may name, by (module, name).
    Raises:
        Refused: the file names something else, or changes what is not its own. A damaged pickle can raise anything.
    """

    content: ClassVar[str]
    names: ClassVar[Mapping[tuple[str, str], Any]]

    stack: list[Any]
    read: Callable[[int], bytes]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, _Load]] = _DISPATCH

    def __init__(self, pickled: bytes, encoding: str = "ASCII"):
        # From memory, so that a read past the end costs no more than what is there.
        super().__init__(BytesIO(pickled), encoding=encoding)

    def find_class(self, module: str, name: str) -> Any:
        self._require(type(module) is type(name) is str, "makes up a name")
        self._require((module, name) in self.names, f"holds {f'{module} {name}'[:80]}")
        return self.names[module, name]

    def build(self, instance: Any, state: Any) -> None:
        """Set the state of an object that ``names`` made."""
        self._require(False, f"sets the state of a {type(instance).__name__}")

    def _require(self, usual: bool, what: str) -> None:
        if not usual:
            raise Refused(f"{what}, which {self.content} do not: the file is damaged or malicious")

    @_on(pickle.BUILD)
    def _load_build(self) -> None:
        state = self.stack.pop()
        self.build(self.stack[-1], state)

    @_on(pickle.REDUCE)
    def _load_reduce(self) -> None:
        arguments = self.stack.pop()
        self._require(type(arguments) is tuple, "calls a function without arguments")
        self.stack[-1] = self.stack[-1](*arguments)

    @_on(pickle.APPEND)
    def _load_append(self) -> None:
        self._extend([self.stack.pop()])

    @_on(pickle.APPENDS)
    def _load_appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: Sequence[Any]) -> None:
        self._require(type(self.stack[-1]) is list, f"extends a {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(items)

    @_on(pickle.SETITEM)
    def _load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    @_on(pickle.SETITEMS)
    def _load_setitems(self) -> None:
        self._update(self.pop_mark())

    def _update(self, items: Sequence[Any]) -> None:
        self._require(isinstance(self.stack[-1], dict), f"fills a {type(self.stack[-1]).__name__}")
        # Not tuples: the hash of nested ones can take forever.
        self._require(all(isinstance(key, (str, bytes, int, float)) for key in items[::2]), "has odd keys")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    @_on(pickle.BYTEARRAY8)
    def _load_bytearray8(self) -> None:  # pickle's own allocates the size that the file claims before it reads
        size, = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(size)))

    @_on(pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.DICT,
         pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.PERSID)
    def _load_nothing(self) -> None:
        self._require(False, "holds other objects than lists, dictionaries, tuples, arrays and numbers")
