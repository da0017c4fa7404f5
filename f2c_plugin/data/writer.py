"""Writes packs: RecordIO byte for byte as mxnet does, in InsightFace's layout."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from f2c_plugin.data.recordio import FIRST, IMAGE_HEADER, LAST, LENGTH_MASK, MAGIC, MAGIC_BYTES, MIDDLE, PART_HEADER, WHOLE
from f2c_plugin.errors import OverwriteError, RecordError


def pack_image_record(label, image: bytes, number: int) -> bytes:
    """Payload of an image record, byte for byte what ``mxnet.recordio.pack`` makes.

    Args:
        label: one number, or a sequence of numbers (then ``flag`` is their count).
    """
    if np.ndim(label) == 0:
        return IMAGE_HEADER.pack(0, label, number, 0) + image
    labels = np.asarray(label, "<f4")
    return IMAGE_HEADER.pack(labels.size, 0.0, number, 0) + labels.tobytes() + image


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
                cflag = WHOLE
            else:
                cflag = FIRST if i == 0 else LAST if i == len(cuts) else MIDDLE
            length = end - start
            if length > LENGTH_MASK:
                raise RecordError(f"record {key} has a part of {length} bytes; RecordIO holds up to {LENGTH_MASK}")
            self._rec.write(PART_HEADER.pack(MAGIC, cflag << 29 | length))
            self._rec.write(payload[start:end])
            self._rec.write(bytes(-length % 4))


def _aligned_magic(payload: bytes) -> list[int]:
    """Positions of the magic number in ``payload`` that are multiples of 4."""
    cuts, position = [], payload.find(MAGIC_BYTES)
    while position >= 0:
        if position % 4 == 0:
            cuts.append(position)
        position = payload.find(MAGIC_BYTES, position + (4 if position % 4 == 0 else 1))
    return cuts


def refuse_to_overwrite(folder: Path) -> None:
    """Raise OverwriteError if there is a pack in ``folder``."""
    if (folder / "train.rec").exists():
        raise OverwriteError(f"{folder / 'train.rec'} exists and is not overwritten: choose another folder or remove it")


def write_insightface_pack(path, images, sizes) -> None:
    """Write ``path`` and its ``.idx`` in InsightFace's layout.

    Bookkeeping record 0, images from 1, then a record for each identity.

    Args:
        images: encoded images, identity by identity; may be an iterator.
        sizes: number of images of each identity.
    """
    firsts = np.append(1, 1 + np.cumsum(sizes))  # first image of each identity, and one past all
    images = iter(images)
    with RecordWriter(path) as pack:
        pack.write(0, pack_image_record([firsts[-1], firsts[-1] + len(sizes)], b"", 0))
        for identity, (start, end) in enumerate(zip(firsts, firsts[1:])):
            for key in range(start, end):
                pack.write(key, pack_image_record(identity, next(images), 0))
        for identity, image_range in enumerate(zip(firsts, firsts[1:])):
            pack.write(firsts[-1] + identity, pack_image_record(image_range, b"", identity))
