"""The identity of every image of a pack, and the images of every identity."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from f2c_plugin.data.recordio import Float32s, Int64s, RecordFile
from f2c_plugin.errors import InputError, RecordError

Ints = NDArray[np.int32 | np.int64]
Labels = Sequence[int] | NDArray[Any] | Tensor

# float32 holds every whole number up to here; above, neighbours collapse into one value.
FLOAT32_EXACT = 1 << 24
UNREADABLE = -1


@dataclass(frozen=True)
class IdentityIndex:
    """The images of a pack and their identities.

    Attributes:
        keys: int64 (images,) record number of each image in the pack.
        offsets: int64 (images,) byte offset of its record.
        lengths: int64 (images,) bytes from there to the next record: header, image and padding.
        identity: int32 (images,) its identity; int64 if an identity does not fit int32.
        numbers: (identities,) the identities that have images, ascending, in the dtype of ``identity``.
            Packs may skip numbers, or have identities without images.
        starts: int64 (identities + 1,) images ``grouped[starts[i]:starts[i + 1]]`` show ``numbers[i]``.
        grouped: int32 (images,) positions of the images, identity by identity; int64 from 2**31 images on.
        unreadable: int64 (n, 2) key and byte offset of each record that is too damaged to show its
            identity. These records are not among the images.
    """

    keys: Int64s
    offsets: Int64s
    lengths: Int64s
    identity: Ints
    numbers: Ints
    starts: Int64s
    grouped: Ints
    unreadable: Int64s

    @classmethod
    def of(cls, keys: Int64s, offsets: Int64s, lengths: Int64s, identity: Ints) -> "IdentityIndex":
        """Group images, given by key, offset, length and identity, or UNREADABLE instead of the identity."""
        lost = identity == UNREADABLE
        unreadable = np.stack([keys[lost], offsets[lost]], axis=1)
        if len(unreadable):
            keys, offsets, lengths, identity = keys[~lost], offsets[~lost], lengths[~lost], identity[~lost]
        identity = identity.astype(_dtype_up_to(int(identity.max(initial=0))))
        position = _dtype_up_to(len(identity) - 1)
        if (identity[1:] >= identity[:-1]).all():  # as InsightFace writes its packs
            grouped = np.arange(len(identity), dtype=position)
        else:
            grouped = np.argsort(identity, kind="stable").astype(position)
        ordered = identity[grouped]
        first = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
        return cls(keys, offsets, lengths, identity, ordered[first], np.append(first, len(identity)), grouped, unreadable)

    @classmethod
    def from_labels(cls, labels: Labels) -> "IdentityIndex":
        """The index of n images that are not in a pack: image i shows identity ``labels[i]``.

        Args:
            labels: n whole numbers from 0 to 2**63 − 1, as a list, array or tensor.
        Raises:
            InputError: the labels are not such numbers.
        """
        identity = np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)
        found = f"labels are {identity.dtype} of shape {identity.shape}"
        if identity.ndim != 1 or not identity.size or identity.dtype.kind not in "iu":
            raise InputError(f"{found}: must be one whole number for each image")
        smallest, largest = int(identity.min()), int(identity.max())
        if smallest < 0 or largest >= 1 << 63:
            raise InputError(f"{found}, from {smallest} to {largest}: must be from 0 to 2**63 − 1")
        position = np.arange(len(identity))
        none = np.zeros(len(identity), np.int64)
        return cls.of(position, none, none, identity.astype(np.int64, copy=False))

    def __len__(self) -> int:
        return len(self.identity)

    def images_of(self, identity: int) -> Ints:
        """Positions of the images of an identity, (n,) as ``grouped``; empty if it has none."""
        i = np.searchsorted(self.numbers, identity)
        if i == len(self.numbers) or self.numbers[i] != identity:
            return self.grouped[:0]
        return self.grouped[self.starts[i]:self.starts[i + 1]]


def _dtype_up_to(largest: int) -> type[np.int32 | np.int64]:
    return np.int32 if largest < 1 << 31 else np.int64


def index_identities(records: RecordFile, keys: Int64s, offsets: Int64s) -> IdentityIndex:
    """Find the images of a pack and their identities.

    InsightFace packs have bookkeeping records. Record 0 is labelled [first identity record, one past
    the last], and each identity record is labelled [first image, one past the last]. Identities are
    numbered in the order of their records. In other packs every record is an image, and its label is
    the identity; records without a readable label are set aside.

    Args:
        records: the ``.rec``.
        keys, offsets: its ``.idx``, as ``read_idx`` returns it.
    Raises:
        RecordError: the pack holds no images, its bookkeeping contradicts itself, or its labels are
            too large for float32 to keep them distinct.
    """
    table = _KeyTable(keys, records.path.with_suffix(".idx"))
    lengths = _lengths(offsets, records.size)
    bounds = _identity_record_range(records, table, offsets)
    if bounds is None:
        return IdentityIndex.of(keys, offsets, lengths, _identities_by_label(records, offsets))

    first, end = bounds
    if not 1 < first < end <= len(keys) + np.spacing(np.float32(end)):
        raise RecordError(f"{records.path}: record 0 announces images 1 to {first - 1} and identity records {first} to "
                          f"{end - 1}, but there are {len(keys)} records: the pack is empty, or its bookkeeping is damaged")
    if first >= FLOAT32_EXACT:
        # Numbers in the bookkeeping are float32 and round above 2**24: record 0 may be a few records
        # off, and identity records may name the wrong neighbour. The labels of the images are exact,
        # because identities are smaller numbers.
        images = np.arange(1, _first_identity_record(records, table, offsets, first))
        position = table.positions(images)
        identity = _identities_by_label(records, offsets[position])
    else:
        images = np.arange(1, first)
        position = table.positions(images)
        identity_records = np.arange(first, end)
        record_offsets = offsets[table.positions(identity_records)]
        ranges = records.labels(record_offsets, count=2)
        _raise_for_damage(records, identity_records, record_offsets, ranges)
        identity = _identities_by_range(ranges, first, records.path)
    return IdentityIndex.of(images, offsets[position], lengths[position], identity)


def _raise_for_damage(records: RecordFile, keys: Int64s, offsets: Int64s, labels: Float32s) -> None:
    """Raise for the first record whose labels are NaN because it cannot be read."""
    for i in np.flatnonzero(np.isnan(labels[:, 0])):
        if error := records.damage(int(offsets[i])):
            raise RecordError(f"{error}; record {keys[i]} is an identity record: without it, the identity of its images is "
                              "unknown")


class _KeyTable:
    """Positions of keys in the ``.idx``.

    Raises:
        RecordError: a key occurs twice.
    """

    def __init__(self, keys: Int64s, path: Path):
        self.keys, self.path = keys, path
        self.order = None
        if np.array_equal(keys, np.arange(len(keys))):
            return  # a key is its own position, as in most packs
        self.order = np.argsort(keys, kind="stable")
        ordered = keys[self.order]
        repeated = ordered[1:][ordered[1:] == ordered[:-1]]
        if len(repeated):
            raise RecordError(f"{path}: key {repeated[0]} occurs twice")

    def __contains__(self, key: int) -> bool:
        return bool(self._find(np.array([key]))[1].all())

    def position(self, key: int) -> int:
        """The position of one key, as ``positions``."""
        return int(self.positions(np.array([key]))[0])

    def positions(self, wanted: Int64s) -> Int64s:
        """The positions of the keys ``wanted`` (n,), int64 (n,).

        Raises:
            RecordError: a key is missing.
        """
        position, found = self._find(wanted)
        if not found.all():
            raise RecordError(f"{self.path}: lacks record {wanted[~found][0]}, which the pack's bookkeeping announces")
        return position

    def _find(self, wanted: Int64s) -> tuple[Int64s, NDArray[np.bool_]]:
        """Positions, and which of them are valid because the key exists."""
        if self.order is None:
            return wanted, (wanted >= 0) & (wanted < len(self.keys))
        nearest = np.searchsorted(self.keys, wanted, sorter=self.order)
        position = self.order[np.minimum(nearest, len(self.order) - 1)]
        return position, self.keys[position] == wanted


def _lengths(offsets: Int64s, size: int) -> Int64s:
    """Bytes from each record to the next one in a file of ``size`` bytes."""
    ordered = np.sort(offsets)
    return np.append(ordered[1:], size)[np.searchsorted(ordered, offsets)] - offsets


def _bookkeeping(records: RecordFile, offset: int) -> Float32s | None:
    """The labels of a bookkeeping record, float32 (2,); None for an image, even if it has two labels."""
    record = records.image_record(offset)
    return record.labels if len(record.labels) == 2 and not len(record.image) else None


def _identity_record_range(records: RecordFile, table: _KeyTable, offsets: Int64s) -> tuple[int, int] | None:
    """(first identity record, one past the last) of an InsightFace pack, or None for other packs."""
    bounds = _bookkeeping(records, int(offsets[table.position(0)])) if 0 in table else None
    if bounds is None:
        return None
    if not np.isfinite(bounds).all():
        raise RecordError(f"{records.path}: record 0 announces identity records {bounds[0]} to {bounds[1]}: "
                          "the pack's bookkeeping is damaged")
    return int(bounds[0]), int(bounds[1])


def _first_identity_record(records: RecordFile, table: _KeyTable, offsets: Int64s, rounded: int) -> int:
    """The key of the first identity record, which float32 has rounded to ``rounded``."""
    error = int(np.spacing(np.float32(rounded)))
    for key in range(rounded - error, rounded + error + 1):
        if key in table and _bookkeeping(records, int(offsets[table.position(key)])) is not None:
            return key
    raise RecordError(f"{records.path}: record 0 announces identity records from about {rounded} on, but there are none: "
                      "the pack's bookkeeping is damaged")


def _identities_by_range(ranges: Float32s, first: int, path: Path) -> Int64s:
    """Identities of images 1 … first − 1, from the image ranges (identities, 2) of the identity records."""
    invalid = ~(np.abs(ranges) < 2.0**53)  # not finite, or beyond any record number
    bounds = np.where(invalid, -1, ranges).astype(np.int64)
    start, end = bounds[:, 0], bounds[:, 1]
    sizes = end - start
    order = np.argsort(start, kind="stable")
    order = order[sizes[order] > 0]
    # Valid ranges follow on one another, from the first image to the last.
    if (sizes < 0).any() or not np.array_equal(np.append(start[order], first), np.append([1], end[order])):
        raise RecordError(f"{path}: the ranges of the {len(sizes)} identity records do not cover images 1 to {first - 1} "
                          f"exactly once (they hold {np.maximum(sizes, 0).sum()} images): the pack's bookkeeping is damaged")
    return np.repeat(order, sizes[order])


def _identities_by_label(records: RecordFile, offsets: Int64s) -> Int64s:
    """Identity of each image, from the label in its record; UNREADABLE where the record is damaged."""
    labels = records.labels(offsets)[:, 0]
    unreadable = np.isnan(labels)
    unreadable[unreadable] = [records.damage(int(offset)) is not None for offset in offsets[unreadable]]
    if unreadable.mean() > 0.5:  # too many for damage: the .idx is wrong
        records.image_record(int(offsets[unreadable][0]))  # raises what is wrong
    labels[unreadable] = UNREADABLE
    bad = labels[~unreadable & ~(np.isfinite(labels) & (labels >= 0) & (labels == np.floor(labels)))]
    if len(bad):
        raise RecordError(f"{records.path}: found the label {bad[0]}; identities must be whole numbers from 0")
    if labels.max() >= FLOAT32_EXACT:
        raise RecordError(f"{records.path}: labels go up to {labels.max():.0f}, but the pack stores them as float32, which "
                          f"cannot keep identities from {FLOAT32_EXACT} on apart; the image ranges of identity records "
                          "have the same limit. Number the identities without gaps, or split the pack")
    return labels.astype(np.int64)
