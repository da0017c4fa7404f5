"""Who is on which image of a pack: the identity of every image, and the images of every identity."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from f2c_plugin.data.recordio import RecordFile, unpack_image_record
from f2c_plugin.errors import RecordError

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
        identity: int32 (images,) its identity.
        numbers: int32 (identities,) the identities that have images, ascending. Packs may leave
            gaps between identity numbers, or have identities without images.
        starts: int64 (identities + 1,) images ``grouped[starts[i]:starts[i + 1]]`` show ``numbers[i]``.
        grouped: int32 (images,) positions of the images, identity by identity; int64 from 2**31 images on.
        unreadable: int64 (n, 2) number and byte offset of each record that is so damaged that its
            identity is unknown. They are not among the images.
    """

    keys: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    identity: np.ndarray
    numbers: np.ndarray
    starts: np.ndarray
    grouped: np.ndarray
    unreadable: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray, offsets: np.ndarray, lengths: np.ndarray, identity: np.ndarray) -> "IdentityIndex":
        """Group images, each given by its key, offset, length and identity, or UNREADABLE in place of that."""
        lost = identity == UNREADABLE
        unreadable = np.stack([keys[lost], offsets[lost]], axis=1)
        if len(unreadable):
            keys, offsets, lengths, identity = (array[~lost] for array in (keys, offsets, lengths, identity))
        identity = identity.astype(np.int32)
        position = np.int32 if len(identity) < 1 << 31 else np.int64
        if (identity[1:] >= identity[:-1]).all():  # as InsightFace writes its packs
            grouped = np.arange(len(identity), dtype=position)
        else:
            grouped = np.argsort(identity, kind="stable").astype(position)
        ordered = identity[grouped]
        first = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
        return cls(keys, offsets, lengths, identity, ordered[first], np.append(first, len(identity)), grouped,
                   unreadable)

    @classmethod
    def from_labels(cls, identities: NDArray[np.integer]) -> "IdentityIndex":
        """The index of images in memory, whose identities (images,) are given; there are no records."""
        position = np.arange(len(identities))
        nowhere = np.zeros(len(identities), np.int64)
        return cls.of(position, nowhere, nowhere, identities)

    def __len__(self) -> int:
        return len(self.identity)

    def images_of(self, identity: int) -> np.ndarray:
        """Positions of the images of one identity, int64; empty if it has none."""
        i = np.searchsorted(self.numbers, identity)
        if i == len(self.numbers) or self.numbers[i] != identity:
            return self.grouped[:0]
        return self.grouped[self.starts[i]:self.starts[i + 1]]


def index_identities(records: RecordFile, keys: np.ndarray, offsets: np.ndarray) -> IdentityIndex:
    """Find the images of a pack and their identities.

    InsightFace packs say it in their bookkeeping: record 0 is labelled [first identity record, one
    past the last], each identity record [first image, one past the last], and identities are
    numbered in the order of their records. In every other pack, all records are images and their
    labels are the identities; a record without a readable label is set aside.

    Args:
        records: the ``.rec``.
        keys, offsets: its ``.idx``, as ``read_idx`` returns it.
    Raises:
        RecordError: the pack holds no images, its bookkeeping contradicts itself, or float32
            labels cannot tell its identities apart.
    """
    find = _KeyTable(keys, records.path.with_suffix(".idx"))
    lengths = _lengths(offsets, records.size)
    bounds = _identity_record_range(records, find, offsets)
    if bounds is None:
        return IdentityIndex.of(keys, offsets, lengths, _identities_by_label(records, offsets))

    first, end = bounds
    if not 1 < first < end <= len(keys) + np.spacing(np.float32(end)):
        raise RecordError(f"{records.path}: record 0 announces images 1 to {first - 1} and identity records {first} to "
                          f"{end - 1}, and there are {len(keys)} records: the pack is empty, or its bookkeeping damaged")
    if first >= FLOAT32_EXACT:
        # Numbers in the bookkeeping are float32 and round above 2**24: record 0 may be a few records
        # off, and identity records may name the wrong neighbour. Images are exact in their own
        # labels, which are small numbers.
        images = np.arange(1, _first_identity_record(records, find, offsets, first))
        position = find(images)
        identity = _identities_by_label(records, offsets[position])
    else:
        images = np.arange(1, first)
        position = find(images)
        people = np.arange(first, end)
        offsets_of_people = offsets[find(people)]
        ranges = records.labels(offsets_of_people, count=2)
        _raise_for_damage(records, people, offsets_of_people, ranges)
        identity = _identities_by_range(ranges, first, records.path)
    return IdentityIndex.of(images, offsets[position], lengths[position], identity)


def _raise_for_damage(records, keys, offsets, labels):
    """Say what is wrong with the first record whose labels are NaN because it cannot be read."""
    for i in np.flatnonzero(np.isnan(labels[:, 0])):
        if error := records.damage(int(offsets[i])):
            raise RecordError(f"{error}; record {keys[i]} is an identity record, without which nobody knows who is on which image")


class _KeyTable:
    """Positions of record numbers in the ``.idx``.

    Raises:
        RecordError: a number stands there twice, or one that is asked for is missing.
    """

    def __init__(self, keys, path):
        self.keys, self.path = keys, path
        self.order = None
        if np.array_equal(keys, np.arange(len(keys))):
            return  # a key is its own position, as in most packs
        self.order = np.argsort(keys, kind="stable")
        ordered = keys[self.order]
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        if len(twice):
            raise RecordError(f"{path}: key {twice[0]} stands there twice")

    def __contains__(self, key):
        return bool((self.keys == key).any())

    def __call__(self, wanted):
        if self.order is None:
            position = wanted
            missing = (wanted < 0) | (wanted >= len(self.keys))
        else:
            found = np.searchsorted(self.keys, wanted, sorter=self.order)
            position = self.order[np.minimum(found, len(self.order) - 1)]
            missing = self.keys[position] != wanted
        if missing.any():
            raise RecordError(f"{self.path}: record {wanted[missing][0]}, which the pack's bookkeeping announces, "
                              "has no entry")
        return position


def _lengths(offsets, size):
    """Bytes from each record to the next in the file, which has ``size`` bytes."""
    ordered = np.sort(offsets)
    return np.append(ordered[1:], size)[np.searchsorted(ordered, offsets)] - offsets


def _bookkeeping(records, offset):
    """The two labels of a bookkeeping record, float32 (2,); None for an image, which may have two labels, too."""
    record = unpack_image_record(records.read(int(offset)))
    return record.labels if len(record.labels) == 2 and not len(record.image) else None


def _identity_record_range(records, find, offsets):
    """(first identity record, one past the last) of an InsightFace pack, or None for other packs."""
    bounds = _bookkeeping(records, offsets[find(np.array([0]))[0]]) if 0 in find else None
    if bounds is None:
        return None
    if not np.isfinite(bounds).all():
        raise RecordError(f"{records.path}: record 0 announces identity records {bounds[0]} to {bounds[1]}: "
                          "the pack's bookkeeping is damaged")
    return int(bounds[0]), int(bounds[1])


def _first_identity_record(records, find, offsets, rounded):
    """The number of the first identity record, given what float32 made of it."""
    off = int(np.spacing(np.float32(rounded)))
    for key in range(rounded - off, rounded + off + 1):
        if key in find and _bookkeeping(records, offsets[find(np.array([key]))[0]]) is not None:
            return key
    raise RecordError(f"{records.path}: record 0 announces identity records from about {rounded} on, but there are none: "
                      "the pack's bookkeeping is damaged")


def _identities_by_range(ranges, first, path):
    """Identity of images 1 … first − 1, from the identity records' image ranges, float32 (identities, 2)."""
    nowhere = ~(np.abs(ranges) < 2.0**53)  # not finite, or beyond any record number
    start, end = np.where(nowhere, -1, ranges).astype(np.int64).T
    sizes = end - start
    order = np.argsort(start, kind="stable")
    order = order[sizes[order] > 0]
    # Ranges that share out the images follow on one another, from the first image to the last.
    if (sizes < 0).any() or not np.array_equal(np.append(start[order], first), np.append([1], end[order])):
        raise RecordError(f"{path}: the {len(sizes)} identity records do not share out images 1 to {first - 1} among "
                          f"them (they cover {np.maximum(sizes, 0).sum()}): the pack's bookkeeping is damaged")
    return np.repeat(order, sizes[order])


def _identities_by_label(records, offsets):
    labels = records.labels(offsets)[:, 0]
    unreadable = np.isnan(labels)
    unreadable[unreadable] = [records.damage(int(offset)) is not None for offset in offsets[unreadable]]
    if unreadable.mean() > 0.5:  # no pack with a few damaged records, but the wrong .idx
        raise records.damage(int(offsets[unreadable][0]))
    labels[unreadable] = UNREADABLE
    bad = labels[~unreadable & ~(np.isfinite(labels) & (labels >= 0) & (labels == np.floor(labels)))]
    if len(bad):
        raise RecordError(f"{records.path}: found the label {bad[0]}; identities must be whole numbers from 0")
    if labels.max() >= FLOAT32_EXACT:
        raise RecordError(f"{records.path}: labels go up to {labels.max():.0f}, but the pack stores them as float32, "
                          f"which cannot tell identities from {FLOAT32_EXACT} on apart; nor can identity records, whose "
                          "image ranges are float32, too. Number the identities without gaps, or split the pack")
    return labels.astype(np.int64)
