"""Aligned faces: where they are cut, under which names, what is left out, and runs that go on where they were."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import simplejpeg
from PIL import Image
from scipy.io import savemat

from f2c_plugin.cli import main as cli
from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.data.template import TEMPLATE
from f2c_plugin.errors import F2CError, InputError, OverwriteError, RecordError
from f2c_plugin.tools.align import CENTRE, SCRFD, YuNet, align, aligned, detector, detector_file
from tests.protocol_sets import cells, write_net
from tests.runs import hear_interrupts
from tests.tools.detectors import SQUARE, write_scrfd, write_yunet

pytest.importorskip("cv2", reason="NO FACES DETECTED: pip install opencv-python-headless")


def photo(*middles, side=320, seed=0):
    """A dark photo with faces, white squares, at (x, y); all smooth, so that a JPEG keeps it."""
    coarse = np.random.default_rng(seed).integers(0, 80, (9, 9, 3), np.uint8)
    image = np.array(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))
    for x, y in middles:
        image[y - SQUARE // 2:y + SQUARE // 2, x - SQUARE // 2:x + SQUARE // 2] = 255
    return image


def save(path, image, form=None, **keys):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, form, **({"quality": 97, "subsampling": 0} if path.suffix == ".jpg" else {}), **keys)
    return path


def around(image, x, y):
    return image[y - 56:y + 56, x - 56:x + 56].astype(int)


def pixels(path):
    return simplejpeg.decode_jpeg(path.read_bytes()).astype(int)


def left_out(folder):
    return dict(line.split("\t") for line in (folder / "left_out.tsv").read_text().splitlines())


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def yunet(tmp_path):
    write_yunet(tmp_path / "yunet.onnx")
    return tmp_path / "yunet.onnx"


@pytest.fixture
def photos(tmp_path):
    """Two people with three photos, and files that are none."""
    for name, middle in {"anna/0.jpg": (164, 124), "anna/b/1.jpg": (100, 204), "carl/2.jpg": (204, 100)}.items():
        save(tmp_path / "photos" / name, photo(middle))
    save(tmp_path / "photos/carl/nobody.jpg", photo())
    (tmp_path / "photos/carl/notes.txt").write_text("not an image")
    return tmp_path / "photos"


@pytest.mark.parametrize("turn", [1.0, 0.4j, 5 + 2j])
def test_points_come_to_those_of_the_template(turn):
    points = turn * (TEMPLATE - 56 - 56j) + 500 + 400j
    y, x = np.mgrid[:800, :1000]
    for point, target in zip(points, TEMPLATE, strict=True):
        spot = 255 * np.exp(-np.abs((x + 1j * y - point) / turn / 3) ** 2)
        face = np.asarray(aligned(Image.fromarray(np.uint8(spot)).convert("RGB"), points + CENTRE))
        weights = face[..., 0] / face[..., 0].sum()
        centre = (weights * (np.arange(112) + 1j * np.arange(112)[:, None])).sum()
        assert abs(centre - target) < 0.1


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of scikit-image, in insightface
@pytest.mark.parametrize("turn", [1.0, 1.1 + 0.3j, 0.6 - 0.2j])
def test_faces_are_those_of_insightface(turn):
    face_align = pytest.importorskip("insightface.utils.face_align", reason="NOT COMPARED: pip install insightface")
    image = photo(side=400)
    noise = np.random.default_rng(1).normal(0, 3, (2, 5))
    points = turn * (TEMPLATE - 56 - 56j) + 200 + 190j + noise[0] + 1j * noise[1]  # no similarity brings these to the template
    found = np.asarray(aligned(Image.fromarray(image), points + CENTRE)).astype(int)
    expected = face_align.norm_crop(image, np.stack([points.real, points.imag], 1))
    assert np.abs(found - expected).max() <= 3


def test_what_is_outside_the_photo_is_black_and_large_faces_take_little_memory():
    image = Image.new("RGB", (200, 200), "white")
    face = np.asarray(aligned(image, TEMPLATE + CENTRE - 60))
    assert face[:, :56].max() == 0 and face[:, 64:].min() == 255
    assert aligned(image, 1e6 * (TEMPLATE - 56 - 56j)).size == (112, 112)  # and not drawn a million times as large


def test_the_large_and_central_face_counts():
    def row(x, y, size):
        return [x, y, size, size, *(value + size / 2 for _ in range(5) for value in (x, y)), 0.9]

    class Net:
        def setInputSize(self, size):
            self.size = size

        def detect(self, image):
            assert image.shape == (*self.size[::-1], 3)
            return 1, found
    yunet = YuNet.__new__(YuNet)
    yunet._net = Net()
    image = Image.new("RGB", (640, 480))
    found = np.array([row(0, 0, 60), row(135, 95, 50), row(150, 110, 20)], np.float32)
    assert yunet.points(image) == pytest.approx(np.full(5, 2 * (160.5 + 120.5j)))
    found = None
    assert yunet.points(image) is None


@pytest.mark.parametrize("write, kind, side", [(write_yunet, YuNet, 320), (write_scrfd, SCRFD, 640)])
def test_both_detectors_find_the_face_and_of_several_the_central_one(tmp_path, write, kind, side):
    if kind is SCRFD:
        pytest.importorskip("insightface", reason="NOT DETECTED BY INSIGHTFACE: pip install insightface")
    write(tmp_path / "any name.onnx")
    image = photo((92, 92), (180, 148), side=side)
    save(tmp_path / "photos/a/0.png", image)
    cli(["align", str(tmp_path / "photos"), str(tmp_path / "faces"), "--detector", str(tmp_path / "any name.onnx")])
    assert type(detector(tmp_path / "any name.onnx")) is kind
    face = (tmp_path / "faces/a/0.png.jpg").read_bytes()
    assert simplejpeg.decode_jpeg_header(face) == (112, 112, "YCbCr", "444")
    assert np.abs(pixels(tmp_path / "faces/a/0.png.jpg") - around(image, 180, 148)).max() < 80  # of 255


def test_a_folder_of_photos_becomes_one_of_faces_that_is_packed_as_it_is(photos, tmp_path, yunet, capsys):
    cli(["align", str(photos), str(tmp_path / "new/faces"), "--detector", str(yunet)])
    out = tmp_path / "new/faces"
    assert files(out) == ["anna/0.jpg", "anna/b/1.jpg", "carl/2.jpg", "left_out.tsv"]
    assert left_out(out) == {"carl/nobody.jpg": "no face found", "carl/notes.txt": "not an image"}
    assert capsys.readouterr().out.splitlines() == [
        f"{out}: 3 faces aligned", f"left out, see {out}/left_out.tsv:", "  1 × no face found: carl/nobody.jpg",
        "  1 × not an image: carl/notes.txt"]
    assert np.abs(pixels(out / "anna/b/1.jpg") - around(photo((100, 204)), 100, 204)).mean() < 3
    cli(["pack", str(out), str(tmp_path / "pack")])
    assert capsys.readouterr().out == f"{tmp_path}/pack: 3 images of 2 identities\n"  # left_out.tsv is not worth a word
    assert RecordDataset(tmp_path / "pack").index.identity.tolist() == [0, 0, 1]


def test_the_result_as_json(photos, tmp_path, yunet, capsys):
    (photos / "carl/nobody.jpg").unlink()
    cli(["align", str(photos), str(tmp_path / "faces"), "--detector", str(yunet), "--json"])
    (tmp_path / "faces/anna/0.jpg").unlink()
    expected = {"out": str(tmp_path / "faces"), "left_out": {"not an image": 1}, "aligned": 3, "before": 0, "copied": 0}
    assert json.loads(capsys.readouterr().out) == expected
    cli(["align", str(photos), str(tmp_path / "faces"), "--detector", str(yunet), "--json"])
    assert json.loads(capsys.readouterr().out) == expected | {"aligned": 1, "before": 2}


def test_a_second_run_makes_only_what_is_missing_and_lists_all_that_is_left_out(photos, tmp_path, yunet):
    out = tmp_path / "faces"
    align(photos, out, yunet, 1)
    (out / "anna/0.jpg").write_bytes(b"a face that was there")
    (out / "carl/2.jpg").unlink()
    (out / "carl/2.jpg.0123abcd.partial").write_bytes(b"of a run that was killed")
    shutil.copy(photos / "anna/0.jpg", photos / "anna/new.jpg")
    again = align(photos, out, yunet, 1)
    assert (again.aligned, again.before) == (2, 2) and again.report().startswith(f"{out}: 2 faces aligned, 2 were there\n")
    assert files(out) == ["anna/0.jpg", "anna/b/1.jpg", "anna/new.jpg", "carl/2.jpg", "left_out.tsv"]
    assert (out / "anna/0.jpg").read_bytes() == b"a face that was there"
    assert left_out(out).keys() == {"carl/nobody.jpg", "carl/notes.txt"}
    for name in left_out(out):
        (photos / name).unlink()
    align(photos, out, yunet, 1)
    assert not (out / "left_out.tsv").exists()


COUNT = 120  # more than are under way in workers


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_whole_faces_and_the_next_goes_on(tmp_path, yunet, number):
    save(tmp_path / "photos/0/0.jpg", photo((164, 124)))
    for i in range(1, COUNT):
        shutil.copy(tmp_path / "photos/0/0.jpg", tmp_path / f"photos/0/{i}.jpg")
    out = tmp_path / "faces"
    command = [sys.executable, "-m", "f2c_plugin", "align", tmp_path / "photos", out, "--detector", yunet]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               preexec_fn=hear_interrupts)
    while process.poll() is None and not list(out.rglob("*.jpg")):
        os.sched_yield()
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=60)  # until its workers have ended, too
    if number == signal.SIGINT:
        assert process.returncode == 130 and err == "f2c-plugin align: interrupted\n"
        assert not [name for name in files(out) if not name.endswith(".jpg")]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.jpg")}
    assert 0 < len(before) < COUNT and all(pixels(path).shape == (112, 112, 3) for path in before)
    done = align(tmp_path / "photos", out, yunet)
    assert (done.aligned, done.before) == (COUNT - len(before), len(before)) and len(files(out)) == COUNT
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_no_photo_takes_the_name_of_another_and_odd_names_are_kept(tmp_path, yunet):
    long = "l" * 240 + ".jpg"
    names = ["top.jpg", "a/0.jpg", "a/0.png", "a/0.jpeg", "a/0.JPG", "a/0", "a/1.png", "a/1.png.jpg", "Zoë b/日本\n.jpg",
             "Zoë b/" + os.fsdecode(b"\xff\t.webp"), "a/b/c/d.jpg", "a/" + long]
    for name in names:
        save(tmp_path / "photos" / name, photo((164, 124)), "PNG" if name.endswith(("png", "0")) else None)
    names.append("a/" + "m" * 250 + ".png")  # whose face no file system can hold
    save(tmp_path / "photos" / names[-1], photo((164, 124)))
    done = align(tmp_path / "photos", tmp_path / "faces", yunet, 1)
    first = left_out(tmp_path / "faces")
    taken = "its face would have the name of another photo: "
    assert first == {"a/0": f"{taken}a/0.jpg", "a/1.png": f"{taken}a/1.png.jpg",
                                            f"a/{long}": "name too long", names[-1]: "name too long"}
    assert files(tmp_path / "faces") == sorted(["left_out.tsv", "top.jpg", "a/0.jpg", "a/0.png.jpg", "a/0.jpeg", "a/0.JPG",
                                                "a/1.png.jpg", "Zoë b/日本\n.jpg", "a/b/c/d.jpg",
                                                "Zoë b/" + os.fsdecode(b"\xff\t.webp.jpg")])
    assert done.aligned == len(names) - 4
    again = align(tmp_path / "photos", tmp_path / "faces", yunet, 1)
    assert left_out(tmp_path / "faces") == first and (again.aligned, again.before) == (0, done.aligned)


def test_photos_are_turned_upright(tmp_path, yunet):
    image = photo((164, 124))
    turned = Image.Exif()
    turned[0x0112] = 6
    save(tmp_path / "photos/0.jpg", np.rot90(image), exif=turned)
    align(tmp_path / "photos", tmp_path / "faces", yunet, 1)
    assert np.abs(pixels(tmp_path / "faces/0.jpg") - around(image, 164, 124)).mean() < 3


def test_what_is_no_photo_of_a_face_is_left_out_with_its_reason(photos, tmp_path, yunet):
    whole = (photos / "anna/0.jpg").read_bytes()
    contents = {"cut.jpg": whole[:-3000], "empty.jpg": b"", "._0.jpg": whole, "zeros.jpg": b"\xff\xd8\xff" + bytes(99)}
    for name, content in contents.items():
        (photos / "anna" / name).write_bytes(content)
    (photos / "anna/nothing").symlink_to("nowhere")
    Image.new("RGB", (1, 4000)).save(photos / "anna/line.png")
    align(photos, tmp_path / "faces", yunet, 1)
    found = left_out(tmp_path / "faces")
    assert all(found.pop(f"anna/{name}").startswith("cannot be decoded: ") for name in ("cut.jpg", "zeros.jpg"))
    assert found.pop("anna/line.png").startswith("the detector fails: ")
    assert found == {"anna/empty.jpg": "empty file", "anna/._0.jpg": "hidden, or a file of the system",
                     "anna/nothing": "neither a file nor a folder", "carl/nobody.jpg": "no face found",
                     "carl/notes.txt": "not an image"}


def test_where_no_photo_has_a_face_the_reasons_are_told(tmp_path, yunet):
    save(tmp_path / "photos/a/0.jpg", photo())
    with pytest.raises(RecordError, match=r"photos: no photo with a face, see .*left_out.tsv\n  1 × no face found: a/0.jpg"):
        align(tmp_path / "photos", tmp_path / "faces", yunet, 1)
    assert left_out(tmp_path / "faces") == {"a/0.jpg": "no face found"}


def test_tinyface_is_aligned_and_evaluated_as_documented_and_faces_not_found_count_as_missed(tmp_path, yunet, capsys):
    root, without = tmp_path / "TinyFace/Testing_Set", {"Probe/2_0.jpg", "Gallery_Match/3_1.jpg", "Gallery_Distractor/b.jpg"}
    names = ["Gallery_Distractor/a.jpg", "Gallery_Distractor/b.jpg"]
    names += [f"{name}_{number}.jpg" for number, folder in enumerate(("Probe", "Gallery_Match"))
              for name in (f"{folder}/1", f"{folder}/2", f"{folder}/3")]
    for name in names:
        seed = ord(Path(name).name[0])  # photos of one identity are alike
        save(root / name, photo(*([] if name in without else [(164, 124)]), seed=seed))
    for kind, name, number in (("probe", "probe", 0), ("gallery", "gallery_match", 1)):
        listed = cells([f"{identity}_{number}.jpg" for identity in (1, 2, 3)])
        savemat(root / f"{name}_img_ID_pairs.mat", {f"{kind}_set": listed, f"{kind}_ids": np.array([[1], [2], [3]])})
    write_net(tmp_path / "model.pt")
    out = tmp_path / "aligned"
    for already in (0, 5):
        cli(["align", str(tmp_path / "TinyFace"), str(out), "--detector", str(yunet)])
        assert ("5 were there" in capsys.readouterr().out) == bool(already)
        assert left_out(out) == {f"Testing_Set/{name}": "no face found" for name in without}
    command = ["evaluate", str(tmp_path / "model.pt"), str(out)]
    cli([*command, "--json"])
    found, = json.loads(capsys.readouterr().out)
    assert found["identification_rate"] == dict.fromkeys(["1", "5", "20"], 1 / 3)
    assert {name: found[name] for name in ("probes", "probes_without_mate", "probes_without_face", "gallery",
                                           "gallery_without_face")} == dict(
        probes=3, probes_without_mate=0, probes_without_face=1, gallery=3, gallery_without_face=2)
    cli(command)
    assert capsys.readouterr().out.splitlines()[-1] == (
        "aligned: no face was detected in 1 probes, which count as not found, and in 2 images of the gallery, which are not "
        "compared")
    for path in out.rglob("*.mat"):  # and likewise where names say the identities
        path.unlink()
    cli([*command[:2], str(out / "Testing_Set"), "--json"])
    assert json.loads(capsys.readouterr().out)[0] == found | {"set": "Testing_Set"}


@pytest.mark.parametrize("out, error, message", [
    ("photos", InputError, "one is inside the other"), ("photos/anna/faces", InputError, "one is inside the other"),
    (".", InputError, "one is inside the other"), ("link/faces", InputError, "one is inside the other"),
    ("pack/train.rec", InputError, "pack/train.rec: is a file, but the faces need a folder"),
    ("pack", OverwriteError, "pack/train.rec exists and is not overwritten")])
def test_wrong_folders_are_refused(photos, tmp_path, monkeypatch, yunet, out, error, message):
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("photos")
    Path("pack").mkdir()
    Path("pack/train.rec").write_bytes(b"years of work")
    before = files(tmp_path)
    with pytest.raises(error, match=message):
        align("photos", out, yunet, 1)
    with pytest.raises(RecordError, match="nowhere: no such folder"):
        align("nowhere", out, yunet, 1)
    assert files(tmp_path) == before


def test_a_link_out_of_the_photos_is_refused(photos, tmp_path, yunet):
    save(tmp_path / "elsewhere/0.jpg", photo((164, 124)))
    (photos / "anna/c").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RecordError, match="photos/anna/c is a link to .*elsewhere, outside"):
        align(photos, tmp_path / "faces", yunet, 1)
    assert not (tmp_path / "faces").exists()


def test_a_model_pack_of_insightface_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    models = tmp_path / ".insightface/models"
    with pytest.raises(F2CError, match=r"no face detector: .*\.insightface/models has no model pack. Give --detector the file "
                                       r"of YuNet.*opencv_zoo .*\[align\].*insightface.* \(pip install .*\[insightface\]'\)"):
        detector_file(None)
    for name in "antelopev2/scrfd_10g_bnkps.onnx", "buffalo_s/det_500m.onnx", "buffalo_l/w600k_r50.onnx":
        (models / name).parent.mkdir(parents=True)
        (models / name).touch()
    assert detector_file(None) == models / "antelopev2/scrfd_10g_bnkps.onnx"
    (models / "buffalo_l/det_10g.onnx").touch()
    assert detector_file(None) == models / "buffalo_l/det_10g.onnx"
    assert detector_file(models / "buffalo_s") == models / "buffalo_s/det_500m.onnx"
    assert detector_file(models / "none.onnx") == models / "none.onnx"
    with pytest.raises(F2CError, match=r"--detector .*models: the folder has no det_\*.onnx, scrfd_\*.onnx, \*yunet\*.onnx. "):
        detector_file(models)
    for name in "face_detection_yunet_2023mar_int8.onnx", "face_detection_yunet_2023mar.onnx":
        (models / name).touch()
        assert detector_file(models) == models / name  # the float one first


def other_net(path):
    write_yunet(path)
    model = onnx.load(str(path))
    del model.graph.output[2:]
    onnx.save(model, str(path))


@pytest.mark.parametrize("write, message", [
    (lambda path: None, "cannot be read: No such file or directory. Give --detector"),
    (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"), "a Git-LFS pointer"),
    (lambda path: path.write_text("<html>404</html>"), "is not an ONNX file: .*. Give --detector"),
    (other_net, "is neither YuNet, of 2023 or later, nor an SCRFD .* outputs cls_16, cls_8. Give --detector")])
def test_a_file_that_is_no_detector_is_named_before_anything_is_written(photos, tmp_path, write, message):
    write(tmp_path / "model.onnx")
    with pytest.raises(SystemExit, match=rf"--detector {tmp_path}/model.onnx: {message}"):
        cli(["align", str(photos), str(tmp_path / "faces"), "--detector", str(tmp_path / "model.onnx")])
    assert not (tmp_path / "faces").exists()


def test_yunet_that_opencv_cannot_open():
    with pytest.raises(F2CError, match="--detector none.onnx: OpenCV .* needs YuNet in ONNX"):
        YuNet(Path("none.onnx"))


@pytest.mark.parametrize("missing, write, extra", [
    ("cv2", write_yunet, "align"), ("PIL.Image", write_yunet, "align"),
    ("insightface.model_zoo.scrfd", write_scrfd, "insightface")])
def test_packages_that_are_missing_are_named(photos, tmp_path, monkeypatch, missing, write, extra):
    write(tmp_path / "model.onnx")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit, match=rf"{missing} cannot be imported .* pip install 'f2c-plugin\[{extra}\]'"):
        cli(["align", str(photos), str(tmp_path / "faces"), "--detector", str(tmp_path / "model.onnx")])
    assert not (tmp_path / "faces").exists()


def test_opencv_may_have_had_threads_before(photos, tmp_path, yunet):
    """A forked process in which OpenCV still had them would never end."""
    import cv2

    cv2.setNumThreads(4)
    cv2.warpAffine(np.zeros((2000, 2000, 3), np.uint8), np.eye(2, 3), (2000, 2000))
    assert align(photos, tmp_path / "faces", yunet, 2).aligned == 3 and cv2.getNumThreads() == 4


def test_a_detector_that_is_a_pipe_or_empty_and_a_folder_without_photos_are_refused(photos, yunet, tmp_path):
    os.mkfifo(tmp_path / "pipe.onnx")  # would be waited for
    (tmp_path / "empty.onnx").write_bytes(b"")
    for name, message in ("pipe", "is not a file"), ("empty", "is not an ONNX file: it has no outputs"):
        with pytest.raises(F2CError, match=f"{name}.onnx: {message}"):
            align(photos, tmp_path / "out", tmp_path / f"{name}.onnx", processes=1)
    (tmp_path / "none").mkdir()
    with pytest.raises(RecordError, match="none: the folder is empty"):
        align(tmp_path / "none", tmp_path / "out", yunet, processes=1)
    assert not (tmp_path / "out").exists()
