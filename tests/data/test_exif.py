"""A JPEG is turned upright by its Exif orientation, as OpenCV and so mxnet does."""

import json
import struct
import subprocess
from hashlib import sha256
from io import BytesIO

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from f2c_plugin.data.dataset import decode_face, decode_image
from f2c_plugin.data.exif import exif_orientation
from f2c_plugin.data.writer import RecordWriter, pack_image_record

PICTURE = np.random.default_rng(0).integers(0, 256, (7, 7, 3), np.uint8).repeat(16, 0).repeat(16, 1)
WITH_JFIF = simplejpeg.encode_jpeg(PICTURE, 90)
JFIF = WITH_JFIF[2:20]
JPEG = WITH_JFIF[:2] + WITH_JFIF[20:]  # without the JFIF segment
COMMENT = b"\xff\xfe\x00\x06face"
XMP = b"\xff\xe1\x00\x21http://ns.adobe.com/xap/1.0/\0\0\0"


def exif(orientation, order="<", tag=0x0112, entries=1, magic=None, name=b"Exif\0\0"):
    """An APP1 segment with an Exif orientation."""
    tiff = (magic or {"<": b"II*\0", ">": b"MM\0*"}[order]) + struct.pack(order + "IH", 8, entries)
    tiff += struct.pack(order + "HHIHH", 0x0100, 3, 1, 112, 0) * (entries - 1)
    tiff += struct.pack(order + "HHIHH", tag, 3, 1, orientation, 0) + bytes(4)
    return b"\xff\xe1" + struct.pack(">H", 8 + len(tiff)) + name + tiff


def jpeg_with(*segments):
    return JPEG[:2] + b"".join(segments) + JPEG[2:]


TURNED = {f"{orientation}{order}": (jpeg_with(exif(orientation, order)), orientation)
          for orientation in range(1, 9) for order in "<>"}
ODD = {
    "before JFIF": (jpeg_with(exif(6), JFIF), 6),
    "behind JFIF, which mxnet does not turn": (jpeg_with(JFIF, exif(6)), 1),
    "behind JFIF behind a comment, which it does": (jpeg_with(COMMENT, JFIF, exif(6)), 6),
    "behind a comment": (jpeg_with(COMMENT, exif(6)), 6),
    "not the first entry": (jpeg_with(exif(6, entries=3)), 6),
    "XMP comes first": (jpeg_with(XMP, exif(6)), 1),
    "two of them": (jpeg_with(exif(3), exif(6)), 3),
    "another tag": (jpeg_with(exif(6, tag=0x0111)), 1),
    "orientation 0": (jpeg_with(exif(0)), 1),
    "orientation 9": (jpeg_with(exif(9)), 1),
    "neither II nor MM": (jpeg_with(exif(6, magic=b"XX*\0")), 1),
    "cut short": (jpeg_with(exif(6)[:24][:2] + b"\x00\x16" + exif(6)[4:24]), 1),
    "in another segment": (jpeg_with(exif(6).replace(b"\xff\xe1", b"\xff\xe2")), 1),
    "in a comment": (jpeg_with(b"\xff\xfe\x00\x0cExif\0\0II*\0"), 1),
}


@pytest.mark.parametrize("jpeg, orientation", [pytest.param(*case, id=name) for name, case in TURNED.items()])
def test_all_orientations_are_those_of_pillow(jpeg, orientation):
    assert exif_orientation(jpeg) == orientation
    upright = ImageOps.exif_transpose(Image.open(BytesIO(jpeg)))
    marked = decode_face(JPEG), np.asarray(upright)
    # Pillow decodes the same pixels up to rounding, and the turns are exact.
    assert np.abs(decode_face(jpeg).astype(int) - marked[1].astype(int)).max() <= 2
    assert np.array_equal(np.sort(decode_face(jpeg), None), np.sort(marked[0], None))


def test_images_of_any_shape_are_turned_and_huge_ones_refused():
    plain = simplejpeg.encode_jpeg(PICTURE[:64], 90)
    turned = decode_image(plain[:2] + exif(6) + plain[20:])
    assert turned.shape == (112, 64, 3) and np.array_equal(turned, np.rot90(decode_image(plain), -1))
    with pytest.raises(ValueError, match="it has 9000×8 pixels, more than 8192×8192"):
        decode_image(simplejpeg.encode_jpeg(np.zeros((8, 9000, 3), np.uint8)))


@pytest.mark.parametrize("jpeg, orientation", [pytest.param(*case, id=name) for name, case in ODD.items()])
def test_unusual_exif_data(jpeg, orientation):
    assert exif_orientation(jpeg) == orientation
    decode_face(jpeg)


def test_whatever_the_bytes_an_orientation_comes_out():
    random = np.random.default_rng(1)
    for jpeg, _ in [*TURNED.values(), *ODD.values()]:
        for _ in range(50):
            changed = bytearray(jpeg)
            changed[random.integers(len(JPEG) // 4)] = random.integers(256)
            assert 1 <= exif_orientation(bytes(changed[:random.integers(2, len(changed))])) <= 8
    assert exif_orientation(b"Exif\0\0") == 1


@pytest.mark.mxnet
def test_pixels_are_those_of_mxnet(mxnet_python, tmp_path):
    cases = TURNED | ODD
    with RecordWriter(tmp_path / "train.rec") as writer:
        for key, (jpeg, _) in enumerate(cases.values()):
            writer.write(key, pack_image_record(0, jpeg, key))
    script = ("import hashlib, json, sys, mxnet as mx\n"
              "pack = mx.recordio.MXIndexedRecordIO(*sys.argv[1:], 'r')\n"
              "images = [mx.image.imdecode(mx.recordio.unpack(pack.read_idx(key))[1]) for key in pack.keys]\n"
              "print(json.dumps([hashlib.sha256(image.asnumpy().tobytes()).hexdigest() for image in images]))")
    read = subprocess.run([mxnet_python, "-c", script, tmp_path / "train.idx", tmp_path / "train.rec"],
                          check=True, capture_output=True, text=True)
    ours = [sha256(decode_face(jpeg).tobytes()).hexdigest() for jpeg, _ in cases.values()]
    differ = [name for name, one, other in zip(cases, ours, json.loads(read.stdout), strict=True) if one != other]
    assert not differ
