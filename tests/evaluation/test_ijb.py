"""IJB-B and IJB-C: the scores of a slow reference and of arcface_torch's own script, and what is wrong named by its line."""

import sys
import warnings
from argparse import Namespace
from importlib import import_module
from types import ModuleType, SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from skimage.transform import SimilarityTransform

from f2c_plugin.data.template import TEMPLATE
from f2c_plugin.errors import F2CError, VerificationSetError
from f2c_plugin.evaluation.accuracy import FARS
from f2c_plugin.evaluation.ijb import Crop, TemplateSet, aligned_crop, warped
from f2c_plugin.evaluation.onnx_export import export_checked
from f2c_plugin.evaluation.verification import embed
from tests.protocol_sets import write_ijb


@pytest.fixture(scope="module")
def ijbc(tmp_path_factory):
    return write_ijb(tmp_path_factory.mktemp("sets") / "IJBC")


@pytest.fixture
def copy(tmp_path):
    """A set that a test damages."""
    return write_ijb(tmp_path / "IJBB", "ijbb", templates=3)


def lines(folder, name):
    return [line.split() for line in (folder / "meta" / f"ijbc_{name}.txt").read_text().splitlines()]


def test_scores_and_tars_are_those_of_a_slow_reference(net, ijbc):
    medias = {}  # {template: {media: embeddings of its images}}
    for number, (face, listed) in enumerate(zip(lines(ijbc, "name_5pts_score"), lines(ijbc, "face_tid_mid"), strict=True)):
        numbers = np.array(face[1:], float)
        crop = Crop(face[0], number + 1, numbers[:10:2] + 1j * numbers[1:10:2])
        image, mirrored = embed(net, torch.from_numpy(aligned_crop(ijbc / "loose_crop", ijbc, crop))[None])[0].numpy()
        medias.setdefault(listed[1], {}).setdefault(listed[2], []).append((image + mirrored) * numbers[10])
    assert {len(images) for each in medias.values() for images in each.values()} == {1, 2}
    templates = {template: sum(sum(images) / len(images) for images in each.values()) for template, each in medias.items()}
    pairs = lines(ijbc, "template_pair_label")
    cosines = np.array([templates[a] @ templates[b] / np.linalg.norm(templates[a]) / np.linalg.norm(templates[b])
                        for a, b, _ in pairs])
    same = np.array([label == "1" for _, _, label in pairs])
    tars = [max(((cosines[same] > at).mean() for at in cosines if (cosines[~same] > at).mean() <= far), default=0)
            if far * (~same).sum() >= 1 else None for far in FARS]

    opened = TemplateSet(ijbc)
    found = opened.score(opened.embed(net))
    np.testing.assert_allclose(found.scores, cosines, rtol=0, atol=1e-6)
    assert np.array_equal(found.same, same) and found.tars() == tars
    assert tars[:2] == sorted(tars[:2], reverse=True) and 0 < tars[1] < 1 and tars[2:] == [None] * 4  # of 448 different pairs
    assert found.summary() == {
        "protocol": "IJB-C 1:1", "images": len(lines(ijbc, "face_tid_mid")), "templates": 32, "pairs": 496, "same_pairs": 48,
        "tar_at_far": {"1e-01": tars[0], "1e-02": tars[1], "1e-03": None, "1e-04": None, "1e-05": None, "1e-06": None}}


def test_crops_are_aligned_as_opencv_and_scikit_image_do_it():
    rng = np.random.default_rng(0)
    image = cv2.GaussianBlur(rng.integers(0, 256, (150, 130, 3), np.uint8), (5, 5), 0)
    for turn, shift in ((1.1 - 0.2j, 5 + 9j), (0.5 + 0.4j, 40 + 2j), (2.5, -30 - 60j)):  # the last two lead out of the image
        points = turn * TEMPLATE + shift + rng.normal(0, 2, 5) + 1j * rng.normal(0, 2, 5)
        ours = warped(image, points)
        src, dst = (np.column_stack([each.real, each.imag]) for each in (points, TEMPLATE))
        matrix = SimilarityTransform.from_estimate(src, dst).params
        theirs = cv2.warpAffine(image, matrix[:2], (112, 112), borderValue=0.0)
        assert np.abs(ours.astype(int) - theirs).max() <= 8 and np.abs(ours.astype(int) - theirs).mean() < 0.5  # of 1/32 pixel
        places = np.stack([*np.meshgrid(np.arange(112), np.arange(112)), np.ones((112, 112))])
        x, y, _ = np.linalg.inv(matrix) @ places.reshape(3, -1)
        exact = np.stack([map_coordinates(plane.astype(float), [y, x], order=1, mode="grid-constant")
                          for plane in np.moveaxis(image, 2, 0)], axis=-1).reshape(112, 112, 3)
        assert np.abs(ours - exact).max() < 0.51
    assert (ours == 0).any()


@pytest.mark.host
def test_scores_are_those_of_arcface_torchs_own_script(checkout, net, ijbc, tmp_path, monkeypatch, capsys):
    mxnet = ModuleType("mxnet")  # of which it needs the base class of a list of images
    monkeypatch.setattr(mxnet, "gluon", SimpleNamespace(data=SimpleNamespace(Dataset=torch.utils.data.Dataset)), raising=False)
    monkeypatch.setitem(sys.modules, "mxnet", mxnet)
    monkeypatch.setattr(np, "int", int, raising=False)  # as NumPy called it until 1.23
    monkeypatch.syspath_prepend(str(checkout))
    theirs = import_module("onnx_ijbc")
    export_checked(net, tmp_path / "model.onnx")
    theirs.main(Namespace(model_root=str(tmp_path), image_path=str(ijbc), target="IJBC"))
    table = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| IJBC.npy")]
    opened = TemplateSet(ijbc)
    found = opened.score(opened.embed(net))
    # Faces differ by a grey level here and there, where a value of the warp lies between two.
    np.testing.assert_allclose(found.scores, np.load(tmp_path / "IJBC_result/IJBC.npy"), rtol=0, atol=2e-3)
    assert [float(cell) / 100 for cell in table[0][6:8]] == pytest.approx(found.tars()[1::-1], abs=0.05)

    # From the same embeddings, and with the script's own readers, all that comes after the net.
    faces = torch.from_numpy(np.stack([aligned_crop(ijbc / "loose_crop", ijbc, Crop(name, 0, points))
                                       for name, points in zip(opened._names, opened._points, strict=True)]))
    scores = np.array([line[-1] for line in lines(ijbc, "name_5pts_score")]).astype(np.float32)
    embeddings = embed(net, faces).sum(1).numpy() * scores[:, None]
    meta = ijbc / "meta"
    templates, unique = theirs.image2template_feature(embeddings, *theirs.read_template_media_list(
        meta / "ijbc_face_tid_mid.txt"))
    first, second, label = theirs.read_template_pair_list(meta / "ijbc_template_pair_label.txt")
    np.testing.assert_allclose(found.scores, theirs.verification(templates, unique, first, second), rtol=0, atol=1e-5)
    assert np.array_equal(found.same, label == 1)


@pytest.mark.parametrize("name, line, text, message", [
    ("name_5pts_score", 2, "2.jpg 1 2 3", "line 2: '2.jpg 1 2 3' must be an image, ten coordinates"),
    ("name_5pts_score", 2, "2.jpg 1 2 1 2 1 2 1 2 1 2 0.9", "line 2: .* must be .* five points that differ"),
    ("name_5pts_score", 1, "1.jpg 1 2 3 4 5 6 7 8 9 nan 0.9", "line 1: .* must be an image, ten .*: 'nan' is not finite"),
    ("name_5pts_score", 1, "1.jpg" + " 123.456" * 10 + " inf", "line 1: '1.jpg.*…' must be .* a score: 'inf' is not finite"),
    ("name_5pts_score", 1, "1.jpg" + " 123.456" * 10, "line 1: '1.jpg.*…' must be .* a score: 11 words, not 12"),
    ("name_5pts_score", 2, "9.jpg 1 2 3 4 5 6 7 8 9 10 0.9", "face_tid_mid.txt, line 2: lists 2.jpg, but line 2 of .* 9.jpg"),
    ("name_5pts_score", 9, "9.jpg 1 2 3 4 5 6 7 8 9 10 0.9", "face_tid_mid.txt: .* lines, but .* has .*must list the same"),
    ("face_tid_mid", 3, "3.jpg 1 99999999999999999999", "line 3: '3.jpg 1 9+' must be an image and the numbers"),
    ("template_pair_label", 2, "99999999999999999999 1 0", "template_pair_label.txt, line 2: '9+ 1 0' must be the numbers"),
    ("template_pair_label", 2, 999 * "1", "template_pair_label.txt, line 2: '1{60}…' must be"),
    ("face_tid_mid", 3, "3.jpg 1", "line 3: '3.jpg 1' must be an image and the numbers of its template and media"),
    ("template_pair_label", 2, "1 x 0", "template_pair_label.txt, line 2: '1 x 0' must be the numbers of two templates"),
    ("template_pair_label", 2, "1 2", "template_pair_label.txt, line 2: '1 2' must be"),
    ("template_pair_label", 1, "1 2 2", "template_pair_label.txt, line 1: '1 2 2' must be"),
    ("template_pair_label", 3, "77 77 1", "template_pair_label.txt, line 3: template 77 has no image"),
    ("template_pair_label", 0, "", "template_pair_label.txt: must have .* in each line: it has none")])
def test_what_is_wrong_is_named_by_file_and_line(copy, name, line, text, message):
    path = copy / "meta" / f"ijbb_{name}.txt"
    written = path.read_text().splitlines()
    written[line - 1:line] = [text]
    path.write_text("\n".join(written if line else []))
    with pytest.raises(VerificationSetError, match=message), warnings.catch_warnings():
        warnings.simplefilter("error")
        TemplateSet(copy)


def test_lists_may_have_a_byte_order_mark_and_the_line_ends_of_windows(net, copy):
    before = TemplateSet(copy)
    for path in (copy / "meta").iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    after = TemplateSet(copy)
    assert np.array_equal(before.score(before.embed(net)).scores, after.score(after.embed(net)).scores)
    assert np.array_equal(before._same, after._same)


def test_images_that_are_missing_or_damaged_are_named_with_their_line(net, copy):
    path = copy / "loose_crop/2.jpg"
    encoded = path.read_bytes()
    path.write_bytes(encoded[:500])
    with pytest.raises(VerificationSetError, match=r"2.jpg \(ijbb_name_5pts_score.txt, line 2\): cannot be used"):
        TemplateSet(copy).embed(net)
    path.unlink()
    with pytest.raises(VerificationSetError, match="ijbb_name_5pts_score.txt, line 2: 2.jpg is not in .*loose_crop"):
        TemplateSet(copy)
    path.write_bytes(encoded)
    assert TemplateSet(copy).protocol == "IJB-B 1:1"
    with pytest.raises(F2CError, match="embeddings of .*IJBB are not finite"):
        TemplateSet(copy).embed(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Threshold(10, torch.inf)))
    (copy / "meta/ijbb_template_pair_label.txt").unlink()
    with pytest.raises(VerificationSetError, match="ijbb_template_pair_label.txt is missing: IJB-B 1:1 needs it"):
        TemplateSet(copy)

