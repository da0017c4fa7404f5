"""The identity index and the items of a pack."""

import json
import pickle
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from f2c_plugin.data.dataset import RecordDataset, decode_face
from tests.conftest import FIXTURES, PACKS

IDENTITIES = {
    "insightface": [0, 0, 0, 1, 2, 2, 2, 2, 3, 3],
    "insightface_empty_identity": [0, 0, 2, 2, 2],
    "im2rec": [1, 0, 1, 3, 0, 1],
    "rec_builder": [0, 0, 1, 2, 2, 2],
    "array_labels": [0, 1, 1, 4],
    "multipart": [0, 0, 1, 1, 2],
    "formats": [0, 1, 2],
}


@pytest.mark.parametrize("name", PACKS)
def test_every_image_has_its_identity_in_every_kind_of_pack(name):
    assert RecordDataset(FIXTURES / name).index.identity.tolist() == IDENTITIES[name]


@pytest.mark.parametrize("name", PACKS)
def test_the_images_of_an_identity_are_all_of_its_images_and_only_those(name):
    index = RecordDataset(FIXTURES / name).index
    for identity in range(6):
        expected = [i for i, each in enumerate(IDENTITIES[name]) if each == identity]
        assert index.images_of(identity).tolist() == expected
    assert index.numbers.tolist() == sorted(set(IDENTITIES[name]))


def test_items_match_arcface_torch_up_to_random_mirroring():
    dataset = RecordDataset(FIXTURES / "rec_builder")
    plain = torch.from_numpy(dataset.face(3)).permute(2, 0, 1).float().div(255).sub(0.5).div(0.5)
    seen = set()
    for _ in range(30):
        image, label = dataset[3]
        assert image.dtype == torch.float32 and label.dtype == torch.int64 and label == 2
        seen.add("plain" if torch.equal(image, plain) else "mirrored" if torch.equal(image, plain.flip(2)) else "other")
    assert seen == {"plain", "mirrored"}


def test_a_batch_holds_the_same_faces_as_single_reads():
    dataset = RecordDataset(FIXTURES / "insightface")
    faces, identities = dataset.faces(np.array([9, 0, 4]))
    assert faces.dtype == torch.uint8 and identities.tolist() == [3, 0, 2]
    for face, i in zip(faces, (9, 0, 4), strict=True):
        assert np.array_equal(face, dataset.face(i))


def test_an_unpickled_dataset_maps_the_file_again():
    dataset = RecordDataset(FIXTURES / "insightface")
    dataset[0]
    pickled = pickle.dumps(dataset)
    assert len(pickled) < (FIXTURES / "insightface" / "train.rec").stat().st_size
    assert np.array_equal(pickle.loads(pickled).face(5), dataset.face(5))


def test_the_fixtures_cover_every_variant():
    flags = {name: {len(entry["labels"]) for entry in json.loads((FIXTURES / name / "expected.json").read_text())}
             for name in PACKS}
    assert flags["array_labels"] == {1, 2, 3} and flags["insightface"] == {1, 2}
    assert RecordDataset(FIXTURES / "multipart").records.bytes.tobytes().count(b"\x0a\x23\xd7\xce") > 5


def test_a_png_of_16_bits_gives_its_upper_bytes_as_in_mxnet():
    gray = np.random.default_rng(0).integers(0, 1 << 16, (112, 112), np.uint16)
    file = BytesIO()
    Image.fromarray(gray).save(file, "PNG")
    assert np.array_equal(decode_face(file.getvalue()), (gray >> 8)[..., None].repeat(3, 2))
