"""benchmarks/real_faces.py trains on nobody who is verified, and writes both packs or nothing."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.data.template import TEMPLATE
from f2c_plugin.evaluation.verification import VerificationSet
from f2c_plugin.synthetic.face import draw_face, draw_identity
from f2c_plugin.tools.align import CENTRE

PAIRS = """2\t1
Ann_Able\t1\t2
Ann_Able\t3\tBob_Best\t1
Cy_Cole\t1\t2
Cy_Cole\t1\tDi_Dean\t2
"""
LFW = {"Ann_Able": 3, "Bob_Best": 1, "Cy_Cole": 2, "Di_Dean": 2, "Ed_East": 1}
OTHERS = {"ann able": 2, "7": 2, "Fay Ford": 4}


@pytest.fixture
def real_faces(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    return importlib.import_module("real_faces")


@pytest.fixture
def run(real_faces, tmp_path, monkeypatch):
    """Runs the script in a folder that holds two sources and LFW's list of pairs."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for source, people in ("lfw", LFW), ("others", OTHERS):
        for name, count in people.items():
            identity = draw_identity(rng)
            for number in range(1, count + 1):
                file = Path(source, name, f"{name}_{number:04}.jpg")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(simplejpeg.encode_jpeg(draw_face(identity, rng)))
    Path("pairs.txt").write_text(PAIRS)
    before = contents()

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["real_faces.py", *arguments, "--processes", "1"])
        real_faces.main()

    def fails(*arguments, message):
        with pytest.raises(SystemExit, match=message):
            run(*arguments)
        assert contents() == before
    run.fails = fails
    return run


WITH_PAIRS = "out", "--from", "lfw", "others", "--pairs", "pairs.txt"


def contents():
    return {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}


def names(folder):
    return json.loads(Path(folder, "identities.json").read_text())


def images(source, *people):
    return [file.read_bytes() for name in people for file in sorted(Path(source, name).iterdir())]


def test_no_one_who_is_verified_is_trained_on(run, capsys):
    run(*WITH_PAIRS)
    assert names("out") == ["1_7", "cy cole", "di dean", "ed east", "fay ford"]
    assert names("out_unseen") == ["ann able", "bob best"]
    trained, tested = (Path(folder, "train.rec").read_bytes() for folder in ("out", "out_unseen"))
    held_out = images("lfw", "Ann_Able", "Bob_Best") + images("others", "ann able")
    assert all(image in tested and image not in trained for image in held_out)
    assert all(image in trained for image in images("lfw", "Cy_Cole", "Di_Dean", "Ed_East") + images("others", "7", "Fay Ford"))
    assert len(RecordDataset("out")) == 11 and len(RecordDataset("out_unseen")) == 6
    report = capsys.readouterr().out
    assert "out: 11 images of 5 people, 20% of them with one image" in report and "2 pairs" in report


@pytest.mark.parametrize("folds, files, people", [
    (["0"], ["Ann_Able_0001", "Ann_Able_0002", "Ann_Able_0003", "Bob_Best_0001"], ["ann able", "bob best"]),
    (["1"], ["Cy_Cole_0001", "Cy_Cole_0002", "Cy_Cole_0001", "Di_Dean_0002"], ["cy cole", "di dean"]),
])
def test_pairs_are_those_of_the_folds(run, folds, files, people):
    run(*WITH_PAIRS, "--folds", *folds)
    verification_set = VerificationSet("out/lfw.bin")
    assert verification_set.same.tolist() == [True, False]
    assert verification_set.images == [Path("lfw", file[:-5], f"{file}.jpg").read_bytes() for file in files]
    assert names("out_unseen") == people


def test_same_and_different_alternate(run):
    three = PAIRS.replace("2\t1", "1\t2").splitlines()
    Path("pairs.txt").write_text("\n".join([three[0], three[1], three[3], three[2], three[4]]))
    run(*WITH_PAIRS)
    assert VerificationSet("out/lfw.bin").same.tolist() == [True, False, True, False]


def test_without_a_list_people_and_pairs_are_drawn(run):
    drawn = "--from", "lfw", "others", "--held-out", "0.5", "--num-pairs", "20"
    run("out", *drawn)
    run("again", *drawn)
    run("other", *drawn, "--seed", "1")
    assert len(names("out")) == 3 and len(names("out_unseen")) == 4 and not set(names("out")) & set(names("out_unseen"))
    verification_set = VerificationSet("out/held_out.bin")
    faces = verification_set.images
    assert verification_set.same.tolist() == [True, False] * 10
    assert all(first != second for first, second in zip(faces[::2], faces[1::2], strict=True))
    tested, trained = (Path(folder, "train.rec").read_bytes() for folder in ("out_unseen", "out"))
    assert all(image in tested and image not in trained for image in faces)
    assert contents()[Path("out/train.rec")] == contents()[Path("again/train.rec")] != contents()[Path("other/train.rec")]
    assert contents()[Path("out/held_out.bin")] == contents()[Path("again/held_out.bin")]


def test_at_most_so_many_images_of_a_person(run):
    run(*WITH_PAIRS, "--folds", "0", "--most", "3", "2")
    assert len(RecordDataset("out")) == 10 and len(RecordDataset("out_unseen")) == 3


def test_what_cannot_be_decoded_is_left_out_and_told(run, capsys):
    Path("others", "Fay Ford", "notes.txt").write_text("no image")
    Path("others", "Fay Ford", ".hidden").write_text("no image")
    run(*WITH_PAIRS)
    assert len(RecordDataset("out")) == 11
    assert "1 left out: cannot be decoded, like others/Fay Ford/notes.txt" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [
    (("out", "--from", "nowhere"), "--from nowhere: there is no folder nowhere"),
    (("out", "--from", "lfw=2"), "--from lfw=2: the share is '2'; it must be above 0 and at most 1, or 'face'"),
    (("out", "--from", "lfw", "lfw/Bob_Best"), "--from lfw/Bob_Best: must have a folder of images for each person"),
    (("lfw", "--from", "others"), "lfw exists and is not overwritten"),
    ((*WITH_PAIRS, "--folds", "2"), "--folds 2: pairs.txt has folds from 0 to 1"),
    (("out", "--from", "lfw", "--pairs", "lfw/none.txt"), "--pairs lfw/none.txt: must be LFW's pairs.txt: .*No such file"),
    (("out", "--from", "others", "--pairs", "pairs.txt"), r"pairs.txt, line 2: there is no others/Ann_Able/Ann_Able_0001.jpg"),
    (("out", "--from", "lfw", "--held-out", "0.1"), "verification: no image of its 0 people"),
    (("out", "--from", "lfw", "--held-out", "0.2"), "--held-out draws 1 people"),
    (("out", "--from", "lfw", "--held-out", "0.99"), "training: no image of its 0 people"),
])
def test_errors_name_what_is_wrong_and_leave_nothing(run, arguments, message):
    run.fails(*arguments, message=message)


@pytest.mark.parametrize("old, new, message", [
    ("2\t1\n", "3\t1\n", "must be LFW's pairs.txt: 4 pairs for 3 folds"),
    ("Ann_Able\t1\t2\n", "Ann_Able\t1\n", r"pairs.txt, line 2: 'Ann_Able\\t1' must be a name and two numbers"),
    ("Ann_Able\t3\tBob_Best\t1", "Ann_Able\t3\t1", r"pairs.txt, line 3: .* must be a name and a number, twice"),
    ("Bob_Best\t1", "Bob_Best\t2", "pairs.txt, line 3: there is no lfw/Bob_Best/Bob_Best_0002.jpg"),
])
def test_errors_in_the_list_name_its_line(real_faces, run, old, new, message):
    Path("pairs.txt").write_text(PAIRS.replace(old, new))
    with pytest.raises(real_faces.RecordError, match=message):
        real_faces.listed_pairs(Path("pairs.txt"), "lfw", [0, 1])


def test_a_pair_without_a_face_leaves_nothing(run):
    Path("lfw/Ann_Able/Ann_Able_0002.jpg").write_bytes(b"")
    before = contents()
    with pytest.raises(SystemExit, match="lfw/Ann_Able/Ann_Able_0002.jpg: cannot be decoded.*pairs need it"):
        run(*WITH_PAIRS)
    assert contents() == before


def test_in_the_wild_needs_a_detector(run, capsys):
    run.fails("out", "--from", "lfw=face", message="2")
    assert "--from lfw=face: needs --detector" in capsys.readouterr().err


def decoded(encoded):
    return simplejpeg.decode_jpeg(encoded)


def test_crops_keep_the_share_of_the_shorter_side(real_faces, tmp_path):
    image = np.zeros((250, 400, 3), np.uint8)
    image[63:188, 138:263] = 255  # the central half of the shorter side
    Image.fromarray(image).save(tmp_path / "image.png")
    for share, mean in (1.0, 64), (0.5, 255), (0.25, 255):
        face = decoded(real_faces.face_of(None, real_faces.Photo(tmp_path / "image.png", share)))
        assert face.shape == (112, 112, 3) and face.mean() == pytest.approx(mean, abs=4)


def test_a_detector_that_cannot_be_opened(real_faces, run, monkeypatch):
    Image.new("RGB", (64, 64)).save("others/Fay Ford/small.png")
    before = contents()
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "cv2", None)
        with pytest.raises(SystemExit, match=r"--detector: cv2 cannot be imported .* pip install 'f2c-plugin\[align\]'"):
            run(*WITH_PAIRS, "--detector", "none.onnx")
    assert contents() == before
    with pytest.raises(SystemExit, match="--detector none.onnx: cannot be read: No such file"):
        run(*WITH_PAIRS, "--detector", "none.onnx")
    assert contents() == before


def test_what_the_detector_finds_is_aligned_and_what_not_is_left_out_or_cropped(real_faces, tmp_path, monkeypatch):
    image = np.zeros((224, 224, 3), np.uint8)
    image[:120, :120] = 255
    Image.fromarray(image).save(tmp_path / "image.png")
    photo = real_faces.Photo(tmp_path / "image.png", None)
    points = TEMPLATE + CENTRE
    monkeypatch.setattr(real_faces, "detector", lambda model: SimpleNamespace(points=lambda image: points))
    assert decoded(real_faces.face_of(tmp_path, photo)).min() > 250
    points = None
    assert real_faces.face_of(tmp_path, photo) == "no face found"
    assert decoded(real_faces.face_of(tmp_path, photo._replace(share=1.0))).min() < 5
