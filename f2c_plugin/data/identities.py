"""The identity of every image of a pack, and the images of every identity."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from f2c_plugin.data.image_sizes import IMAGE_SIZE, has_other_size
from f2c_plugin.data.recordio import FLOAT32_EXACT, Float32s, Int64s, RecordFile
from f2c_plugin.errors import InputError, RecordError

Ints = NDArray[np.int32 | np.int64]
Labels = Sequence[int] | NDArray[Any] | Tensor

UNUSABLE = -1
NO_CONFLICT = np.zeros(2, np.int64)


@dataclass(frozen=True)
class IdentityIndex:
    """The images of a pack and their identities. Packs may skip identities, or have some without images."""

    keys: Int64s  # (images,) record number of each image in the pack
    offsets: Int64s  # (images,) byte offset of its record
    lengths: Int64s  # (images,) bytes from there to the next record: header, image and padding
    identity: Ints  # (images,) its identity, int32; int64 if an identity does not fit int32
    numbers: Ints  # (identities,) the identities that have images, ascending, in the dtype of ``identity``
    starts: Int64s  # (identities + 1,) images ``grouped[starts[i]:starts[i + 1]]`` show ``numbers[i]``
    grouped: Ints  # (images,) positions of the images, identity by identity, int32; int64 from 2**31 images on
    unusable: Int64s  # (n, 2) key and offset of each record too damaged to show its identity or of another size; not an image
    conflict: Int64s  # (2,) identity records with images, and images whose label is not the number of theirs; 0, 0 if none

    @classmethod
    def of(cls, keys: Int64s, offsets: Int64s, lengths: Int64s, identity: Ints,
           conflict: Int64s = NO_CONFLICT) -> "IdentityIndex":
        """Group images, given by key, offset, length and identity, or UNUSABLE instead of the identity."""
        lost = identity == UNUSABLE
        unusable = np.stack([keys[lost], offsets[lost]], axis=1)
        if len(unusable):
            keys, offsets, lengths, identity = keys[~lost], offsets[~lost], lengths[~lost], identity[~lost]
        identity = identity.astype(_dtype_up_to(int(identity.max(initial=0))))
        position = _dtype_up_to(len(identity) - 1)
        if (identity[1:] >= identity[:-1]).all():  # as InsightFace writes its packs
            grouped = np.arange(len(identity), dtype=position)
        else:
            grouped = np.argsort(identity, kind="stable").astype(position)
        ordered = identity[grouped]
        first = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
        return cls(keys, offsets, lengths, identity, ordered[first], np.append(first, len(identity)), grouped, unusable,
                   conflict)

    @classmethod
    def from_labels(cls, labels: Labels) -> "IdentityIndex":
        """The index of n images that are not in a pack: image i shows identity ``labels[i]``.

        Raises InputError unless the labels are n whole numbers from 0 to 2**63 − 1.
        """
        identity = np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)
        found = f"labels are {identity.dtype} of shape {identity.shape}"
        if identity.ndim != 1 or not identity.size or identity.dtype.kind not in "iu":
            raise InputError(f"{found}: must be one whole number for each image")
        smallest, largest = int(identity.min()), int(identity.max())
        if smallest < 0 or largest >= 1 << 63:
            raise InputError(f"{found}, from {smallest} to {largest}: must be from 0 to 2**63 − 1")
        none = np.zeros(len(identity), np.int64)
        return cls.of(np.arange(len(identity)), none, none, identity.astype(np.int64, copy=False))

    def __len__(self) -> int:
        return len(self.identity)

    def describe_conflict(self) -> str | None:
        """How labels and identity records disagree; None if they do not."""
        records, images = self.conflict.tolist()
        return (f"{records} identity records, but the labels of the images are of {len(self.numbers)} identities ({images} "
                "images differ): the labels count, as in arcface_torch") if images else None

    def images_of(self, identity: int) -> Ints:
        """Positions of the images of an identity, (n,) as ``grouped``; empty if it has none."""
        first, end = (np.searchsorted(self.numbers, identity, side) for side in ("left", "right"))
        return self.grouped[self.starts[first]:self.starts[end]]


def _dtype_up_to(largest: int) -> type[np.int32 | np.int64]:
    return np.int32 if largest < 1 << 31 else np.int64


def index_identities(records: RecordFile, keys: Int64s, offsets: Int64s) -> IdentityIndex:
    """Find the images of a pack, given by its ``.rec`` and the keys and offsets in its ``.idx``, and their identities.

    Images are found as arcface_torch finds them: where record 0 is bookkeeping, labelled [one past the
    last image, …], they are records 1 to there; else every record is an image. An image's own label is
    its identity; images without a readable label, or of another size than 112 × 112, are set aside.

    InsightFace packs have identity records, too: record 0 is labelled [first identity record, one past the
    last], and each of them [first image, one past the last]. face2rec2 opens one at every change of label, so
    an identity can have several. They are checked against the labels, and decide only where these
    cannot: for damaged images, and where float32 cannot keep the labels distinct.

    Raises RecordError if the pack holds no images of the right size, lacks images that record 0 announces or has
    a damaged identity record, its labels are not identities, or are too large for float32 to keep them distinct.
    """
    table = _KeyTable(records, keys, offsets)
    ordered = np.sort(offsets)
    lengths = np.append(ordered[1:], records.size)[np.searchsorted(ordered, offsets)] - offsets
    header = table.header()
    if header is None:
        return _index(records, keys, offsets, lengths, _identities_by_label(records, offsets), NO_CONFLICT)

    if not np.isfinite(header).all():
        raise RecordError(f"{records.path}: record 0 announces identity records {header[0]} to {header[1]}: "
                          "the pack's bookkeeping is damaged")
    first, end = int(header[0]), int(header[1])
    if not 1 < first <= len(keys) + np.spacing(np.float32(first)):
        missing = np.setdiff1d(np.arange(1, len(keys) + 1), keys)
        raise RecordError(f"{records.path}: record 0 announces images 1 to {first - 1}, but there are {len(keys)} records" + (
                          f", without record {missing[0]}" if len(missing) else "") +
                          ": the pack is empty, incomplete or damaged. Make it again")
    # Numbers in the bookkeeping are float32 and round above 2**24: record 0 may be a few records off,
    # and identity records may name the wrong neighbour. The labels of the images are exact, because
    # identities are smaller numbers.
    exact = first < FLOAT32_EXACT
    if not exact:
        first = _first_identity_record(table, first) if end >= first else len(keys)
    images = np.arange(1, first)
    position = table.positions(images)
    # Elsewhere, the second number is that of the identities, here or in the pack of which this is a part.
    ranges = _identities_by_range(table, first, end) if exact and table.is_identity_record(first) else None
    identity, conflict = _identities(records, offsets[position], ranges)
    return _index(records, images, offsets[position], lengths[position], identity, conflict)


def _index(records: RecordFile, keys: Int64s, offsets: Int64s, lengths: Int64s, identity: Int64s,
           conflict: Int64s) -> IdentityIndex:
    _refuse_detection_labels(records, offsets)
    _refuse_bookkeeping(records, keys, offsets)
    other_size = has_other_size(records, offsets)
    identity = np.where(other_size, UNUSABLE, identity)
    if (identity == UNUSABLE).all():
        raise RecordError(f"{records.path}: no image has {IMAGE_SIZE} × {IMAGE_SIZE} pixels: make the pack from aligned faces, "
                          "or with f2c-plugin pack --resize")
    return IdentityIndex.of(keys, offsets, lengths, identity, conflict)


def _refuse_detection_labels(records: RecordFile, offsets: Int64s) -> None:
    """Raise RecordError if the labels are those of object detection, where the first number is a count.

    mxnet's are [length of the header, length of an object, …, objects]; others are [number of objects, objects].
    """
    sample = offsets[np.linspace(0, len(offsets) - 1, min(len(offsets), 100)).astype(int)].tolist()
    labels: list[list[float]] = [records.image_record(offset).labels.tolist() for offset in sample
                                 if not records.damage(offset)]
    if max(map(len, labels), default=0) <= 5:
        return
    longest = max(labels, key=len)
    count, width = longest[:2]
    of_mxnet = count >= 2 and width >= 5 and all(each[:2] == [count, width] and (len(each) - count) % width == 0
                                                 for each in labels)
    width = (len(longest) - 1) / (count or np.inf)
    counted = width >= 4 and len({*map(len, labels)}) > 1 and all(len(each) - 1 == each[0] * width for each in labels)
    if of_mxnet or counted:
        raise RecordError(f"{records.path}: the labels are those of object detection: they begin with a count (the first with "
                          f"{labels[0][0]:g}), where packs for recognition have the identity. Pack one face per image")


def _refuse_bookkeeping(records: RecordFile, keys: Int64s, offsets: Int64s) -> None:
    """Raise RecordError if there is bookkeeping among the images, because record 0 is missing or announces too many."""
    has_image = np.zeros(len(offsets), bool)
    for positions, _, _ in records.image_spans(offsets):
        has_image[positions] = True
    without = np.flatnonzero(~has_image)
    several = without[~np.isnan(records.labels(offsets[without], count=2)[:, 1])]
    for i in several.tolist():
        if not records.damage(int(offsets[i])) and not len(records.image_record(int(offsets[i])).image):
            raise RecordError(f"{records.path}: record {keys[i]} is bookkeeping (several labels, no image), but "
                              "stands where images should: record 0 is wrong, or the .idx lacks it. Move the .idx away, and "
                              "`f2c-plugin reindex` makes another one; if it is of no help, make the pack again")


def _identities(records: RecordFile, offsets: Int64s, ranges: tuple[int, Int64s | None] | None) -> tuple[Int64s, Int64s]:
    """Identity of each image, and the conflict of labels and identity records (see IdentityIndex).

    ``ranges`` are the identity records, if there are any, as from ``_identities_by_range``.
    """
    count, of_records = ranges or (0, None)
    try:
        labels = _identities_by_label(records, offsets)
    except _RoundedLabels:
        if of_records is None:
            raise
        return of_records, NO_CONFLICT
    if of_records is None:
        return labels, np.array([count, len(labels) if count else 0])
    readable = labels != UNUSABLE
    differ = np.count_nonzero(labels[readable] != of_records[readable])
    if not differ:
        return of_records, NO_CONFLICT
    # A damaged image has the label of the first readable one of its identity record.
    label_of_record = np.full(of_records.max() + 1, UNUSABLE)
    label_of_record[of_records[readable][::-1]] = labels[readable][::-1]
    return np.where(readable, labels, label_of_record[of_records]), np.array([len(np.unique(of_records)), differ])


class _RoundedLabels(RecordError):
    """Float32 has rounded the labels, so they do not tell identities apart."""


class _KeyTable:
    """Finds the records of a pack by key. Raises RecordError if a key occurs twice."""

    def __init__(self, records: RecordFile, keys: Int64s, offsets: Int64s):
        self.records, self.keys, self.offsets = records, keys, offsets
        self.idx_path = records.path.with_suffix(".idx")
        self.order = None
        if np.array_equal(keys, np.arange(len(keys))):
            return  # a key is its own position, as in most packs
        self.order = np.argsort(keys, kind="stable")
        ordered = keys[self.order]
        repeated = ordered[1:][ordered[1:] == ordered[:-1]]
        if len(repeated):
            raise RecordError(f"{self.idx_path}: key {repeated[0]} occurs twice: move the file away, and "
                              "`f2c-plugin reindex` makes another one from the .rec")

    def positions(self, wanted: Int64s) -> Int64s:
        """Where the keys ``wanted`` (n,) stand in the ``.idx``, int64 (n,). Raises RecordError if one is missing."""
        position, found = self.find(wanted)
        if not found.all():
            raise RecordError(f"{self.idx_path}: lacks record {wanted[~found][0]} ({np.count_nonzero(~found)} such records), "
                              "which record 0 announces. Make the pack again, without images that cannot be read: "
                              "face2rec2 counts them, but does not write them")
        return position

    def header(self) -> Float32s | None:
        """The first two labels of record 0 if it is bookkeeping; None if it is an image or missing.

        Bookkeeping has two labels or more and, as a rule, no image. With one, it has a number that fits the pack, or
        not as many labels as the images.
        """
        position, found = self.find(np.array([0]))
        if not found[0]:
            return None
        record = self.records.image_record(int(self.offsets[position[0]]))
        labels = record.labels[:2]
        if len(labels) < 2 or (len(record.image) and len(self.keys) not in labels
                               and len(record.labels) in self._label_counts(without=position[0])):
            return None
        return labels

    def _label_counts(self, without: np.int64) -> set[int]:
        """How many labels intact records have, in a sample that leaves out the one at position ``without``."""
        offsets = np.delete(self.offsets[:9], without if without < 9 else []).tolist()
        return {len(self.records.image_record(offset).labels) for offset in offsets if not self.records.damage(offset)}

    def is_identity_record(self, key: int) -> bool:
        """Whether a record has two labels or more and no image. Raises RecordError if it is damaged."""
        position, found = self.find(np.array([key]))
        record = self.records.image_record(int(self.offsets[position[0]])) if found[0] else None
        return record is not None and len(record.labels) >= 2 and not len(record.image)

    def find(self, wanted: Int64s) -> tuple[Int64s, NDArray[np.bool_]]:
        """Positions, and which of them are valid because the key exists."""
        if self.order is None:
            return wanted, (wanted >= 0) & (wanted < len(self.keys))
        nearest = np.searchsorted(self.keys, wanted, sorter=self.order)
        position = self.order[np.minimum(nearest, len(self.order) - 1)]
        return position, self.keys[position] == wanted


def _first_identity_record(table: _KeyTable, rounded: int) -> int:
    """The key of the first identity record, which float32 has rounded to ``rounded``."""
    error = int(np.spacing(np.float32(rounded)))
    for key in range(rounded - error, rounded + error + 1):
        if table.is_identity_record(key):
            return key
    raise RecordError(f"{table.records.path}: record 0 announces identity records from about {rounded} on, but there are none: "
                      "the pack's bookkeeping is damaged")


def _identities_by_range(table: _KeyTable, first: int, end: int) -> tuple[int, Int64s | None]:
    """The number of identity records, first … end − 1, and the identities of images 1 … first − 1 from their image ranges.

    Without identities if a record is missing, or the ranges do not cover the images exactly once. Raises RecordError if
    a record is damaged.
    """
    keys = np.arange(first, min(end, first + len(table.keys)))
    position, found = table.find(keys)
    keys, offsets = keys[found], table.offsets[position[found]]
    ranges = table.records.labels(offsets, count=2)
    for i in np.flatnonzero(np.isnan(ranges[:, 0])):
        if error := table.records.damage(int(offsets[i])):
            raise RecordError(f"{error}; record {keys[i]} is an identity record: without it, the identity of its images is "
                              "unknown")
    invalid = ~(np.abs(ranges) < 2.0**53)  # not finite, or beyond any record number
    start, stop = np.where(invalid, -1, ranges).astype(np.int64).T
    sizes = stop - start
    order = np.argsort(start, kind="stable")
    order = order[sizes[order] > 0]
    # Valid ranges follow on one another, from the first image to the last.
    if not found.all() or (sizes < 0).any() or not np.array_equal(np.append(start[order], first), np.append([1], stop[order])):
        return len(keys), None
    return len(keys), np.repeat(order, sizes[order])


def _identities_by_label(records: RecordFile, offsets: Int64s) -> Int64s:
    """Identity of each image, from the label in its record; UNUSABLE where the record is damaged."""
    labels = records.labels(offsets)[:, 0]
    unreadable = np.isnan(labels)
    unreadable[unreadable] = [records.damage(int(offset)) is not None for offset in offsets[unreadable]]
    if unreadable.mean() > 0.5:  # too many for damage: the .idx is wrong
        records.image_record(int(offsets[unreadable][0]))  # raises what is wrong
    labels[unreadable] = UNUSABLE
    bad = np.flatnonzero(~unreadable & ~(np.isfinite(labels) & (labels >= 0) & (labels == np.floor(labels))))
    if len(bad):
        raise RecordError(f"{records.path}: the record at offset {offsets[bad[0]]} has the label {labels[bad[0]]} ({len(bad)} "
                          "such records), but identities must be whole numbers from 0: `f2c-plugin convert` writes others, "
                          "from a list")
    identities = labels.astype(np.int64)
    rounded = np.flatnonzero(labels >= FLOAT32_EXACT)
    if len(rounded):
        identities[rounded] = wide = records.wide_identities(offsets[rounded])
        lost = wide.astype(np.float32) != labels[rounded]
        if lost.any():
            raise _RoundedLabels(f"{records.path}: labels go up to {labels.max():.0f}, but float32 cannot keep identities from "
                              f"{FLOAT32_EXACT} on apart, and {np.count_nonzero(lost)} images lack the identity in the "
                              "header's id2: `f2c-plugin convert` adds it, from the list that the pack was made of")
    return identities
