"""Reads RecordIO, the container format of MXNet face packs, without mxnet. ``writer`` writes it.

A ``.rec`` file is a sequence of parts, each aligned to 4 bytes::

    uint32 magic | uint32 cflag << 29 | length | payload | padding to 4 bytes

A record is one part (cflag 0) or several (cflag 1, 2 …, 3). The writer cuts a payload at every 4-byte
aligned magic number and drops that word; the reader puts it back. The payload of an image record is a
header, ``flag`` float32 labels and the image::

    uint32 flag | float32 label | uint64 id | uint64 id2 | flag × float32 | image

mxnet leaves ``id2`` at 0. This package keeps an identity from 2**24 on there, because float32 rounds it:
the upper 24 bits are IDENTITY_MARK, the lower 40 the identity. The ``.idx`` file has a line
``key<TAB>offset`` for each record; the key is an integer.

Source: dmlc-core ``include/dmlc/recordio.h``; MXNet ``python/mxnet/recordio.py``.
"""

import mmap
import struct
import warnings
from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from f2c_plugin.errors import RecordError
from f2c_plugin.utils.git_lfs import NOT_FETCHED, is_lfs_pointer
from f2c_plugin.utils.paths import require_no_file

Buffer = bytes | memoryview
Int64s = NDArray[np.int64]
Float32s = NDArray[np.float32]

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
PART_HEADER = struct.Struct("<II")
IMAGE_HEADER = struct.Struct("<IfQQ")
LENGTH_MASK = (1 << 29) - 1
FLOAT32_EXACT = 1 << 24  # float32 holds every whole number up to here; above, neighbours collapse into one value
IDENTITY_BITS = 40
IDENTITY_MARK = 0xF2C1D0  # 24 bits
NO_IDENTITY = -1
WHOLE, FIRST, MIDDLE, LAST = range(4)  # cflag
NO_IDX = "no such file. The .rec cannot be read without its .idx: `f2c-plugin reindex` makes one from the .rec"


class ImageRecord(NamedTuple):
    """An unpacked image record."""

    labels: Float32s  # (max(flag, 1),); the first is the identity
    id: int  # the number in the header, uint64
    image: Buffer  # encoded; empty in the bookkeeping records of InsightFace packs
    id2: int = 0  # uint64

    @property
    def wide_identity(self) -> int:
        """The identity in ``id2``, from 0 to below 2**40; NO_IDENTITY if there is none."""
        mark, identity = divmod(self.id2, 1 << IDENTITY_BITS)
        return identity if mark == IDENTITY_MARK else NO_IDENTITY


def id2_of(identity: float) -> int:
    """The header's id2 for an identity: 0 where a float32 label is enough. Raises RecordError from 2**40 on."""
    if not identity >= FLOAT32_EXACT:  # also a label that is not a number
        return 0
    if identity >= 1 << IDENTITY_BITS:
        raise RecordError(f"identity {identity:.0f}: must be below 2**{IDENTITY_BITS}")
    return IDENTITY_MARK << IDENTITY_BITS | int(identity)


def unpack_image_record(payload: Buffer) -> ImageRecord:
    """Unpack the payload of a record. Raises RecordError if it is shorter than its header announces."""
    if len(payload) < IMAGE_HEADER.size:
        raise RecordError(f"an image record needs {IMAGE_HEADER.size} bytes of header, found {len(payload)}")
    flag, label, number, id2 = IMAGE_HEADER.unpack_from(payload)
    start = IMAGE_HEADER.size + 4 * flag
    if len(payload) < start:
        raise RecordError(f"the header announces {flag} labels, but the record has only {len(payload)} bytes")
    labels = np.frombuffer(payload, "<f4", flag, IMAGE_HEADER.size) if flag else np.array([label], np.float32)
    return ImageRecord(labels, number, payload[start:], id2)


def image_of_record(payload: Buffer) -> Buffer:
    """``unpack_image_record(payload).image``, but faster. Raises RecordError if the payload is shorter than a header."""
    if len(payload) < IMAGE_HEADER.size:
        return unpack_image_record(payload).image  # raises
    flag = IMAGE_HEADER.unpack_from(payload)[0]
    return payload[IMAGE_HEADER.size + 4 * flag:]


def rec_in(folder: str | Path) -> Path:
    """Path of ``train.rec`` in the folder of a pack. Raises RecordError if a file is given instead."""
    require_no_file(folder, "the folder of train.rec and train.idx", "train.rec", RecordError)
    return Path(folder) / "train.rec"


class RecordFile:
    """Random access to the records of a ``.rec`` file. Raises RecordError if there is no such file, or nothing in it."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise RecordError(f"{self.path}: no such file")
        self.size = self.path.stat().st_size  # bytes
        if self.size == 0:
            raise RecordError(f"{self.path}: the file is empty: the pack holds no records")
        with open(self.path, "rb") as file:  # mapped into memory, which all processes share
            self.bytes = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        if is_lfs_pointer(self.bytes):
            raise RecordError(f"{self.path}: {NOT_FETCHED}")

    def read(self, offset: int) -> Buffer:
        """Payload of the record at byte ``offset``. Raises RecordError if no whole record starts there."""
        parts = [payload for payload, _ in self._parts(offset)]
        return parts[0] if len(parts) == 1 else MAGIC_BYTES.join(parts)

    def scan(self) -> Iterator[tuple[int, int]]:
        """(offset, offset of the next) of each record, from the start of the file to its end.

        Raises RecordError where the file breaks off or is damaged, after the records before that place.
        """
        offset = 0
        while offset < self.size:
            *_, (_, end) = self._parts(offset)
            yield offset, end
            offset = end

    def _parts(self, offset: int) -> Iterator[tuple[memoryview, int]]:
        """(payload, offset of the next part) of each part of the record at ``offset``."""
        cflag, payload, end = self._part(offset)
        if cflag not in (WHOLE, FIRST):
            raise RecordError(f"{self.path}: offset {offset} is inside a record (part flag {cflag}), not at its start")
        yield payload, end
        while cflag not in (WHOLE, LAST):
            part_offset = end
            cflag, payload, end = self._part(part_offset)
            if cflag not in (MIDDLE, LAST):
                raise RecordError(f"{self.path}: the record at offset {offset} breaks off at {part_offset} "
                                  f"(part flag {cflag} instead of 2 or 3)")
            yield payload, end

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
        floats = self._words.view("<f4")
        labels = np.full((len(offsets), count), np.nan, np.float32)
        for plain, first, others in self._headers(offsets):
            flag = self._words[first + 2].astype(np.int64)
            label_at = np.where(flag > 0, first + 8, first + 3)
            fits = (np.maximum(flag, 1) >= count) & (label_at + count <= len(floats))
            labels[plain[fits]] = floats[label_at[fits][:, None] + np.arange(count)]
            for i in others:
                with suppress(RecordError):
                    found = self.image_record(int(offsets[i])).labels
                    if len(found) >= count:
                        labels[i] = found[:count]
        return labels

    def wide_identities(self, offsets: Int64s) -> Int64s:
        """``wide_identity`` of the image records at ``offsets`` (n,), int64 (n,); NO_IDENTITY where they cannot be read."""
        identities = np.full(len(offsets), NO_IDENTITY)
        for plain, first, others in self._headers(offsets):
            low, high = (self._words[first + at].astype(np.int64) for at in (6, 7))
            identities[plain] = np.where(high >> 8 == IDENTITY_MARK, (high & 0xFF) << 32 | low, NO_IDENTITY)
            for i in others:
                with suppress(RecordError):
                    identities[i] = self.image_record(int(offsets[i])).wide_identity
        return identities

    def image_spans(self, offsets: Int64s) -> Iterator[tuple[Int64s, Int64s, Int64s]]:
        """Positions in ``offsets`` (n,), first byte and end of the images of the records there, in chunks.

        Leaves out records in parts, damaged ones and those without an image.
        """
        for plain, first, _ in self._headers(offsets):
            start = 4 * (first + 8 + self._words[first + 2].astype(np.int64))
            end = 4 * first + PART_HEADER.size + (self._words[first + 1] & LENGTH_MASK).astype(np.int64)
            some = (start < end) & (end <= self.size)
            yield plain[some], start[some], end[some]

    @cached_property
    def _words(self) -> NDArray[np.uint32]:
        return np.frombuffer(self.bytes, np.dtype("<u4"), self.size // 4)

    def _headers(self, offsets: Int64s) -> Iterator[tuple[Int64s, Int64s, Int64s]]:
        """Of the records at ``offsets`` (n,): which have a plain header, the first word of each of these, and the others.

        The words are magic, length, flag, label, id (2), id2 (2), labels. The others are records in parts (a few in
        millions) and damaged ones. Comes in chunks, to bound the temporaries.
        """
        words = self._words
        for start in range(0, len(offsets), 1 << 20):
            chunk = offsets[start:start + (1 << 20)]
            inside = np.flatnonzero((chunk >= 0) & (chunk % 4 == 0) & (chunk // 4 + 8 <= len(words)))
            first = chunk[inside] // 4
            length, flag = words[first + 1], words[first + 2].astype(np.int64)
            plain = (words[first] == MAGIC) & (length >> 29 == WHOLE)
            plain &= (length & LENGTH_MASK) >= IMAGE_HEADER.size + 4 * flag
            yield start + inside[plain], first[plain], start + np.delete(np.arange(len(chunk)), inside[plain])


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
            if is_lfs_pointer(text):
                raise RecordError(f"{path}: {NOT_FETCHED}")
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
                              "offset, two whole numbers: move the file away, and `f2c-plugin reindex` makes another "
                              "one from the .rec") from None
    return np.array(table, np.int64).reshape(-1, 2)


def _whole(number: float) -> int:
    if not number.is_integer():
        raise ValueError
    return int(number)
