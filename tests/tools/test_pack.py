"""Packs made from folders: what is stored, what is left out and why, and that nothing is left half-done."""

import json
import os
import resource
import signal
import struct
import subprocess
import sys
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from f2c_plugin.cli import main as cli
from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.data.recordio import RecordFile
from f2c_plugin.data.writer import write_insightface_pack
from f2c_plugin.errors import F2CError, OverwriteError, RecordError
from f2c_plugin.tools import pack as module
from f2c_plugin.tools.image_files import storable
from f2c_plugin.tools.pack import pack
from f2c_plugin.tools.pack_sources import Folders


def picture(seed, size=(112, 112), mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).convert(mode)


def save(path, seed=0, form=None, **keys):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, **keys).save(path, form)
    return path


def stored(folder):
    """The encoded images of a pack, in order."""
    index, records = RecordDataset(folder).index, RecordFile(folder / "train.rec")
    return [bytes(records.image_record(offset).image) for offset in index.offsets.tolist()]


def left_out(folder):
    return dict(line.split("\t") for line in (folder / "left_out.tsv").read_text().splitlines())


@pytest.fixture
def source(tmp_path):
    """Three folders with 2, 0 and 3 images, in folders inside of them, too."""
    for name, path in enumerate(("anna/0.jpg", "anna/1.png", "carl/2.jpg", "carl/b/c/3.jpg", "carl/b/d.jpg")):
        save(tmp_path / "faces" / path, name)
    (tmp_path / "faces" / "bert").mkdir()
    (tmp_path / "faces" / "bert" / "notes.txt").write_text("not an image")
    return tmp_path / "faces"


def test_a_folder_becomes_a_pack_with_unchanged_files_labels_and_names(source, tmp_path, capsys):
    cli(["pack", str(source), str(tmp_path / "new" / "pack")])
    folder = tmp_path / "new" / "pack"
    assert capsys.readouterr().out.splitlines() == [
        f"{folder}: 5 images of 2 identities", f"left out, see {folder}/left_out.tsv:", "  1 × not an image: bert/notes.txt",
        "  1 × identity without a usable image, which gets no number: bert"]
    assert sorted(path.name for path in folder.iterdir()) == ["identities.json", "left_out.tsv", "property", "train.idx",
                                                              "train.rec"]
    assert json.loads((folder / "identities.json").read_text()) == ["anna", "carl"]
    assert (folder / "property").read_text() == "2,112,112\n"
    dataset = RecordDataset(folder)
    assert dataset.index.identity.tolist() == [0, 0, 1, 1, 1]
    files = [source / path for path in ("anna/0.jpg", "anna/1.png", "carl/2.jpg", "carl/b/d.jpg", "carl/b/c/3.jpg")]
    assert stored(folder) == [path.read_bytes() for path in files]
    for i, path in enumerate(files):
        assert np.array_equal(dataset.face(i), np.asarray(Image.open(path)))


def test_many_files_keep_their_order_over_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 2)
    for i in range(60):
        save(tmp_path / "faces" / f"{i % 20:02}" / f"{i:02}.jpg", i)
    packed = pack(Folders(tmp_path / "faces"), tmp_path / "pack", processes=3)
    assert packed.sizes == dict.fromkeys((f"{i:02}" for i in range(20)), 3) and not packed.left_out and not packed.unused
    assert not (tmp_path / "pack" / "left_out.tsv").exists()
    assert stored(tmp_path / "pack") == [path.read_bytes() for path in sorted((tmp_path / "faces").rglob("*.jpg"))]
    assert RecordDataset(tmp_path / "pack").index.identity.tolist() == [i // 3 for i in range(60)]


LOSSLESS = {"0.bmp": "RGB", "1.tif": "RGB", "2.gif": "P", "3.ppm": "RGB", "4.tga": "RGB", "5.bmp": "L", "6.tif": "1",
            "7.tif": "CMYK", "8.tif": "RGBA", "9.webp": "RGB", "a.avif": "RGB", "b.jp2": "RGB"}


def test_other_formats_are_stored_as_png_without_loss_or_as_jpeg(tmp_path):
    files = [save(tmp_path / "faces" / "a" / name, 1, mode=mode) for name, mode in LOSSLESS.items()]
    files.append(save(tmp_path / "faces" / "a" / "wrong suffix.jpg", 1, "WEBP"))
    for quality in None, 97:
        pack(Folders(tmp_path / "faces"), tmp_path / f"pack {quality}", quality=quality, processes=1)
    dataset, jpegs = RecordDataset(tmp_path / "pack None"), RecordDataset(tmp_path / "pack 97")
    assert len(dataset) == len(jpegs) == len(files)
    for i, (path, png, jpeg) in enumerate(zip(files, stored(dataset.root_dir), stored(jpegs.root_dir), strict=True)):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert png.startswith(b"\x89PNG") and np.array_equal(dataset.face(i), pixels), path
        assert simplejpeg.decode_jpeg_header(jpeg)[2:] == ("YCbCr", "444")
        assert np.abs(jpegs.face(i).astype(int) - pixels).mean() < 3, path


def test_jpegs_and_pngs_are_stored_as_they_are_whatever_their_suffix(tmp_path):
    forms = [("JPEG", mode) for mode in ("RGB", "L", "CMYK")] + [("PNG", mode) for mode in ("RGB", "L", "P", "RGBA", "LA", "1")]
    files = [save(tmp_path / "faces" / "a" / f"{i}.bmp", 1, form, mode=mode) for i, (form, mode) in enumerate(forms)]
    files.append(tmp_path / "faces" / "a" / "a.bmp")
    files[-1].write_bytes(encoded("JPEG") + b"behind its end")
    pack(Folders(tmp_path / "faces"), tmp_path / "pack", processes=1)
    assert stored(tmp_path / "pack") == [path.read_bytes() for path in files]
    pack(Folders(tmp_path / "faces"), tmp_path / "jpegs", quality=90, processes=1)
    assert stored(tmp_path / "jpegs")[:3] == [path.read_bytes() for path in files[:3]]
    assert all(image.startswith(b"\xff\xd8") for image in stored(tmp_path / "jpegs"))


def test_a_png_is_stored_anew_where_mxnet_or_pillow_may_refuse_it(tmp_path):
    folder = tmp_path / "faces" / "a"
    folder.mkdir(parents=True)
    (folder / "0.png").write_bytes(encoded("PNG")[:-12])  # without its end, which Pillow reads and mxnet does not
    picture(1).resize((160, 160)).save(folder / "1.jpg", icc_profile=bytes(3_000_000))  # too much text for a PNG
    assert pack(Folders(tmp_path / "faces"), tmp_path / "pack", resize=True, processes=1).sizes == {"a": 2}
    dataset = RecordDataset(tmp_path / "pack")
    assert [dataset.face(i).shape for i in range(2)] == [(112, 112, 3)] * 2
    assert all(image.endswith(encoded("PNG")[-12:]) for image in stored(tmp_path / "pack"))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grays_keep_their_upper_8_bits(tmp_path, suffix):
    deep = np.random.default_rng(0).integers(0, 1 << 16, (112, 112)).astype(np.uint16)
    (tmp_path / "faces" / "a").mkdir(parents=True)
    Image.fromarray(deep).save(tmp_path / "faces" / "a" / f"0.{suffix}")
    pack(Folders(tmp_path / "faces"), tmp_path / "pack", processes=1)
    assert np.array_equal(RecordDataset(tmp_path / "pack").face(0), np.repeat((deep >> 8)[..., None], 3, 2))


def test_a_rotated_image_is_stored_as_it_is_where_mxnet_turns_it_and_else_turned(tmp_path):
    folder = tmp_path / "faces" / "a"
    folder.mkdir(parents=True)
    for name in "0.jpg", "1.jpg", "2.png", "3.tif", "4.webp":
        picture(1).save(folder / name, exif=exif(6), **({} if name == "3.tif" else {"quality": 97, "lossless": True}))
    jpeg = (folder / "0.jpg").read_bytes()
    assert jpeg[6:10] == b"JFIF"
    (folder / "0.jpg").write_bytes(jpeg[:2] + jpeg[20:])  # mxnet looks at Exif data only where there is no JFIF segment
    pack(Folders(tmp_path / "faces"), tmp_path / "pack", processes=1)
    upright = np.asarray(picture(1).transpose(Image.Transpose.ROTATE_270))
    dataset = RecordDataset(tmp_path / "pack")
    assert stored(tmp_path / "pack")[0] == jpeg[:2] + jpeg[20:]
    for i in range(5):
        assert np.abs(dataset.face(i).astype(int) - upright).mean() < (4 if i < 2 else 0.001)


def test_the_first_frame_of_an_animation_is_taken(tmp_path):
    (tmp_path / "faces" / "a").mkdir(parents=True)
    picture(1).save(tmp_path / "faces" / "a" / "0.gif", save_all=True, append_images=[picture(2)])
    pack(Folders(tmp_path / "faces"), tmp_path / "pack", processes=1)
    assert np.abs(RecordDataset(tmp_path / "pack").face(0).astype(int) - np.asarray(picture(1))).mean() < 8


def test_other_sizes_are_left_out_or_scaled_and_cropped_at_the_centre(tmp_path):
    wide = np.zeros((224, 672, 3), np.uint8)
    wide[:, 224:448] = np.asarray(picture(1, (224, 224)))
    (tmp_path / "faces" / "a").mkdir(parents=True)
    for name, pixels in ("0.jpg", wide), ("1.png", wide.transpose(1, 0, 2)), ("2.jpg", wide[:, 224:448]):
        Image.fromarray(pixels).save(tmp_path / "faces" / "a" / name, quality=97)
    save(tmp_path / "faces" / "b" / "0.jpg", 2)
    assert pack(Folders(tmp_path / "faces"), tmp_path / "pack", processes=1).report().splitlines()[2:] == [
        "  3 × not 112×112 pixels: a/0.jpg (672×224), a/1.png (224×672), a/2.jpg (224×224)",
        "  1 × identity without a usable image, which gets no number: a"]
    assert json.loads((tmp_path / "pack" / "identities.json").read_text()) == ["b"]

    pack(Folders(tmp_path / "faces"), tmp_path / "resized", resize=True, processes=1)
    assert stored(tmp_path / "resized")[3] == (tmp_path / "faces" / "b" / "0.jpg").read_bytes()
    face = np.asarray(picture(1, (224, 224)).resize((112, 112), Image.Resampling.LANCZOS)).astype(int)
    dataset = RecordDataset(tmp_path / "resized")
    for i, expected in enumerate((face, face.transpose(1, 0, 2), face)):
        assert np.abs(dataset.face(i) - expected).mean() < 6
    pack(Folders(tmp_path / "faces"), tmp_path / "jpegs", resize=True, quality=95, processes=1)
    assert all(map(simplejpeg.is_jpeg, stored(tmp_path / "jpegs")))


def announced_png(width, height):
    """A PNG of a few bytes that announces any size."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


def exif(orientation):
    data = Image.Exif()
    data[0x0112] = orientation
    return data


def encoded(form, exif=b"", **keys):
    out = BytesIO()
    picture(1, **keys).save(out, form, exif=exif)
    return out.getvalue()


def noisy_jpeg(size):
    return simplejpeg.encode_jpeg(np.random.default_rng(size).integers(0, 256, (size, size, 3), np.uint8), 90)


def damaged(jpeg):
    """Cut short, and with zeros inside."""
    middle = len(jpeg) // 2
    return jpeg[:middle], jpeg[:middle - 1000] + bytes(1000) + jpeg[middle:]


LEFT_OUT = {
    "text.jpg": (b"<html>404</html>", "not an image"),
    "eps.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 112 112\n%%EndComments\n", "not an image"),
    "empty.jpg": (b"", "empty file"),
    "zeros.jpg": (bytes(999), "not an image"),
    "cut.jpg": (damaged(noisy_jpeg(112))[0], "cannot be decoded: "),
    "zeroed inside.jpg": (damaged(noisy_jpeg(112))[1], "cannot be decoded: "),
    "zeroed header.jpg": (noisy_jpeg(112)[:4] + bytes(400) + noisy_jpeg(112)[404:], "cannot be decoded: "),
    "cut.png": (encoded("PNG")[:-60], "cannot be decoded: "),
    "cut behind Exif.png": (encoded("PNG", exif=exif(1))[:-60], "cannot be decoded: "),
    "cut.bmp": (encoded("BMP")[:-60], "cannot be decoded: "),
    "other size.jpg": (encoded("JPEG", size=(160, 100)), "not 112×112 pixels: 160×100"),
    "large.png": (announced_png(9000, 9000), "not 112×112 pixels: 9000×9000"),
    "bomb.png": (announced_png(60000, 60000), "cannot be decoded: Image size (3600000000 pixels) exceeds limit"),
    "pointer.jpg": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a Git-LFS pointer"),
    "._0.jpg": (encoded("JPEG"), "hidden, or a file of the system"),
    "Thumbs.db": (b"", "hidden, or a file of the system"),
    ".DS_Store": (b"", "hidden, or a file of the system"),
}


def test_what_cannot_be_used_is_left_out_with_its_reason(tmp_path):
    save(tmp_path / "faces" / "a" / "good.jpg")
    for name, (content, _) in LEFT_OUT.items():
        (tmp_path / "faces" / "a" / name).write_bytes(content)
    packed = pack(Folders(tmp_path / "faces"), tmp_path / "pack", processes=1)
    found = left_out(tmp_path / "pack")
    assert packed.sizes == {"a": 1} and found.keys() == {f"a/{name}" for name in LEFT_OUT}
    for name, (_, reason) in LEFT_OUT.items():
        assert found[f"a/{name}"].startswith(reason)
    assert packed.left_out["not an image"] == 3 and sum(packed.left_out.values()) == len(LEFT_OUT)
    assert "  3 × not an image: a/eps.jpg, a/text.jpg, a/zeros.jpg\n" in packed.report()
    assert "  7 × cannot be decoded: a/bomb.png (Image size" in packed.report() and "), …" in packed.report()


def test_damaged_and_huge_images_are_left_out_when_resizing_too(tmp_path):
    save(tmp_path / "faces" / "a" / "good.jpg")
    cut, zeroed = damaged(noisy_jpeg(224))
    for name, content in {"cut.jpg": cut, "zeroed.jpg": zeroed, "large.png": announced_png(10000, 10000)}.items():
        (tmp_path / "faces" / "a" / name).write_bytes(content)
    pack(Folders(tmp_path / "faces"), tmp_path / "pack", resize=True, processes=1)
    found = left_out(tmp_path / "pack")
    assert all(found[f"a/{name}"].startswith("cannot be decoded: ") for name in ("cut.jpg", "zeroed.jpg")) and len(found) == 3
    assert found["a/large.png"].startswith("cannot be decoded: Image size (100000000 pixels) exceeds limit")


def test_everything_that_is_not_a_file_of_an_identity_is_left_out(tmp_path):
    root = tmp_path / "faces"
    for path in "a/good.jpg", "__MACOSX/a/0.jpg", ".hidden/0.jpg", "a/.thumbnails/0.jpg", "stray.jpg":
        save(root / path)
    os.mkfifo(root / "a" / "fifo.jpg")
    (root / "a" / "nothing").symlink_to("nowhere")
    (root / "a" / "itself").symlink_to("itself")
    (root / "a" / "around").symlink_to("..")
    (root / "a" / "deep").mkdir()
    (root / "a" / "deep" / "around").symlink_to("../../a")
    with open(root / "a" / "huge.jpg", "wb") as file:
        file.truncate(1 << 40)
    assert pack(Folders(root), tmp_path / "pack", processes=1).sizes == {"a": 1}
    hidden, no_file, around = "hidden, or a file of the system", "neither a file nor a folder", "link to a folder around it"
    assert left_out(tmp_path / "pack") == {
        "__MACOSX": hidden, ".hidden": hidden, "a/.thumbnails": hidden, "stray.jpg": "not in the folder of an identity",
        "a/fifo.jpg": no_file, "a/nothing": no_file, "a/itself": no_file, "a/around": around, "a/deep/around": around,
        "a/huge.jpg": "larger than 64 MB: 1048576 MB"}


def test_files_and_folders_that_vanish_or_may_not_be_read_are_reported(source, tmp_path, monkeypatch):
    assert storable(tmp_path / "gone.jpg", False, None) == "cannot be read: No such file or directory"
    scandir, read = os.scandir, Path.read_bytes

    def refuse(path):
        if isinstance(path, Path) and path.name in ("b", "0.jpg"):  # root, who may run this, may read everything
            raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(os, "scandir", lambda path: refuse(path) or scandir(path))
    monkeypatch.setattr(Path, "read_bytes", lambda path: refuse(path) or read(path))
    pack(Folders(source), tmp_path / "pack", processes=1)
    found = left_out(tmp_path / "pack")
    assert found["carl/b"] == found["anna/0.jpg"] == "cannot be read: Permission denied"
    assert RecordDataset(tmp_path / "pack").index.identity.tolist() == [0, 1]


def test_odd_names_are_kept_and_shown_on_one_line(tmp_path, capsys):
    names = ["Zoë b", "日本\n", os.fsdecode(b"\xff\t")]
    for name in names:
        (tmp_path / "faces" / name).mkdir(parents=True)
        (tmp_path / "faces" / name / os.fsdecode(b"\xfe.jpg")).write_bytes(encoded("JPEG"))
        (tmp_path / "faces" / name / os.fsdecode(b"\xfd\t.jpg")).write_bytes(b"")
    cli(["pack", str(tmp_path / "faces"), str(tmp_path / "pack")])
    text = (tmp_path / "pack" / "identities.json").read_bytes().decode()
    assert json.loads(text) == sorted(names) and "Zoë b" in text
    assert list(left_out(tmp_path / "pack")) == [f"{name}/\\udcfd\\t.jpg" for name in ("Zoë b", "日本\\n", "\\udcff\\t")]
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_folder_without_usable_images_is_refused_with_the_reasons(tmp_path):
    for folder in "missing", "empty":
        with pytest.raises(RecordError, match=folder):
            pack(Folders(tmp_path / folder), tmp_path / "pack")
        (tmp_path / "empty").mkdir(exist_ok=True)
    save(tmp_path / "flat" / "0.jpg")
    save(tmp_path / "large" / "a" / "0.jpg", size=(500, 500))
    for folder, reason in ("flat", "1 × not in the folder of an identity: 0.jpg"), ("large", r"pixels: a/0.jpg \(500×500\)"):
        with pytest.raises(RecordError, match=rf"{folder}: no image to pack; it must hold a folder of images [^$]*{reason}"):
            pack(Folders(tmp_path / folder), tmp_path / "pack", processes=1)
    assert not (tmp_path / "pack").exists()


@pytest.mark.parametrize("name", ["train.rec", "train.idx", "property", "identities.json", "left_out.tsv"])
def test_nothing_is_overwritten(source, tmp_path, name):
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / name).write_bytes(b"years of work")
    with pytest.raises(SystemExit, match=f"{name} exists and is not overwritten"):
        cli(["pack", str(source), str(tmp_path / "pack")])
    assert [path.read_bytes() for path in (tmp_path / "pack").iterdir()] == [b"years of work"]


def test_a_pack_that_appears_meanwhile_is_not_overwritten(source, tmp_path, monkeypatch):
    def written_by_another(*arguments):
        write_insightface_pack(*arguments)
        (tmp_path / "pack" / "train.rec").write_bytes(b"years of work")
    monkeypatch.setattr(module, "write_insightface_pack", written_by_another)
    with pytest.raises(OverwriteError, match="train.rec exists and is not overwritten"):
        pack(Folders(source), tmp_path / "pack", processes=1)
    assert [path.read_bytes() for path in (tmp_path / "pack").iterdir()] == [b"years of work"]


@pytest.mark.parametrize("arguments, message", [
    (["faces", "faces"], "faces is inside .*faces: choose a folder outside"),
    (["faces", "faces/anna/pack"], "pack is inside .*faces"),
    (["faces", "link/pack"], "link/pack is inside .*faces"),
    (["faces", "file/pack"], "file"),
    (["faces", "pack", "--quality", "0"], "--quality 0: must be from 1 to 100"),
    (["faces", "pack", "--quality", "101"], "--quality 101: must be from 1 to 100")])
def test_wrong_arguments_are_refused_before_the_work_begins(source, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "worker_pool", None)
    Path("link").symlink_to("faces")
    Path("file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=message):
        cli(["pack", *arguments])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("what", ["file", "folder", "folder inside", "top folder"])
def test_links_are_followed_only_inside_the_folder(tmp_path, monkeypatch, what):
    save(tmp_path / "secret" / "key.jpg", 1)
    folder = tmp_path / "faces" / "a"
    save(folder / "1.jpg", 2)
    (folder / "2.jpg").symlink_to("1.jpg")
    (tmp_path / "faces" / "b").symlink_to("a")
    assert pack(Folders(tmp_path / "faces"), tmp_path / "good", processes=1).sizes == {"a": 2, "b": 2}
    link, target = {"file": (folder / "3.jpg", tmp_path / "secret" / "key.jpg"), "folder": (folder / "c", tmp_path / "secret"),
                    "folder inside": (folder / "c" / "d", tmp_path / "secret"),
                    "top folder": (tmp_path / "faces" / "c", "../secret")}[what]
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(target)
    monkeypatch.setattr(module, "worker_pool", None)  # before the work begins
    with pytest.raises(RecordError, match=rf"{link} is a link to .*secret.*, outside .*faces: replace the link with a copy"):
        pack(Folders(tmp_path / "faces"), tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_pillow_is_named_where_it_is_needed_and_missing(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(F2CError, match=r"1.png is not a JPEG of 112×112 in RGB or gray: PIL.*pip install .*\[images\]"):
        pack(Folders(source), tmp_path / "pack", processes=1)
    assert not (tmp_path / "pack").exists()
    (source / "anna" / "1.png").unlink()
    (source / "bert" / "notes.txt").unlink()
    assert pack(Folders(source), tmp_path / "pack", processes=1).sizes == {"anna": 1, "carl": 3}


def noise(folder, count):
    """Images that compress badly: about 37 kB each."""
    (folder / "a").mkdir(parents=True)
    for i in range(count):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (112, 112, 3), np.uint8)).save(folder / "a" / f"{i}.png")


@pytest.mark.parametrize("beyond_images", [-50_000, 50], ids=["while decoding", "while writing"])
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, beyond_images):
    noise(tmp_path / "faces", 5)
    size = sum(path.stat().st_size for path in (tmp_path / "faces" / "a").iterdir())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + beyond_images, before[1]))  # of each file
    try:
        with pytest.raises(OSError, match="train.rec"):
            pack(Folders(tmp_path / "faces"), tmp_path / "pack", processes=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "pack").exists()


# A worker says that it has begun, and goes on when it is told.
HELD = """
import os, sys
from pathlib import Path
from f2c_plugin.cli import main
from f2c_plugin.tools import image_files, pack

def held(path, resize, quality):
    os.write(int(sys.argv[1]), b"begun\\n")
    while not Path("go").exists():
        pass
    if Path("go").read_text():
        os.kill(os.getpid(), 9)
    return image_files.storable(path, resize, quality)

pack.storable = held
main(["pack", "faces", "pack"])
"""


@pytest.fixture
def held(source, tmp_path):
    """A process that packs, once a worker holds the first file."""
    reading, writing = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", HELD, str(writing)], cwd=tmp_path, pass_fds=[writing], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    os.close(writing)
    with open(reading) as begun:
        assert begun.readline() == "begun\n"
        yield process
        (tmp_path / "go").touch()


def test_ctrl_c_leaves_nothing_and_no_process(held, tmp_path):
    os.killpg(held.pid, signal.SIGINT)  # as a terminal does it: to the workers, too
    (tmp_path / "go").touch()
    out, err = held.communicate(timeout=60)  # until all processes that hold the pipes have ended
    assert held.returncode == 130 and out == "" and err == "f2c-plugin pack: interrupted\n"
    assert not (tmp_path / "pack").exists()


def test_workers_end_with_a_killed_parent(held, tmp_path):
    held.kill()
    held.communicate(timeout=60)
    assert held.returncode == -signal.SIGKILL and not (tmp_path / "pack" / "train.rec").exists()


def test_a_killed_worker_ends_the_packing(held, tmp_path):
    (tmp_path / "go").write_text("and die")
    _, err = held.communicate(timeout=60)
    assert held.returncode == 1 and err == ("f2c-plugin pack: a worker process was killed; most often, the machine has too "
                                            "little memory\n")
    assert not (tmp_path / "pack").exists()


@pytest.mark.mxnet
def test_mxnet_reads_the_same_pixels(mxnet_python, tmp_path):
    """Of JPEGs, also with Exif data behind a JFIF segment, of PNGs, and of what is stored as PNG."""
    folder = tmp_path / "faces" / "a"
    for name, mode in {"0.jpg": "RGB", "1.jpg": "L", "2.png": "RGB", "3.png": "P", "4.png": "RGBA", "5.tif": "CMYK",
                       "6.webp": "RGB", "7.gif": "P", "8.png": "LA", "9.png": "1"}.items():
        save(folder / name, 1, mode=mode)
    for name in "e.jpg", "e.png":
        picture(1).save(folder / name, exif=exif(6))
    Image.fromarray(np.arange(112 * 112).reshape(112, 112).astype(np.uint16) * 5).save(folder / "deep.png")
    pack(Folders(tmp_path / "faces"), tmp_path / "pack", processes=1)
    script = ("import mxnet as mx, sys; r = mx.recordio.MXIndexedRecordIO(*sys.argv[1:], 'r');"
              "end = int(mx.recordio.unpack(r.read_idx(0))[0].label[0]);"
              "images = [mx.recordio.unpack(r.read_idx(key))[1] for key in range(1, end)];"
              "print(*[mx.image.imdecode(image).asnumpy().tobytes().hex() for image in images])")
    read = subprocess.run([mxnet_python, "-c", script, tmp_path / "pack" / "train.idx", tmp_path / "pack" / "train.rec"],
                          check=True, capture_output=True, text=True).stdout.split()
    dataset = RecordDataset(tmp_path / "pack")
    assert len(read) == 13
    for i, pixels in enumerate(read):
        assert np.array_equal(np.frombuffer(bytes.fromhex(pixels), np.uint8).reshape(112, 112, 3), dataset.face(i)), i
