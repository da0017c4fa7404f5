"""Images of another size are found when a pack is indexed, without decoding them."""

from io import BytesIO

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from f2c_plugin.cli import main as cli
from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.data.from_config import open_pack
from f2c_plugin.data.image_sizes import has_other_size
from f2c_plugin.data.recordio import MAGIC_BYTES, RecordFile
from f2c_plugin.data.writer import RecordWriter, pack_image_record
from f2c_plugin.errors import RecordError


def encoded(width, height, form="JPEG", **options):
    """An image as Pillow writes it."""
    file = BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(file, form, **options)
    return file.getvalue()


FACE = simplejpeg.encode_jpeg(np.zeros((112, 112, 3), np.uint8))
RIGHT = {"JPEG": FACE, "PNG": encoded(112, 112, "PNG"), "progressive": encoded(112, 112, progressive=True),
         "with ICC profile": encoded(112, 112, icc_profile=bytes(70_000)), "grayscale": simplejpeg.encode_jpeg(
             np.zeros((112, 112, 1), np.uint8), colorspace="GRAY")}
OTHER = {"JPEG": encoded(160, 160), "PNG": encoded(96, 112, "PNG"), "progressive": encoded(112, 113, progressive=True),
         "with ICC profile": encoded(1320, 504, icc_profile=bytes(70_000)), "tiny": encoded(1, 1), "large": encoded(112, 3000),
         "with a long ICC profile": encoded(50, 50, icc_profile=bytes(3_000_000)),
         "with fill bytes": encoded(50, 50).replace(b"\xff\xdb", b"\xff\xff\xff\xdb", 1)}
UNKNOWN = {"nothing": b"", "a word": b"face", "start of a JPEG": FACE[:100], "start of a PNG": RIGHT["PNG"][:20],
           "no frame": FACE[:20] + FACE[FACE.index(b"\xff\xda"):], "segments without end": b"\xff\xd8" + b"\xff\xe0\0\2" * 99,
           "a bitmap": encoded(50, 50, "BMP"), "in parts": encoded(50, 50, comment=4 * (MAGIC_BYTES + b"\0"))}


def write(folder, images, labels=None):
    """A pack without bookkeeping, with ``labels`` or one identity for each image."""
    with RecordWriter(folder / "train.rec") as writer:
        for key, image in enumerate(images):
            writer.write(key, pack_image_record(key if labels is None else labels[key], image, key))


def test_sizes_are_read_from_the_headers_of_jpeg_and_png(tmp_path):
    write(tmp_path, [*RIGHT.values(), *OTHER.values(), *UNKNOWN.values()])
    records = RecordFile(tmp_path / "train.rec")
    offsets = np.array([offset for offset, _ in records.scan()])
    wanted = [False] * len(RIGHT) + [True] * len(OTHER) + [False] * len(UNKNOWN)
    assert has_other_size(records, offsets).tolist() == wanted


@pytest.mark.parametrize("name", OTHER)
def test_training_is_refused_before_it_begins_or_leaves_them_out(tmp_path, name, caplog):
    write(tmp_path, [FACE, OTHER[name], FACE, OTHER[name]], labels=[0, 0, 1, 2])
    with pytest.raises(RecordError, match=r"train.rec: record 1 cannot be used: it has .*×.* pixels, but aligned faces have "
                                          r"112×112 \(2 such records\).*f2c_skip_damaged"):
        RecordDataset(tmp_path)
    dataset = open_pack({"rec": str(tmp_path), "num_classes": 2, "num_image": 4, "f2c_skip_damaged": True})
    assert dataset.index.keys.tolist() == [0, 2] and dataset.index.unusable[:, 0].tolist() == [1, 3]
    assert "2 records cannot be used and are left out" in caplog.text


def test_a_pack_of_nothing_but_another_size_is_refused(tmp_path, capsys):
    write(tmp_path, [OTHER["JPEG"]] * 3)
    for skip in False, True:
        with pytest.raises(RecordError, match="no image has 112 × 112 pixels: .*pack --resize"):
            RecordDataset(tmp_path, skip_damaged=skip)
    with pytest.raises(SystemExit, match="no image has 112 × 112 pixels"):
        cli(["index", str(tmp_path), "--verify"])
    assert "record 1: it has 160×160 pixels" in capsys.readouterr().out
