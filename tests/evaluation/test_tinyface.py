"""TinyFace: the ranks of a slow reference, the layouts in which it occurs, and what is wrong named."""

import shutil
import sys

import numpy as np
import pytest
import simplejpeg
import torch
from scipy.io import savemat

from f2c_plugin.data.dataset import decode_face
from f2c_plugin.errors import F2CError, VerificationSetError
from f2c_plugin.evaluation.tinyface import IdentificationSet
from f2c_plugin.evaluation.verification import embed
from f2c_plugin.tools.left_out import photos_without_face
from tests.protocol_sets import cells, write_tinyface


@pytest.fixture(scope="module")
def tinyface(tmp_path_factory):
    return write_tinyface(tmp_path_factory.mktemp("sets") / "tinyface")


@pytest.fixture
def copy(tinyface, tmp_path):
    """A set that a test changes."""
    return shutil.copytree(tinyface, tmp_path / "tinyface") / "Testing_Set"


def found(folder, net):
    opened = IdentificationSet(folder)
    return opened.score(opened.embed(net))


def test_ranks_are_those_of_a_slow_reference(net, tinyface):
    def embedded(folder):
        """(identity, embedding of norm 1) of all images."""
        for path in sorted((tinyface / "Testing_Set" / folder).iterdir()):
            face = torch.from_numpy(decode_face(path.read_bytes()))[None]
            embedding = embed(net, face)[0].sum(0).numpy()
            yield path.name.split("_")[0], embedding / np.linalg.norm(embedding)
    gallery = [*embedded("Gallery_Match"), *((None, each) for _, each in embedded("Gallery_Distractor"))]
    ranks = []
    for wanted, probe in embedded("Probe"):
        nearest_first = sorted(gallery, key=lambda each: -(each[1] @ probe))
        ranks.append(1 + [identity for identity, _ in nearest_first].index(wanted))
    rates = {str(rank): sum(each <= rank for each in ranks) / 16 for rank in (1, 5, 20)}
    result = found(tinyface, net)
    # The nearest image of one's own identity may be behind others of it, which the reference counts as well.
    assert sorted(result.ranks) == sorted(ranks) and 0 < rates["1"] < rates["5"] < rates["20"] < 1
    assert result.summary() == {"protocol": "TinyFace 1:N", "probes": 16, "probes_without_mate": 0, "probes_without_face": 0,
                                "gallery": 64, "gallery_without_face": 0, "identification_rate": rates}


def test_names_say_the_identities_where_there_are_no_lists(net, tinyface, copy, monkeypatch):
    for path in copy.glob("*.mat"):
        path.unlink()
    (copy / "Probe/Thumbs.db").write_bytes(b"no image")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    assert sorted(found(copy, net).ranks) == sorted(found(copy.parent, net).ranks)
    with pytest.raises(F2CError, match=r"scipy.io cannot be imported .*f2c-plugin\[tinyface\]"):
        IdentificationSet(tinyface)
    for name in "face.jpg", f"{2**63}_0.jpg":
        (copy / "Probe" / name).write_bytes(b"")
        with pytest.raises(VerificationSetError, match=f"{name}: its name must begin with the number of the identity"):
            IdentificationSet(copy)
        (copy / "Probe" / name).unlink()


def test_lists_decide_which_images_count_and_whose_they_are(net, tinyface, copy):
    before = found(tinyface, net)
    for path in copy.glob("Gallery_Match/1_*.jpg"):  # aligned images may have another suffix
        path.rename(path.with_suffix(".jpeg"))
    for path in copy.glob("Probe/*_1.jpg"):
        path.rename(path.with_name(f"{900 + int(path.stem.split('_')[0])}_0.jpg"))
    shutil.copy(copy / "Probe/1_0.jpg", copy / "Probe/5_9.jpg")  # in no list
    probes = sorted(copy.glob("Probe/*_0.jpg"))
    savemat(copy / "probe_img_ID_pairs.mat", {
        "probe_set": cells([path.name for path in probes]),
        "probe_ids": np.array([int(path.stem.split("_")[0]) % 900 for path in probes])[:, None]})
    assert sorted(found(copy, net).ranks) == sorted(before.ranks)
    savemat(copy / "probe_img_ID_pairs.mat", {"probe_set": cells(["1_0.jpg", "2_0.jpg"]), "probe_ids": np.array([[1], [77]])})
    result = found(copy, net)
    assert len(result.ranks) == 1 and result.without_mate == 1
    savemat(copy / "probe_img_ID_pairs.mat", {"probe_set": cells(["1_0.jpg", "2_0.jpg"]), "probe_ids": np.array([[76], [77]])})
    with pytest.raises(VerificationSetError, match="the gallery has no image of any probe's identity"):
        IdentificationSet(copy)  # before anything is embedded


def test_a_net_that_tells_no_faces_apart_finds_nobody(tinyface):
    opened = IdentificationSet(tinyface)
    result = opened.score(torch.ones(80, 4, dtype=torch.float64))
    assert result.ranks.tolist() == [62] * 16 and result.rate(20) == 0  # behind all 61 that are not of the identity


def test_what_is_missing_or_damaged_is_named(net, copy):
    path = copy / "Probe/2_1.jpg"
    small = simplejpeg.encode_jpeg(np.zeros((20, 24, 3), np.uint8))
    for content, message in ((small, "2_1.jpg: cannot be used: it has 24×20 pixels.*: align the images first"),
                             (path.read_bytes()[:300], "2_1.jpg: cannot be used: ")):
        path.write_bytes(content)
        with pytest.raises(VerificationSetError, match=message):
            IdentificationSet(copy).embed(net)
    path.unlink()
    with pytest.raises(VerificationSetError, match="probe_img_ID_pairs.mat, entry 10: 2_1.jpg is not in .*Probe: what f2c"):
        IdentificationSet(copy)
    (copy / "Probe/2_0.jpg").unlink()
    with pytest.raises(VerificationSetError, match="entry 2: 2_0.jpg is not in .*Probe, and 1 more are not: what .*left_out"):
        IdentificationSet(copy)
    probes = copy / "probe_img_ID_pairs.mat"
    for content in ({"probe_ids": np.array([[1]])}, {"probe_set": cells(["1_0.jpg"]), "probe_ids": np.array([[1], [2]])},
                    {"probe_set": cells(["1_0.jpg"]), "probe_ids": np.array([[-100]])}):
        savemat(probes, content)
        with pytest.raises(VerificationSetError, match="probe_img_ID_pairs.mat: (must be TinyFace's list|has 1 images and )"):
            IdentificationSet(copy)
    probes.write_bytes(b"no list")
    with pytest.raises(VerificationSetError, match="probe_img_ID_pairs.mat: must be TinyFace's list"):
        IdentificationSet(copy)
    probes.unlink()
    with pytest.raises(VerificationSetError, match="probe_img_ID_pairs.mat is missing: needs both lists, or none"):
        IdentificationSet(copy)
    for path in (copy / "Gallery_Distractor").iterdir():
        path.unlink()
    (copy / "gallery_match_img_ID_pairs.mat").unlink()
    with pytest.raises(VerificationSetError, match="Gallery_Distractor: has no .jpeg, .jpg, .png"):
        IdentificationSet(copy)
    (copy / "Gallery_Distractor").rmdir()
    with pytest.raises(VerificationSetError, match="Gallery_Distractor is missing: TinyFace has Probe, .*; IJB-B has meta/"):
        IdentificationSet(copy)


def test_only_photos_in_which_align_found_no_face_may_be_missing(copy):
    for name in "Probe/1_0.jpg", "Probe/2_0.jpg", "Gallery_Match/3_4.jpg":
        (copy / name).unlink()
    listed = ["Probe/1_0.jpg\tno face found", "Probe/2_0.jpg\tcannot be decoded: cut", "Gallery_Match/3_4.jpg\tno face found",
              "Probe/8_1.jpg\tno face found"]  # the last has been made by hand since
    (copy / "left_out.tsv").write_text("\n".join(listed))
    with pytest.raises(VerificationSetError, match="entry 2: 2_0.jpg is not in .*Probe: "):
        IdentificationSet(copy, photos_without_face)
    (copy / "left_out.tsv").write_text("\n".join(listed).replace("cannot be decoded", "the detector fails"))
    result = IdentificationSet(copy, photos_without_face).score(torch.ones(77, 4))
    assert result.without_face == (2, 1) and len(result.ranks) == 16 and result.gallery == 63 and result.without_mate == 0
    assert (result.ranks > 80).sum() == 2
