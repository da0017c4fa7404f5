"""A thinned pack has the share of images exactly; near-duplicates go first; every identity keeps its number and an image."""

import json

import numpy as np
import pytest
import simplejpeg
import torch

from f2c_plugin.cli import main as cli
from f2c_plugin.errors import InputError, OverwriteError
from f2c_plugin.models import get_model
from f2c_plugin.tools.thin import thin
from tests.tools.coded_faces import codes, face, read_pack, write_net, write_pack

PEOPLE, SCENES, SHOTS = 8, 5, 2  # a scene has a few pictures that hardly differ
ALONE = 9999  # an identity with one image


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    return write_net(tmp_path_factory.mktemp("net") / "bar.onnx")


@pytest.fixture(scope="module")
def repetitive(tmp_path_factory):
    """A pack whose identities leave gaps, and {image: (identity, scene)}."""
    rng = np.random.default_rng(0)
    images = [(ALONE, face(rng, codes(rng, 1)[0]))]
    scene_of = {images[0][1]: (ALONE, 0)}
    for identity in range(3, 3 + 7 * PEOPLE, 7):
        for scene, code in enumerate(codes(rng, SCENES, codes(rng, 1)[0], 0.8)):
            for shot in codes(rng, SHOTS, code, 0.05):
                images.append((identity, face(rng, shot)))
                scene_of[images[-1][1]] = identity, scene
    shuffled = [images[i] for i in rng.permutation(len(images))]
    return write_pack(tmp_path_factory.mktemp("repetitive") / "pack", shuffled), scene_of


def test_near_duplicates_go_first(repetitive, net, tmp_path, capsys):
    folder, scene_of = repetitive
    scenes, of = PEOPLE * SCENES + 1, PEOPLE * SCENES * SHOTS + 1
    cli(["thin", str(folder), str(net), str(tmp_path / "out"), "--keep", f"{scenes / of:.6f}"])
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'out'}: {scenes} of {of} images, of {PEOPLE + 1} identities; ")
    kept = read_pack(tmp_path / "out")
    assert {scene_of[image] for images in kept.values() for image in images} == {*scene_of.values()}  # one of each
    assert all(scene_of[image][0] == identity for identity, images in kept.items() for image in images)


@pytest.mark.parametrize("keep", [0.12, 0.3, 0.6, 0.77, 0.99])
def test_the_share_is_exact_and_no_identity_is_lost(repetitive, net, tmp_path, keep, capsys):
    folder, scene_of = repetitive
    cli(["thin", str(folder), str(net), str(tmp_path / "out"), "--keep", str(keep), "--json"])
    found, kept = json.loads(capsys.readouterr().out), read_pack(tmp_path / "out")
    assert sum(map(len, kept.values())) == found["images"] == round(keep * len(scene_of))
    assert {*kept} == {identity for identity, _ in scene_of.values()}
    again = thin(folder, net, tmp_path / "again", keep)
    assert again.images == found["images"] and (tmp_path / "again/train.rec").read_bytes() == (
        tmp_path / "out/train.rec").read_bytes()


def test_what_contributes_most_stays_and_images_that_no_threshold_tells_apart_fill_the_share(net, tmp_path):
    rng = np.random.default_rng(1)
    images, others = [], set()
    for identity, code in enumerate(codes(rng, 4)):
        other = face(rng, codes(rng, 1, code, 1.0)[0])
        images += [(identity, each) for each in [face(rng, code)] * 3 + [other] + [face(rng, code)] * 2]
        others.add(other)
    pack = write_pack(tmp_path / "pack", images)
    thin(pack, net, tmp_path / "few", 4 / 24)
    assert {image for images in read_pack(tmp_path / "few").values() for image in images} == others
    thin(pack, net, tmp_path / "half", 0.5)
    kept = [image for images in read_pack(tmp_path / "half").values() for image in images]
    assert len(kept) == 12 and others < {*kept}


def test_a_trained_net_thins_too_and_what_cannot_be_decoded_is_left_out(repetitive, tmp_path, capsys):
    torch.save(get_model("tiny", 8).state_dict(), tmp_path / "model.pt")
    whole = [(identity, image) for identity, images in read_pack(repetitive[0]).items() for image in images]
    small = simplejpeg.encode_jpeg(np.zeros((64, 64, 3), np.uint8))
    pack = write_pack(tmp_path / "pack", [*whole, (5, whole[0][1][:-300]), (3, small)])  # identity 5 has no other
    cli(["thin", str(pack), str(tmp_path / "model.pt"), str(tmp_path / "out")])
    assert "left out: 2 images that cannot be decoded" in capsys.readouterr().out
    kept = read_pack(tmp_path / "out")
    assert sum(map(len, kept.values())) == round(0.6 * len(whole)) and {*kept} == {identity for identity, _ in whole}


def test_what_cannot_be_thinned_is_refused_and_nothing_is_written(repetitive, net, tmp_path):
    folder, _ = repetitive
    for keep in 0, 1:
        with pytest.raises(InputError, match=f"--keep {keep}: must be a share"):
            thin(folder, net, tmp_path / "out", keep)
    with pytest.raises(InputError, match=r"--keep 0.1: would keep 8 of 81 images, but each of 9 .*: keep 0.111 or more"):
        thin(folder, net, tmp_path / "out", 0.1)
    with pytest.raises(OverwriteError, match="train.idx exists"):
        thin(folder, net, folder)
    assert not (tmp_path / "out").exists()
