"""RecordIO, the container format of MXNet face packs, read and written without mxnet.

A ``.rec`` file is a sequence of parts, each 4-byte aligned::

    uint32 magic | uint32 cflag << 29 | length | payload | padding to 4 bytes

A record is one part (cflag 0) or several (cflag 1, 2 …, 3): the writer cuts a payload wherever
the magic number stands 4-byte aligned in it and leaves that word out; the reader puts it back.
An image record's payload is a header (flag, label, id, id2), ``flag`` float32 labels and the image.
The ``.idx`` file names each record by an integer key: ``key<TAB>offset`` a line.

Source: dmlc-core ``include/dmlc/recordio.h``; MXNet ``python/mxnet/recordio.py``.
"""

import mmap
import os
import struct
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

MAGIC = 0xCED7230A
_MAGIC_BYTES = struct.pack("<I", MAGIC)
_PART_HEADER = struct.Struct("<II")
_IMAGE_HEADER = struct.Struct("<IfQQ")
_FLAG = struct.Struct("<I")
_LENGTH_MASK = (1 << 29) - 1
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)  # cflag


class RecordError(ValueError):
    """A pack that cannot be read: the message names the file, the place and what was found."""


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
    if len(payload) < _IMAGE_HEADER.size:
        raise RecordError(f"an image record needs {_IMAGE_HEADER.size} bytes of header, found {len(payload)}")
    flag, label, number, _ = _IMAGE_HEADER.unpack_from(payload)
    start = _IMAGE_HEADER.size + 4 * flag
    if len(payload) < start:
        raise RecordError(f"header announces {flag} labels, but the record has only {len(payload)} bytes")
    labels = np.frombuffer(payload, "<f4", flag, _IMAGE_HEADER.size) if flag else np.float32([label])
    return ImageRecord(labels, number, payload[start:])


def image_of_record(payload):
    """The encoded image in the payload of a record: ``unpack_image_record(payload).image``, sooner."""
    if len(payload) < _IMAGE_HEADER.size:
        return unpack_image_record(payload).image  # which says what is wrong
    flag, = _FLAG.unpack_from(payload)
    return payload[_IMAGE_HEADER.size + 4 * flag:]


def pack_image_record(label, image: bytes, number: int) -> bytes:
    """Payload of an image record, byte for byte what ``mxnet.recordio.pack`` makes.

    Args:
        label: one number, or a sequence of numbers (then ``flag`` is their count).
    """
    if np.ndim(label) == 0:
        return _IMAGE_HEADER.pack(0, label, number, 0) + image
    labels = np.asarray(label, "<f4")
    return _IMAGE_HEADER.pack(labels.size, 0.0, number, 0) + labels.tobytes() + image


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
        if cflag == _WHOLE:
            return payload
        if cflag != _FIRST:
            raise RecordError(f"{self.path}: offset {offset} is inside a record (part flag {cflag}), not at its start")
        parts = [payload]
        while cflag != _LAST:
            part_offset = end
            cflag, payload, end = self._part(part_offset)
            if cflag not in (_MIDDLE, _LAST):
                raise RecordError(f"{self.path}: the record at offset {offset} breaks off at {part_offset} "
                                  f"(part flag {cflag} instead of 2 or 3)")
            parts.append(payload)
        return _MAGIC_BYTES.join(parts)

    def _part(self, offset: int):
        """(cflag, payload, offset of the next part)."""
        start = offset + _PART_HEADER.size
        if offset < 0 or offset % 4 or start > self.size:
            raise RecordError(f"{self.path}: no record can start at offset {offset} of {self.size} bytes: "
                              "the .rec is cut short or the .idx belongs to another pack")
        magic, word = _PART_HEADER.unpack_from(self.bytes, offset)
        if magic != MAGIC:
            raise RecordError(f"{self.path}: found {magic:#010x} at offset {offset} where a record should start "
                              f"({MAGIC:#010x}): the .rec is damaged or the .idx belongs to another pack")
        end = start + (word & _LENGTH_MASK)
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
            plain = (words[first] == MAGIC) & (words[first + 1] >> 29 == _WHOLE)
            plain &= (words[first + 1] & _LENGTH_MASK) >= _IMAGE_HEADER.size + 4 * flag
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


class RecordWriter:
    """Writes a ``.rec``/``.idx`` pair, byte for byte as ``mxnet.recordio.MXIndexedRecordIO`` does.

    Both files appear under their names when the ``with`` block ends without an exception, and
    not at all otherwise.

    Example:
        >>> with RecordWriter("train.rec") as pack:
        ...     pack.write(0, pack_image_record(label=3, image=jpeg, number=0))
    """

    def __init__(self, rec_path):
        self.paths = Path(rec_path), Path(rec_path).with_suffix(".idx")
        self._partial = [path.with_name(path.name + ".partial") for path in self.paths]

    def __enter__(self):
        self._rec, self._idx = (open(path, "wb") for path in self._partial)
        return self

    def __exit__(self, error_type, *_):
        self._rec.close()
        self._idx.close()
        for partial, path in zip(self._partial, self.paths):
            if error_type is None:
                os.replace(partial, path)
            else:
                partial.unlink()

    def write(self, key: int, payload: bytes):
        """Append one record under ``key``."""
        self._idx.write(b"%d\t%d\n" % (key, self._rec.tell()))
        cuts = _aligned_magic(payload)
        starts = [0, *(cut + 4 for cut in cuts)]
        ends = [*cuts, len(payload)]
        for i, (start, end) in enumerate(zip(starts, ends)):
            if not cuts:
                cflag = _WHOLE
            else:
                cflag = _FIRST if i == 0 else _LAST if i == len(cuts) else _MIDDLE
            length = end - start
            if length > _LENGTH_MASK:
                raise RecordError(f"record {key} has a part of {length} bytes; RecordIO holds up to {_LENGTH_MASK}")
            self._rec.write(_PART_HEADER.pack(MAGIC, cflag << 29 | length))
            self._rec.write(payload[start:end])
            self._rec.write(bytes(-length % 4))


def _aligned_magic(payload: bytes) -> list[int]:
    """Positions of the magic number in ``payload`` that are multiples of 4."""
    cuts, position = [], payload.find(_MAGIC_BYTES)
    while position >= 0:
        if position % 4 == 0:
            cuts.append(position)
        position = payload.find(_MAGIC_BYTES, position + (4 if position % 4 == 0 else 1))
    return cuts
