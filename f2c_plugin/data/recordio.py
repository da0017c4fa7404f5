"""Reads RecordIO, the container format of MXNet face packs, without mxnet. ``writer`` writes it.

A ``.rec`` file is a sequence of parts, each aligned to 4 bytes::

    uint32 magic | uint32 cflag << 29 | length | payload | padding to 4 bytes

A record is one part (cflag 0) or several (cflag 1, 2 …, 3). The writer cuts a payload at every 4-byte
aligned magic number and drops that word; the reader puts it back. The payload of an image record is a
header (flag, label, id, id2), ``flag`` float32 labels and the image. The ``.idx`` file has a line
``key<TAB>offset`` for each record; the key is an integer.

Source: dmlc-core ``include/dmlc/recordio.h``; MXNet ``python/mxnet/recordio.py``.
"""

import mmap
import struct
import warnings
from codecs import BOM_UTF8
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from f2c_plugin.errors import RecordError

Buffer = bytes | memoryview
Int64s = NDArray[np.int64]
Float32s = NDArray[np.float32]

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
PART_HEADER = struct.Struct("<II")
IMAGE_HEADER = struct.Struct("<IfQQ")
LENGTH_MASK = (1 << 29) - 1
WHOLE, FIRST, MIDDLE, LAST = range(4)  # cflag
NO_IDX = "no such file. The .rec cannot be read without its .idx; mxnet's tools/rec2idx.py makes one from the .rec"


class ImageRecord(NamedTuple):
    """An unpacked image record."""

    labels: Float32s  # (max(flag, 1),); the first is the identity
    id: int  # the number in the header, uint64
    image: Buffer  # encoded; empty in the bookkeeping records of InsightFace packs


def unpack_image_record(payload: Buffer) -> ImageRecord:
    """Unpack the payload of a record. Raises RecordError if it is shorter than its header announces."""
    if len(payload) < IMAGE_HEADER.size:
        raise RecordError(f"an image record needs {IMAGE_HEADER.size} bytes of header, found {len(payload)}")
    flag, label, number, _ = IMAGE_HEADER.unpack_from(payload)
    start = IMAGE_HEADER.size + 4 * flag
    if len(payload) < start:
        raise RecordError(f"the header announces {flag} labels, but the record has only {len(payload)} bytes")
    labels = np.frombuffer(payload, "<f4", flag, IMAGE_HEADER.size) if flag else np.array([label], np.float32)
    return ImageRecord(labels, number, payload[start:])


def image_of_record(payload: Buffer) -> Buffer:
    """``unpack_image_record(payload).image``, but faster. Raises RecordError if the payload is shorter than a header."""
    if len(payload) < IMAGE_HEADER.size:
        return unpack_image_record(payload).image  # raises
    flag = IMAGE_HEADER.unpack_from(payload)[0]
    return payload[IMAGE_HEADER.size + 4 * flag:]


class RecordFile:
    """Random access to the records of a ``.rec`` file. Raises RecordError if the file is missing or empty."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise RecordError(f"{self.path}: no such file")
        self.size = self.path.stat().st_size  # bytes
        if self.size == 0:
            raise RecordError(f"{self.path}: the file is empty: the pack holds no records")
        with open(self.path, "rb") as file:  # mapped into memory, which all processes share
            self.bytes = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def read(self, offset: int) -> Buffer:
        """Payload of the record at byte ``offset``. Raises RecordError if no whole record starts there."""
        cflag, payload, end = self._part(offset)
        if cflag == WHOLE:
            return payload
        if cflag != FIRST:
            raise RecordError(f"{self.path}: offset {offset} is inside a record (part flag {cflag}), not at its start")
        parts = [payload]
        while cflag != LAST:
            part_offset = end
            cflag, payload, end = self._part(part_offset)
            if cflag not in (MIDDLE, LAST):
                raise RecordError(f"{self.path}: the record at offset {offset} breaks off at {part_offset} "
                                  f"(part flag {cflag} instead of 2 or 3)")
            parts.append(payload)
        return MAGIC_BYTES.join(parts)

    def _part(self, offset: int) -> tuple[int, memoryview, int]:
        """(cflag, payload, offset of the next part)."""
        start = offset + PART_HEADER.size
        if offset < 0 or offset % 4 or start > self.size:
            raise RecordError(f"{self.path}: no record can start at offset {offset} of {self.size} bytes: "
                              "the .rec is cut short or the .idx belongs to another pack")
        magic, word = PART_HEADER.unpack_from(self.bytes, offset)
        if magic != MAGIC:
            raise RecordError(f"{self.path}: found {magic:#010x} at offset {offset} where a record should start "
                              f"({MAGIC:#010x}): the .rec is damaged or the .idx belongs to another pack")
        end = start + (word & LENGTH_MASK)
        if end > self.size:
            raise RecordError(f"{self.path}: the record at offset {offset} ends at byte {end}, "
                              f"but the file has only {self.size}: the .rec is cut short")
        return word >> 29, self.bytes[start:end], (end + 3) & ~3

    def image_record(self, offset: int) -> ImageRecord:
        """The image record at byte ``offset``. Raises RecordError if it cannot be read or unpacked."""
        payload = self.read(offset)
        try:
            return unpack_image_record(payload)
        except RecordError as error:
            raise RecordError(f"{self.path}: the record at offset {offset} is damaged: {error}") from error

    def damage(self, offset: int) -> RecordError | None:
        """The error that reading the image record at ``offset`` raises; None if the record is intact."""
        try:
            self.image_record(offset)
        except RecordError as error:
            return error
        return None

    def labels(self, offsets: Int64s, count: int = 1) -> Float32s:
        """The first ``count`` labels of the image records at ``offsets`` (n,), read without touching the images.

        float32 (n, count); NaN where a record cannot be read or has fewer labels.
        """
        words = np.frombuffer(self.bytes, np.dtype("<u4"), self.size // 4)
        floats = np.frombuffer(self.bytes, np.dtype("<f4"), self.size // 4)
        labels = np.full((len(offsets), count), np.nan, np.float32)
        for start in range(0, len(offsets), 1 << 20):  # in chunks, to bound the temporaries
            chunk = offsets[start:start + (1 << 20)]
            inside = np.flatnonzero((chunk >= 0) & (chunk % 4 == 0) & (chunk // 4 + 8 <= len(words)))
            first = chunk[inside] // 4  # words: magic, length, flag, label, id, id2, labels
            flag = words[first + 2].astype(np.int64)
            label_at = np.where(flag > 0, first + 8, first + 3)
            plain = (words[first] == MAGIC) & (words[first + 1] >> 29 == WHOLE)
            plain &= (words[first + 1] & LENGTH_MASK) >= IMAGE_HEADER.size + 4 * flag
            plain &= (np.maximum(flag, 1) >= count) & (label_at + count <= len(words))
            labels[start + inside[plain]] = floats[label_at[plain][:, None] + np.arange(count)]
            # The others are records in parts (a few in millions) and damaged ones.
            for i in start + np.delete(np.arange(len(chunk)), inside[plain]):
                with suppress(RecordError):
                    found = self.image_record(int(offsets[i])).labels
                    if len(found) >= count:
                        labels[i] = found[:count]
        return labels


def read_idx(path: str | Path, progress: bool = False) -> tuple[Int64s, Int64s]:
    """Keys and byte offsets in a ``.idx`` file, int64 (n,) each, in the order of the file.

    A byte-order mark, blank lines and whole numbers written as floats are taken. Raises RecordError if the
    file is missing or empty, or a line is not two whole numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise RecordError(f"{path}: {NO_IDX}")
    tables: list[Int64s] = []
    bar = tqdm(total=path.stat().st_size, desc=path.name, unit="B", unit_scale=True, disable=None if progress else True)
    lines = 0
    with open(path, "rb") as file, bar, warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # NumPy warns where the text is not a number
        while text := file.read(1 << 25) + file.readline():  # in chunks, to bound the temporaries
            count = text.count(b"\n") + (not text.endswith(b"\n"))
            try:
                table = np.reshape(np.fromstring(text.decode("ascii"), np.int64, sep=" "), (-1, 2))
                if len(table) != count:
                    raise ValueError
            except (ValueError, DeprecationWarning):  # something is unusual
                table = _read_lines(text, path, lines)
            tables.append(table)
            lines += count
            bar.update(len(text))
    table = np.concatenate(tables) if tables else np.empty((0, 2), np.int64)
    if not len(table):
        raise RecordError(f"{path}: the index is empty: the pack holds no records")
    return np.copy(table[:, 0]), np.copy(table[:, 1])


def _read_lines(text: bytes, path: Path, lines_before: int) -> Int64s:
    """Keys and offsets (n, 2), line by line."""
    table: list[tuple[np.int64, np.int64]] = []
    for number, line in enumerate(text.splitlines(), lines_before + 1):
        words = (line.removeprefix(BOM_UTF8) if number == 1 else line).split()
        try:
            if words:
                key, offset = (np.int64(int(word) if word.isdigit() else _whole(float(word))) for word in words)
                table.append((key, offset))
        except (ValueError, OverflowError):
            raise RecordError(f"{path}: not an index: line {number} is {line[:40]!r}, but every line must be a key and an "
                              "offset, two whole numbers") from None
    return np.array(table, np.int64).reshape(-1, 2)


def _whole(number: float) -> int:
    if not number.is_integer():
        raise ValueError
    return int(number)
