"""Reads what ``torch.save`` wrote, with one strict parser.

``torch.load`` does not notice a changed byte, does not mind what a file of a few bytes stands for, and finds other
entries in a crafted archive than Python's zipfile does. So it is not used: what is checked here is what is read.
"""

import math
import mmap
import re
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, cast

import torch
from torch import Tensor, nn

from f2c_plugin.errors import CheckpointError
from f2c_plugin.utils.git_lfs import NOT_FETCHED, is_lfs_pointer
from f2c_plugin.utils.plain_pickle import BYTES, PlainUnpickler, Refused

_ENTRY = re.compile(r"data\.pkl|data/\d+|byteorder|version|\.format_version|\.storage_alignment|\.data/serialization_id")
_LOCAL_HEADER = struct.Struct("<4s2xHH4xLLLHH")  # signature, flags, method, CRC, sizes, lengths of name and extra field
_DIRECTORY_ENTRY = 46  # bytes, without its name, extra field and comment
_ENDS = (22, 98)  # bytes of the records behind the directory, without and with those of ZIP64
_DESCRIPTOR = 24  # bytes at most, behind an entry
_HAS_DESCRIPTOR, _UTF_8 = 8, 0x800  # flags
_ALIGNMENT = 16  # bytes; torch.save aligns to 64
# Content that is referred to several times counts as often. Far above what occurs, and small enough to print or copy.
_MAX_GROWTH, _MAX_DEPTH, _MAX_DIMENSIONS = 64, 100, 64
_LEAVES = (type(None), bool, int, float, str, bytes, Tensor, nn.Parameter)
_CONTAINERS = (dict, OrderedDict, list, tuple, torch.Size)


def load_states(path: str | Path) -> dict[str, Any]:
    """The dictionary in a file of ``torch.save``, on the CPU, with every byte verified. Runs no code from the file.

    The tensors share storages as they did when they were saved. They are mapped from the file, which does not
    change when they are written to.

    Raises:
        CheckpointError: the file is missing, cut short or changed, holds no dictionary, holds something other than
            states of a training, or stands for much more than its size.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise Refused("not a file" if path.exists() else "no such file")
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # kept by the tensors
        states = _StatesUnpickler(mapped, _entries(mapped)).load()
    except Refused as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # a damaged archive or pickle can raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: not a whole checkpoint: {reason}") from error
    if not isinstance(states, dict):
        raise CheckpointError(f"{path}: holds a {type(states).__name__}, not the states of a training")
    return cast(dict[str, Any], states)


def _entries(mapped: mmap.mmap) -> dict[str, slice]:
    """The place of every entry, by its name without the top folder.

    Entries follow each other from the first byte on, the directory follows them, and the file ends with it. So
    there is room for one directory only.
    """
    if is_lfs_pointer(mapped[:64]):
        raise Refused(NOT_FETCHED)
    if mapped[:2] == b"\x80\x02":
        raise Refused("in the format of torch < 1.6: load it with torch.load, if you trust it, and save it again with "
                      "torch.save")
    try:
        archive = zipfile.ZipFile(cast(BinaryIO, mapped))  # reads the directory only
    except Exception as error:
        raise Refused(f"not a whole checkpoint: not a ZIP archive, which torch.save writes: {error}") from error
    entries: dict[str, slice] = {}
    end, directory_end, folder = 0, archive.start_dir, None
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        encoded = info.orig_filename.encode("utf-8" if info.flag_bits & _UTF_8 else "cp437")
        top, _, name = info.orig_filename.partition("/")
        folder = top if folder is None else folder
        if top != folder or not _ENTRY.fullmatch(name):
            raise Refused(f"holds {info.orig_filename[:80]!r}, which files of torch.save do not; TorchScript is not read")
        if name in entries:
            raise Refused(f"holds {name} twice: the file is damaged or malicious")
        _require_adjacent(end, info.header_offset, name)
        begin = info.header_offset + _LOCAL_HEADER.size
        signature, flags, method, crc, packed, size, name_length, extra_length = _LOCAL_HEADER.unpack(
            mapped[info.header_offset:begin])
        told = [(0 if flags & _HAS_DESCRIPTOR and not given else value, given) for value, given in
                ((info.CRC, crc), (min(info.file_size, 0xFFFFFFFF), packed), (min(info.file_size, 0xFFFFFFFF), size))]
        if (signature != b"PK\3\4" or (flags, method) != (info.flag_bits, info.compress_type)
                or mapped[begin:begin + name_length] != encoded or any(value != given for value, given in told)):
            raise Refused(f"its directory and the entry {name} contradict each other: the file is damaged or malicious")
        if method != zipfile.ZIP_STORED or info.compress_size != info.file_size or flags & ~(_HAS_DESCRIPTOR | _UTF_8):
            raise Refused(f"{name} is compressed or encrypted, which torch.save never does")
        begin += name_length + extra_length
        end = begin + info.file_size
        directory_end += _DIRECTORY_ENTRY + len(encoded) + len(info.extra) + len(info.comment)
        if end > archive.start_dir or zlib.crc32(memoryview(mapped)[begin:end]) != info.CRC:
            raise Refused(f"damaged: {name} is not as it was written")
        entries[name] = slice(begin, end)
    _require_adjacent(end, archive.start_dir, "the directory")
    if len(mapped) - directory_end not in _ENDS:
        raise Refused("does not end with its directory: the file is damaged or malicious")
    if mapped[entries.get("byteorder", slice(0))] not in (b"little", b""):
        raise Refused("written on a big-endian computer, which is not read here")
    return entries


def _require_adjacent(end: int, begin: int, name: str) -> None:
    if not 0 <= begin - end <= (_DESCRIPTOR if end else 0):
        raise Refused(f"{name} does not follow what is before it: the file is damaged or malicious")


@dataclass
class _Storage:
    content: Tensor  # uint8 (bytes,)
    dtype: torch.dtype


def _tensor_v3(storage: _Storage, offset: int, size: Any, stride: Any, requires_grad: bool, hooks: Any, dtype: torch.dtype,
               metadata: Any = None) -> Tensor:
    """As ``torch._utils._rebuild_tensor_v3``, if the tensor lies in its storage."""
    if not (isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= _MAX_DIMENSIONS
            and all(type(each) is int and each >= 0 for each in (offset, *size, *stride)) and not hooks and not metadata):
        raise Refused("holds a tensor with hooks, or in a form that torch.save never writes")
    there, count = len(storage.content) // dtype.itemsize, math.prod(size)
    last = offset + sum((each - 1) * step for each, step in zip(size, stride, strict=True)) if count else offset - 1
    if count > there or last >= there:
        raise Refused(f"a tensor of shape {tuple(size)} stands for more than the file holds")
    tensor = torch.empty(0, dtype=dtype).set_(storage.content.untyped_storage(), offset, size, stride)
    return tensor.requires_grad_(requires_grad)


def _tensor_v2(storage: _Storage, offset: int, size: Any, stride: Any, requires_grad: bool, hooks: Any,
               metadata: Any = None) -> Tensor:
    return _tensor_v3(storage, offset, size, stride, requires_grad, hooks, storage.dtype, metadata)


def _parameter(data: Tensor, requires_grad: bool, hooks: Any) -> nn.Parameter:
    if not isinstance(data, Tensor) or hooks:
        raise Refused("holds a parameter with hooks, or in a form that torch.save never writes")
    return nn.Parameter(data, requires_grad)


def _size(size: Any) -> torch.Size:
    if not isinstance(size, tuple):
        raise Refused("holds a size in a form that torch.save never writes")
    return torch.Size(size)


_STORAGE_TYPES = dict(Double=torch.float64, Float=torch.float32, Half=torch.float16, BFloat16=torch.bfloat16, Long=torch.int64,
                      Int=torch.int32, Short=torch.int16, Char=torch.int8, Byte=torch.uint8, Bool=torch.bool,
                      ComplexDouble=torch.complex128, ComplexFloat=torch.complex64)
_WITHOUT_STORAGE_TYPE = ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")


class _StatesUnpickler(PlainUnpickler):
    """Reads ``data.pkl``; tensors lie in the mapped file."""

    content = "states of a training"
    names: ClassVar[Mapping[tuple[str, str], Any]] = {
        **BYTES,
        ("collections", "OrderedDict"): lambda: OrderedDict(),  # without arguments
        ("torch", "Size"): _size,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
        ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
        ("torch._utils", "_rebuild_parameter"): _parameter,
        ("torch.storage", "UntypedStorage"): torch.uint8,
        **{("torch", f"{name}Storage"): dtype for name, dtype in _STORAGE_TYPES.items()},
        **{("torch", name): getattr(torch, name) for name in _WITHOUT_STORAGE_TYPE},
    }

    def __init__(self, mapped: mmap.mmap, entries: Mapping[str, slice]):
        if missing := {"data.pkl", "version"} - entries.keys():
            raise Refused(f"holds no {min(missing)}: not a file of torch.save")
        pickled = mapped[entries["data.pkl"]]
        super().__init__(pickled)
        self.mapped, self.entries = mapped, entries
        self.storages: dict[str, _Storage] = {}
        self.room_for_objects, self.room_for_tensors = _MAX_GROWTH * len(pickled), _MAX_GROWTH * len(mapped)

    def persistent_load(self, pid: Any) -> _Storage:
        what, dtype, key, _, count = pid
        self._require(what == "storage" and isinstance(dtype, torch.dtype) and type(key) is str and type(count) is int,
                      "refers to other things than storages")
        if (place := self.entries.get(f"data/{key}")) is None:
            raise Refused(f"lacks data/{key[:20]}, which a tensor lies in")
        size = place.stop - place.start
        if key not in self.storages:
            content = torch.frombuffer(self.mapped, dtype=torch.uint8, count=size, offset=place.start) if size else torch.empty(
                0, dtype=torch.uint8)
            self.storages[key] = _Storage(content.clone() if place.start % _ALIGNMENT else content, dtype)
        if size != count * dtype.itemsize or self.storages[key].dtype != dtype:
            raise Refused(f"data/{key} holds {size} bytes, not {count} numbers of {dtype}")
        return self.storages[key]

    def build(self, instance: Any, state: Any) -> None:
        if type(instance) is not OrderedDict or not isinstance(state, dict) or state.keys() != {"_metadata"}:
            super().build(instance, state)
        vars(instance).update(state)  # the versions of modules in a state_dict

    def load(self) -> Any:
        states = super().load()
        self._check(states)
        return states

    def _check(self, states: Any) -> None:
        """Refuse what is no state, is nested without end, or grows when it is copied or printed."""
        stack: list[tuple[Any, int]] = [(states, 0)]
        while stack:
            each, depth = stack.pop()
            if type(each) in _CONTAINERS:
                inside = [*each.keys(), *each.values(), *getattr(each, "__dict__", {}).values()] if isinstance(
                    each, dict) else each
                stack += [(part, depth + 1) for part in inside]
            elif type(each) not in _LEAVES:
                raise Refused(f"holds a {type(each).__name__} by itself, which {self.content} do not")
            self.room_for_objects -= 1 + (len(each) if isinstance(each, (str, bytes)) else 0)
            self.room_for_tensors -= each.nbytes if isinstance(each, Tensor) else 0
            if depth > _MAX_DEPTH or min(self.room_for_objects, self.room_for_tensors) < 0:
                raise Refused("stands for much more than the file holds, or is nested too deeply")
