"""Reads the sizes of many encoded images at once, without decoding them."""

import numpy as np
from numpy.typing import NDArray

from f2c_plugin.data.recordio import Int64s, RecordFile

IMAGE_SIZE = 112  # pixels, in both directions
_MOST_SEGMENTS = 1024  # of a JPEG before its size; a colour profile alone can have 255
_START_OF_SCAN = 0xDA
# Markers of the frame headers, which hold the size: SOF0 to SOF15 without DHT, JPG and DAC.
_IS_FRAME = np.isin(np.arange(256), [marker for marker in range(0xC0, 0xD0) if marker not in (0xC4, 0xC8, 0xCC)])


def has_other_size(records: RecordFile, offsets: Int64s) -> NDArray[np.bool_]:
    """Whether the images of the records at ``offsets`` (n,) are JPEG or PNG of a size other than 112 × 112, bool (n,).

    Where the size cannot be found without decoding, False.
    """
    content = np.frombuffer(records.bytes, np.uint8)
    other = np.zeros(len(offsets), bool)
    for positions, start, end in records.image_spans(offsets):
        size = _png_sizes(content, start, end) + _jpeg_sizes(content, start, end)
        other[positions] = (size > 0).all(1) & (size != IMAGE_SIZE).any(1)
    return other


def _png_sizes(content: NDArray[np.uint8], start: Int64s, end: Int64s) -> Int64s:
    """Width and height, int64 (n, 2); 0 where it is no PNG."""
    size = np.zeros((len(start), 2), np.int64)
    png = np.flatnonzero(start + 24 <= end)
    for i, byte in enumerate(b"\x89PNG"):
        png = png[content[start[png] + i] == byte]
    for column, at in enumerate((16, 20)):
        size[png, column] = sum(content[start[png] + at + i].astype(np.int64) << 8 * (3 - i) for i in range(4))
    return size


def _jpeg_sizes(content: NDArray[np.uint8], start: Int64s, end: Int64s) -> Int64s:
    """Height and width, int64 (n, 2); 0 where it is no JPEG. Goes from segment to segment in all images together."""
    size = np.zeros((len(start), 2), np.int64)
    jpeg = np.flatnonzero(start + 2 <= end)
    jpeg = jpeg[(content[start[jpeg]] == 0xFF) & (content[start[jpeg] + 1] == 0xD8)]
    at = start + 2

    def two_bytes(images: Int64s, where: int) -> Int64s:
        return content[at[images] + where].astype(np.int64) << 8 | content[at[images] + where + 1]
    for _ in range(_MOST_SEGMENTS):
        jpeg = jpeg[at[jpeg] + 9 <= end[jpeg]]
        jpeg = jpeg[content[at[jpeg]] == 0xFF]
        marker = content[at[jpeg] + 1]
        framed = jpeg[_IS_FRAME[marker]]
        size[framed, 0], size[framed, 1] = two_bytes(framed, 5), two_bytes(framed, 7)
        jpeg = jpeg[~_IS_FRAME[marker] & (marker != _START_OF_SCAN)]
        at[jpeg] += np.where(content[at[jpeg] + 1] == 0xFF, 1, 2 + two_bytes(jpeg, 2))  # markers may have fill bytes before
    return size
