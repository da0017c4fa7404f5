"""The orientation in a JPEG's Exif data, where mxnet applies it."""

import struct

import numpy as np
from numpy.typing import NDArray

_APP1, _SCAN = 0xE1, 0xDA
ORIENTATION = 0x0112  # the tag; 1 is upright


def exif_orientation(jpeg: bytes) -> int:
    """The Exif orientation that mxnet applies, 1 to 8; 1, upright, if there is none or it cannot be read.

    mxnet 1.9.1 decodes a JPEG that begins with a JFIF segment, as most do, without looking at its Exif data. The
    others go to OpenCV, for which the first APP1 segment counts.
    """
    if jpeg[6:11] == b"JFIF\0" or b"Exif\0\0" not in jpeg:
        return 1
    try:
        at = 2
        while jpeg[at + 1] != _APP1:
            if jpeg[at] != 0xFF or jpeg[at + 1] == _SCAN:
                return 1
            at += 2 + int.from_bytes(jpeg[at + 2:at + 4], "big")
        tiff = jpeg[at + 10:]  # behind marker, length and "Exif\0\0"
        order = {b"II*\0": "<", b"MM\0*": ">"}[tiff[:4]]
        start, = struct.unpack_from(order + "I", tiff, 4)
        count, = struct.unpack_from(order + "H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, entry)
            if tag == ORIENTATION:
                return value if 1 <= value <= 8 else 1
    except (IndexError, KeyError, struct.error):
        pass
    return 1


def turned_upright(image: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """A view of an image (H, W, 3) with the Exif orientation undone."""
    if orientation >= 5:
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return image[::-1] if orientation in (3, 4, 7, 8) else image
