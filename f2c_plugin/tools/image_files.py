"""Image files: what a pack stores of them, a JPEG or PNG of 112 × 112 pixels; their pictures; or why there are none."""

import stat
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import simplejpeg

from f2c_plugin.data.dataset import IMAGE_SIZE, decode_face
from f2c_plugin.data.exif import ORIENTATION, exif_orientation
from f2c_plugin.errors import F2CError
from f2c_plugin.utils.extras import require
from f2c_plugin.utils.git_lfs import NOT_FETCHED, is_lfs_pointer

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
_LARGEST_FILE = 1 << 26  # bytes; no picture of a face is larger
_FACE = IMAGE_SIZE, IMAGE_SIZE
Made = TypeVar("Made")


def storable(source: Path | bytes, resize: bool, quality: int | None) -> bytes | str:
    """The encoded image to store for a file or its content, or why there is none: "kind of reason" or "kind of reason: detail".

    A JPEG of 112 × 112 is stored as it is, and so is a PNG if ``quality`` is None, unless mxnet would read it otherwise.
    Other images become RGB PNGs, or JPEGs of that quality. With ``resize``, other sizes are scaled to 112 on the shorter
    side and cropped at the centre. Raises F2CError if Pillow is needed and missing.
    """
    return _made_of(source, lambda encoded: (_of_jpeg if _begins_as_jpeg(encoded) else _of_other)(encoded, resize, quality))


def upright(path: Path) -> Any | str:
    """The picture in a file, of any size, as Pillow's image in RGB; or why there is none, as of ``storable``."""
    def made(encoded: bytes) -> Any | str:
        image = _whole_jpeg(encoded) if _begins_as_jpeg(encoded) else _opened(encoded)
        return image if isinstance(image, str) else _upright(image)
    return _made_of(path, made)


def _made_of(source: Path | bytes, make: Callable[[bytes], Made | str]) -> Made | str:
    """What ``make`` returns for a file or its content, or why it cannot."""
    try:
        if isinstance(source, Path):
            found = source.stat()
            if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
                return "neither a file nor a folder"
            if reason := too_large(found.st_size):
                return reason
        encoded = source.read_bytes() if isinstance(source, Path) else source
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if not encoded:
        return "empty file"
    if is_lfs_pointer(encoded):
        return NOT_FETCHED
    try:
        return make(encoded)
    except F2CError as error:
        name = source if isinstance(source, Path) else "an image"
        raise F2CError(f"{name} is not a JPEG of {IMAGE_SIZE}×{IMAGE_SIZE} in RGB or gray: {error}") from error
    except Exception as error:  # decoders raise almost anything for damaged files
        return f"cannot be decoded: {error}"


def too_large(size: int) -> str:
    """Why a file of ``size`` bytes is left out; empty if it is not."""
    return f"larger than {_LARGEST_FILE >> 20} MB: {size >> 20} MB" if size > _LARGEST_FILE else ""


def _begins_as_jpeg(encoded: bytes) -> bool:
    return encoded.startswith(b"\xff\xd8\xff")  # simplejpeg.is_jpeg takes none with bytes behind its end


def _of_jpeg(encoded: bytes, resize: bool, quality: int | None) -> bytes | str:
    height, width, _, _ = simplejpeg.decode_jpeg_header(encoded)
    if (width, height) == _FACE:
        decode_face(encoded)
        if b"Exif\0\0" not in encoded or _orientation(image := _open(encoded)) == exif_orientation(encoded):
            return encoded
        return _encoded(image, quality)
    if not resize:
        return _wrong_size(int(width), int(height))
    return _encoded(_whole_jpeg(encoded), quality)


def _whole_jpeg(encoded: bytes) -> Any:
    """A Pillow image. Raises ValueError where Pillow draws gray for what is missing."""
    _, _, colorspace, _ = simplejpeg.decode_jpeg_header(encoded)
    image = _open(encoded)
    if colorspace not in ("CMYK", "YCCK"):
        simplejpeg.decode_jpeg(encoded)
    return image


def _of_other(encoded: bytes, resize: bool, quality: int | None) -> bytes | str:
    image = _opened(encoded)
    if isinstance(image, str):
        return image
    if image.size != _FACE and not resize:
        return _wrong_size(*image.size)
    if (image.format == "PNG" and image.size == _FACE and quality is None and not image.mode.startswith("I")
            and _orientation(image) == 1 and b"IEND\xaeB`\x82" in encoded):  # mxnet needs the end, Pillow does not
        decode_face(encoded)
        return encoded
    return _encoded(image, quality)


def _opened(encoded: bytes) -> Any | str:
    try:
        return _open(encoded)
    except require("PIL.Image", extra="images").UnidentifiedImageError:
        return "not an image"


def _orientation(image: Any) -> int:
    return image.getexif().get(ORIENTATION, 1)


def _wrong_size(width: int, height: int) -> str:
    return f"not {IMAGE_SIZE}×{IMAGE_SIZE} pixels: {width}×{height}"


def _open(encoded: bytes) -> Any:
    """A Pillow image, not decoded yet. Raises an exception if it would need gigabytes."""
    pillow = require("PIL.Image", extra="images")
    pillow.init()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metadata
        warnings.simplefilter("error", pillow.DecompressionBombWarning)
        return pillow.open(BytesIO(encoded), formats=[name for name in pillow.ID if name != "EPS"])  # EPS is a program


def _encoded(image: Any, quality: int | None) -> bytes | str:
    """The first frame, upright, and of a face's size, as PNG or as JPEG of ``quality``."""
    pillow, operations = require("PIL.Image", extra="images"), require("PIL.ImageOps", extra="images")
    image = _upright(image)
    if isinstance(image, str):
        return image
    if image.size != _FACE:
        image = operations.fit(image, _FACE, pillow.Resampling.LANCZOS)
    if quality is not None:
        return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, "RGB", "444")
    out = BytesIO()
    pillow.fromarray(np.asarray(image)).save(out, "PNG")  # without a colour profile, which Pillow may refuse to read
    return out.getvalue()


def _upright(image: Any) -> Any | str:
    """The first frame as RGB of 8 bits, upright."""
    pillow, operations = require("PIL.Image", extra="images"), require("PIL.ImageOps", extra="images")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = operations.exif_transpose(image)
        if image.mode.startswith("I;16"):
            image = pillow.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            return "pixels of 32 bits, which have no defined white"
        return image.convert("RGB")
