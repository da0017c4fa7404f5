"""Packs with images of low quality: a share of the images is worse, everything else as it was."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.synthetic.dataset import write_dataset
from tests.runs import IDENTITIES, IMAGES


@pytest.fixture
def low_quality(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    return importlib.import_module("low_quality")


def faces_of(folder):
    """uint8 (n, 112, 112, 3), and labels."""
    dataset = RecordDataset(folder)
    return [each.numpy() for each in dataset.faces(np.arange(len(dataset)))]


def detail(faces):
    """How much neighbouring pixels of each face differ."""
    return np.abs(np.diff(faces.astype(float), axis=2)).mean((1, 2, 3))


def test_a_share_of_the_images_loses_its_detail_and_all_else_stays(low_quality, faces, tmp_path):
    data = tmp_path / "pack"
    data.symlink_to(faces)
    write_dataset(tmp_path / "pack_unseen", 3, 4, num_pairs=2, seed=1, processes=1)
    made = low_quality.low_quality_pack(data, 0.25, seed=2)
    before, labels = faces_of(data)
    after, labels_after = faces_of(made)
    assert (labels == labels_after).all() and (made / "synth.bin").read_bytes() == (faces / "synth.bin").read_bytes()
    changed = (before != after).any((1, 2, 3))
    assert changed.sum() == IDENTITIES * IMAGES / 4
    left = detail(after[changed]) / detail(before[changed])
    assert left.max() < 0.95 and np.median(left) < 0.6
    unseen = faces_of(tmp_path / f"{made.name}_unseen")[0]
    assert (unseen != faces_of(tmp_path / "pack_unseen")[0]).any((1, 2, 3)).sum() == 3

    time = (made / "train.rec").stat().st_mtime_ns
    assert low_quality.low_quality_pack(data, 0.25, seed=2) == made and (made / "train.rec").stat().st_mtime_ns == time
    assert low_quality.low_quality_pack(data, 0.5, seed=2) != made
    assert not list(tmp_path.glob(".low-quality-*"))
