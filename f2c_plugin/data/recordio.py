"""RecordIO, the container format of MXNet face packs, read without mxnet. ``writer`` writes it.

A ``.rec`` file is a sequence of parts, each 4-byte aligned::

    uint32 magic | uint32 cflag << 29 | length | payload | padding to 4 bytes

A record is one part (cflag 0) or several (cflag 1, 2 …, 3): the writer cuts a payload wherever
the magic number stands 4-byte aligned in it and leaves that word out; the reader puts it back.
An image record's payload is a header (flag, label, id, id2), ``flag`` float32 labels and the image.
The ``.idx`` file names each record by an integer key: ``key<TAB>offset`` a line.

Source: dmlc-core ``include/dmlc/recordio.h``; MXNet ``python/mxnet/recordio.py``.
"""

import mmap
import struct
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from f2c_plugin.errors import RecordError

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
PART_HEADER = struct.Struct("<II")
IMAGE_HEADER = struct.Struct("<IfQQ")
_FLAG = struct.Struct("<I")
LENGTH_MASK = (1 << 29) - 1
WHOLE, FIRST, MIDDLE, LAST = range(4)  # cflag


class ImageRecord(NamedTuple):
    """One unpacked image record.

    Attributes:
        labels: float32 (max(flag, 1),); the first is the identity.
        id: the record's own number, uint64.
        image: encoded image bytes; empty in the bookkeeping records of InsightFace packs.
    """

    labels: np.ndarray
    id: int
    image: bytes | memoryview


def unpack_image_record(payload) -> ImageRecord:
    """Split the payload of a record into labels, id and encoded image.

    Raises:
        RecordError: the payload is shorter than its own header says.
    """
    if len(payload) < IMAGE_HEADER.size:
        raise RecordError(f"an image record needs {IMAGE_HEADER.size} bytes of header, found {len(payload)}")
    flag, label, number, _ = IMAGE_HEADER.unpack_from(payload)
    start = IMAGE_HEADER.size + 4 * flag
    if len(payload) < start:
        raise RecordError(f"header announces {flag} labels, but the record has only {len(payload)} bytes")
    labels = np.frombuffer(payload, "<f4", flag, IMAGE_HEADER.size) if flag else np.float32([label])
    return ImageRecord(labels, number, payload[start:])


def image_of_record(payload):
    """The encoded image in the payload of a record: ``unpack_image_record(payload).image``, sooner."""
    if len(payload) < IMAGE_HEADER.size:
        return unpack_image_record(payload).image  # which says what is wrong
    flag, = _FLAG.unpack_from(payload)
    return payload[IMAGE_HEADER.size + 4 * flag:]


class RecordFile:
    """Random access to the records of a ``.rec`` file.

    Attributes:
        bytes: the whole file, mapped into memory and shared by all processes.
        size: its length.
    """

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_file():
            raise RecordError(f"{self.path}: no such file")
        self.size = self.path.stat().st_size
        if self.size == 0:
            raise RecordError(f"{self.path}: the file is empty: the pack holds no records")
        with open(self.path, "rb") as file:
            self.bytes = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def read(self, offset: int):
        """Payload of the record that starts at byte ``offset``; bytes-like.

        Raises:
            RecordError: no record starts there, or it runs past the end of the file.
        """
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

    def _part(self, offset: int):
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

    def damage(self, offset: int) -> RecordError | None:
        """What keeps the image record at ``offset`` from being read; None if nothing does."""
        try:
            payload = self.read(offset)
        except RecordError as error:
            return error
        try:
            unpack_image_record(payload)
        except RecordError as error:
            return RecordError(f"{self.path}: the record at offset {offset} is damaged: {error}")

    def _labels_of_one(self, offset, count):
        try:
            labels = unpack_image_record(self.read(offset)).labels
        except RecordError:
            return np.nan
        return labels[:count] if len(labels) >= count else np.nan

    def labels(self, offsets: np.ndarray, count: int = 1) -> np.ndarray:
        """The first ``count`` labels of many image records at once, without touching their images.

        Args:
            offsets: int64 (n,) byte offsets of records.
        Returns:
            float32 (n, count); NaN where no record can be read or it has fewer labels.
        """
        words = np.frombuffer(self.bytes, "<u4", self.size // 4)
        column = np.arange(count)
        labels = np.empty((len(offsets), count), np.float32)
        for start in range(0, len(offsets), 1 << 20):  # bounds the temporaries, not a loop over records
            chunk = np.asarray(offsets[start:start + (1 << 20)], np.int64)
            inside = np.flatnonzero((chunk >= 0) & (chunk % 4 == 0) & (chunk // 4 + 8 <= len(words)))
            first = chunk[inside] // 4  # words: magic, length, flag, label, id, id2, labels
            flag = words[first + 2].astype(np.int64)
            where = np.where(flag > 0, first + 8, first + 3)
            plain = (words[first] == MAGIC) & (words[first + 1] >> 29 == WHOLE)
            plain &= (words[first + 1] & LENGTH_MASK) >= IMAGE_HEADER.size + 4 * flag
            plain &= (np.maximum(flag, 1) >= count) & (where + count <= len(words))
            labels[start + inside[plain]] = words[where[plain][:, None] + column].view("<f4")
            others = np.ones(len(chunk), bool)
            others[inside[plain]] = False
            for i in start + np.flatnonzero(others):  # records in parts (a few in millions) and damaged ones
                labels[i] = self._labels_of_one(int(offsets[i]), count)
        return labels


def read_idx(path, progress: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Read a ``.idx`` file.

    Args:
        progress: whether to show a progress bar.
    Returns:
        keys and byte offsets, int64 (n,) each, in the order of the file.
    Raises:
        RecordError: the file is missing, empty, or not lines of two integers.
    """
    path = Path(path)
    if not path.is_file():
        raise RecordError(f"{path}: no such file. The .rec cannot be read without its .idx; "
                          "mxnet's tools/rec2idx.py makes one from the .rec")
    tables = [np.empty((0, 2), np.int64)]
    bar = tqdm(total=path.stat().st_size, desc=path.name, unit="B", unit_scale=True, disable=None if progress else True)
    try:
        with open(path, "rb") as file, bar, warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)  # how NumPy reports text that is no number
            while text := file.read(1 << 25) + file.readline():  # bounds the temporaries
                table = np.fromstring(text.decode("ascii"), np.int64, sep=" ").reshape(-1, 2)
                if len(table) != text.count(b"\n") + (not text.endswith(b"\n")):
                    raise ValueError
                tables.append(table)
                bar.update(len(text))
    except (ValueError, DeprecationWarning):
        raise RecordError(f"{path}: not an index: every line must be a key and an offset, two integers") from None
    table = np.concatenate(tables)
    if not len(table):
        raise RecordError(f"{path}: the index is empty: the pack holds no records")
    return table[:, 0].copy(), table[:, 1].copy()
