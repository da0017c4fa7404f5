"""Who is on which image of a pack: the identity of every image, and the images of every identity."""

from dataclasses import dataclass

import numpy as np

from f2c_plugin.data.recordio import RecordError, RecordFile, unpack_image_record

# float32 holds every whole number up to here; above, neighbours collapse into one value.
FLOAT32_EXACT = 1 << 24


@dataclass
class IdentityIndex:
    """The images of a pack and their identities.

    Attributes:
        keys: int64 (images,) record number of each image in the pack.
        offsets: int64 (images,) byte offset of its record.
        identity: int64 (images,) its identity.
        numbers: int64 (identities,) the identities that have images, ascending. Packs may leave
            gaps between identity numbers, or have identities without images.
        starts: int64 (identities + 1,) images ``grouped[starts[i]:starts[i + 1]]`` show ``numbers[i]``.
        grouped: int64 (images,) positions of the images, identity by identity.
    """

    keys: np.ndarray
    offsets: np.ndarray
    identity: np.ndarray

    def __post_init__(self):
        self.grouped = np.argsort(self.identity, kind="stable")
        self.numbers, first = np.unique(self.identity[self.grouped], return_index=True)
        self.starts = np.append(first, len(self.identity))

    def __len__(self):
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
    labels are the identities.

    Args:
        records: the ``.rec``.
        keys, offsets: its ``.idx``, as ``read_idx`` returns it.
    Raises:
        RecordError: the pack holds no images, its bookkeeping contradicts itself, or float32
            labels cannot tell its identities apart.
    """
    order = np.argsort(keys, kind="stable")
    if (np.diff(keys[order]) == 0).any():
        twice = keys[order][:-1][np.diff(keys[order]) == 0][0]
        raise RecordError(f"{records.path.with_suffix('.idx')}: key {twice} stands there twice")

    def at(wanted):
        """Positions of record numbers in ``keys``."""
        found = np.searchsorted(keys, wanted, sorter=order)
        position = order[np.minimum(found, len(order) - 1)]
        missing = keys[position] != wanted
        if missing.any():
            raise RecordError(f"{records.path.with_suffix('.idx')}: record {np.asarray(wanted)[missing][0]}, "
                              "which the pack's bookkeeping announces, has no entry")
        return position

    bounds = _identity_record_range(records, keys, offsets)
    if bounds is None:
        return IdentityIndex(keys, offsets, _identities_by_label(records, offsets))

    first, end = bounds
    images = np.arange(1, first)
    if not len(images) or end <= first:
        raise RecordError(f"{records.path}: record 0 announces images 1 to {first - 1} and identity records "
                          f"{first} to {end - 1}: the pack is empty")
    image_offsets = offsets[at(images)]
    if first > FLOAT32_EXACT:
        # The ranges in identity records are float32 and round above 2**24: they may name the wrong
        # neighbour. The images' own labels are small numbers and exact.
        return IdentityIndex(images, image_offsets, _identities_by_label(records, image_offsets))

    ranges = records.labels(offsets[at(np.arange(first, end))], count=2).astype(np.int64)
    covered = np.repeat(ranges[:, 0], sizes := np.maximum(ranges[:, 1] - ranges[:, 0], 0))
    covered += np.arange(len(covered)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    identity = np.full(first, -1)
    inside = (covered >= 1) & (covered < first)
    identity[covered[inside]] = np.repeat(np.arange(len(sizes)), sizes)[inside]
    if not inside.all() or len(covered) != len(images) or (identity[1:] < 0).any():
        raise RecordError(f"{records.path}: the {len(sizes)} identity records do not share out images 1 to {first - 1} "
                          f"among them (they cover {len(covered)}): the pack's bookkeeping is damaged")
    return IdentityIndex(images, image_offsets, identity[1:])


def _identity_record_range(records, keys, offsets):
    """(first identity record, one past the last) of an InsightFace pack, or None for other packs."""
    zero = np.flatnonzero(keys == 0)
    if not len(zero):
        return None
    record = unpack_image_record(records.read(int(offsets[zero[0]])))
    # An image with two labels also has flag 2; bookkeeping records carry no image.
    if len(record.labels) != 2 or len(record.image):
        return None
    return int(record.labels[0]), int(record.labels[1])


def _identities_by_label(records, offsets):
    labels = records.labels(offsets)[:, 0]
    if not np.isfinite(labels).all() or (labels < 0).any() or (labels != np.floor(labels)).any():
        bad = labels[~(np.isfinite(labels) & (labels >= 0) & (labels == np.floor(labels)))][0]
        raise RecordError(f"{records.path}: found the label {bad}; identities must be whole numbers from 0")
    if labels.max() >= FLOAT32_EXACT:
        raise RecordError(f"{records.path}: labels go up to {labels.max():.0f}, but the pack stores them as float32, "
                          f"which cannot tell identities from {FLOAT32_EXACT} on apart. Number the identities from 0, "
                          "or write the pack with identity records")
    return labels.astype(np.int64)
