"""Where the benchmarks' images come from: unseen packs, wrong labels and split identities."""

import shutil
import tempfile
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
import simplejpeg

from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.data.recordio import Int64s, image_of_record
from f2c_plugin.data.writer import write_insightface_pack, write_property
from f2c_plugin.trainer.checkpoint import pack_digest


def unseen(data: Path) -> Path:
    """Folder of the people that TAR and AUC are measured on."""
    return data.with_name(data.name + "_unseen")


def with_wrong_labels(labels: Int64s, share: float, rng: np.random.Generator) -> Int64s:
    """Give a share of the images the label of another identity, each as likely. Labels int64 (n,) are 0 … identities − 1."""
    wrong = rng.permutation(len(labels))[:round(share * len(labels))]
    identities = int(labels.max()) + 1
    labels = labels.copy()
    if identities > 1:
        labels[wrong] = (labels[wrong] + 1 + rng.integers(identities - 1, size=len(wrong))) % identities
    return labels


def with_split_identities(labels: Int64s, share: float, rng: np.random.Generator) -> Int64s:
    """Split a share of the identities with several images: half of the images of each take a new label, above all others."""
    counts = np.bincount(labels)
    several = rng.permutation(np.flatnonzero(counts > 1))
    split = several[:round(share * len(several))]
    new_label = np.full(len(counts), -1)
    new_label[split] = len(counts) + np.arange(len(split))
    images = rng.permutation(np.flatnonzero(new_label[labels] >= 0))
    images = images[np.argsort(labels[images], kind="stable")]  # identity by identity, each in random order
    first = np.searchsorted(labels[images], labels[images])  # of the identity
    moved = images[np.arange(len(images)) - first < counts[labels[images]] // 2]
    labels = labels.copy()
    labels[moved] = new_label[labels[moved]]
    return labels


def spoiled(labels: Int64s, wrong_labels: float, split: float, seed: int) -> Int64s:
    """Labels int64 (n,) with a share of the identities split in two, and then a share of the labels changed at random."""
    rng = np.random.default_rng(seed)
    return with_wrong_labels(with_split_identities(labels, split, rng), wrong_labels, rng)


def spoiled_pack(data: Path, wrong_labels: float, split: float, seed: int = 0) -> Path:
    """A copy of the pack in ``data`` with ``spoiled`` labels, beside it; made unless it is there.

    Its verification sets are those of the pack. Raises RecordError if the pack cannot be read.
    """
    dataset = RecordDataset(data)
    index = dataset.index
    folder = data.with_name(f"{data.name}_wrong-{wrong_labels:g}_split-{split:g}_seed-{seed}_{pack_digest(index)[:8]}")
    if folder.is_dir():
        return folder
    labels = spoiled(np.searchsorted(index.numbers, index.identity).astype(np.int64), wrong_labels, split, seed)
    offsets = index.offsets[np.argsort(labels, kind="stable")].tolist()
    images = (bytes(image_of_record(dataset.records.read(offset))) for offset in offsets)
    return _written(folder, data, images, np.bincount(labels).tolist())


def with_copies(data: Path, share: float, seed: int = 0) -> Path:
    """A copy of the pack in ``data``, beside it, with a share of the images replaced; made unless it is there.

    Each is replaced by another image of its identity, moved by a pixel and encoded anew; one of each identity stays. Its
    verification sets are those of the pack. Raises RecordError if the pack cannot be read.
    """
    dataset = RecordDataset(data)
    index = dataset.index
    folder = data.with_name(f"{data.name}_copies-{share:g}_seed-{seed}_{pack_digest(index)[:8]}")
    if folder.is_dir():
        return folder
    rng = np.random.default_rng(seed)
    origin = np.arange(len(index))
    for start, end in pairwise(index.starts.tolist()):
        images = rng.permutation(index.grouped[start:end])
        copies = min(round(share * len(images)), len(images) - 1)
        origin[images[:copies]] = rng.choice(images[copies:], copies)
    moved = (simplejpeg.encode_jpeg(np.roll(dataset.face(i), rng.choice([-1, 1]), rng.integers(2)), 90, "RGB", "420")
             if origin[position] != position else bytes(image_of_record(dataset.records.read(int(index.offsets[position]))))
             for position in index.grouped.tolist() for i in [int(origin[position])])
    return _written(folder, data, moved, np.diff(index.starts).tolist())


def _written(folder: Path, data: Path, images: Iterable[bytes], sizes: list[int]) -> Path:
    """A pack of images, identity by identity, with the verification sets of another; whole or not at all."""
    with tempfile.TemporaryDirectory(prefix=".spoiled-", dir=folder.parent) as work:
        made = Path(work, "pack")
        made.mkdir()
        write_property(made, len(sizes))
        write_insightface_pack(made / "train.rec", images, sizes)
        for file in data.glob("*.bin"):
            shutil.copyfile(file, made / file.name)
        made.rename(folder)
    return folder
