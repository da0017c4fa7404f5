"""The images and labels of a pack, one by one or in batches."""

from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import simplejpeg  # pyright: ignore[reportMissingTypeStubs]
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from f2c_plugin.data.exif import exif_orientation, turned_upright
from f2c_plugin.data.image_sizes import IMAGE_SIZE
from f2c_plugin.data.index import open_index
from f2c_plugin.data.recordio import FLOAT32_EXACT, Buffer, Int64s, RecordFile, image_of_record, rec_in
from f2c_plugin.errors import RecordError
from f2c_plugin.utils.extras import require
from f2c_plugin.utils.git_lfs import NOT_FETCHED, is_lfs_pointer

Pixels = NDArray[np.uint8]
MAX_SIDE = 8192  # pixels; a small file can announce a huge picture


class OtherSize(ValueError):
    """A whole image that has not the size asked for."""

    def __init__(self, width: int, height: int):
        super().__init__(f"it has {width}×{height} pixels, but aligned faces have {IMAGE_SIZE}×{IMAGE_SIZE}")
        self.width, self.height = width, height


def decode_face(encoded: Buffer, out: Pixels | None = None) -> Pixels:
    """Decode an image into the pixels that ``mxnet.image.imdecode`` gives, contiguous uint8 (112, 112, 3) RGB.

    ``encoded`` is an RGB or grayscale JPEG; with Pillow also a CMYK JPEG or a PNG. A JPEG is turned upright by its
    Exif orientation. Decodes into ``out`` if given, which may have another size. Raises OtherSize if the image has not
    that size, ValueError if the bytes are not a whole image.
    """
    if out is None:
        out = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    encoded = bytes(encoded)
    _decode(encoded, out)
    if (orientation := exif_orientation(encoded)) != 1:
        out[:] = turned_upright(out.copy(), orientation)
    return out


def decode_image(encoded: Buffer) -> Pixels:
    """As ``decode_face``, of any size up to 8192 × 8192, uint8 (H, W, 3). Raises ValueError if it is larger or not whole."""
    try:
        return decode_face(encoded)
    except OtherSize as other:
        if max(other.height, other.width) > MAX_SIDE:
            raise ValueError(f"it has {other.width}×{other.height} pixels, more than {MAX_SIDE}×{MAX_SIDE}") from None
        out = np.empty((other.height, other.width, 3), np.uint8)
    _decode(bytes(encoded), out)
    return turned_upright(out, exif_orientation(bytes(encoded)))


def _decode(encoded: bytes, out: Pixels) -> None:
    try:
        if simplejpeg.decode_jpeg(encoded, "RGB", buffer=out).shape == out.shape:
            return
    except ValueError:
        pass
    # Only images that are not whole JPEGs of the right size and colour space get here. They are rare.
    if not simplejpeg.is_jpeg(encoded):  # pyright: ignore[reportUnknownMemberType]
        _decode_by_pillow(encoded, out)
        return
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(encoded)
    _check_size(int(width), int(height), out)
    if colorspace in ("CMYK", "YCCK"):
        _decode_by_pillow(encoded, out)
    else:
        simplejpeg.decode_jpeg(encoded, "RGB", buffer=out)  # raises what is wrong


def _check_size(width: int, height: int, out: Pixels) -> None:
    if (height, width) != out.shape[:2]:
        raise OtherSize(width, height)


def _decode_by_pillow(encoded: bytes, out: Pixels) -> None:
    if is_lfs_pointer(encoded):
        raise ValueError(NOT_FETCHED)
    if not encoded:
        raise ValueError("it is empty")
    pillow = require("PIL.Image", extra="images")
    try:
        image = pillow.open(BytesIO(encoded), formats=("JPEG", "PNG"))
        width, height = image.size
        _check_size(width, height, out)  # before decoding: a small file can announce a huge picture
        if image.mode.startswith("I"):  # gray of 16 bits, of which OpenCV takes the upper eight
            out[:] = (np.asarray(image) >> 8)[..., None]
        else:
            out[:] = np.asarray(image.convert("RGB"))
    except pillow.UnidentifiedImageError:
        raise ValueError(f"neither a JPEG nor a PNG: it begins with {encoded[:4]!r}") from None
    except (OSError, SyntaxError, pillow.DecompressionBombError) as error:  # what Pillow raises for a damaged file
        raise ValueError(str(error)) from error


def normalize_faces(faces: Tensor, flip: Tensor | None = None) -> Tensor:
    """Normalise uint8 (B, 112, 112, 3) RGB on its device, as arcface_torch does, to float32 (B, 3, 112, 112) in [-1, 1].

    ``flip``, bool (B,), says which images to mirror left to right; None mirrors none.
    """
    if flip is not None:
        faces = torch.where(flip.view(-1, 1, 1, 1), faces.flip(2), faces)  # as bytes, a quarter of the traffic
    # Contiguous, as arcface_torch's own loader hands them over: else they would decide the layout of the whole net.
    faces = faces.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return faces.div_(255).sub_(0.5).div_(0.5)


class RecordDataset(Dataset[tuple[Tensor, Tensor]]):
    """The pack in ``root_dir``, ``train.rec`` and ``train.idx``, as a dataset.

    Items are those of arcface_torch's ``MXFaceDataset``: ``(image, label)``, image float32
    (3, 112, 112) in [-1, 1], mirrored at random, label int64 ().

    Raises RecordError if the pack is missing or cannot be read, or if it has records too damaged to
    show their identity, or of another size. With ``skip_damaged``, such records are left out, and ``faces`` replaces an
    image that cannot be decoded by another one of its identity and adds the error to ``damaged``.
    """

    def __init__(self, root_dir: str | Path, skip_damaged: bool = False):
        self.root_dir, self.skip_damaged = Path(root_dir), skip_damaged
        self.damaged: list[RecordError] = []
        self.records = RecordFile(rec_in(root_dir))
        self.index = open_index(root_dir)
        if len(self.index.unusable) and not skip_damaged:
            key, offset = self.index.unusable[0].tolist()
            raise RecordError(f"{self.records.path}: record {key} cannot be used: {self._problem(offset)} "
                              f"({len(self.index.unusable)} such records). f2c-plugin index --verify lists them all; "
                              "f2c_skip_damaged = True trains without them")

    def _problem(self, offset: int) -> str:
        try:
            decode_face(self.records.image_record(offset).image)
        except ValueError as error:
            return str(error).removeprefix(f"{self.records.path}: ")
        return "it was damaged when the pack was indexed"

    def __reduce__(self) -> tuple[type["RecordDataset"], tuple[Path, bool]]:
        return RecordDataset, (self.root_dir, self.skip_damaged)  # a spawned worker maps the files again

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        faces = torch.as_tensor(self.face(i))[None]
        return normalize_faces(faces, torch.rand(1) < 0.5)[0], torch.tensor(int(self.labels(i)))

    @property
    def num_classes(self) -> int:
        """One past the last label: ``config.num_classes``."""
        last = int(self.index.numbers[-1])
        return last + 1 if last < FLOAT32_EXACT else len(self.index.numbers)

    def labels(self, positions: int | Int64s) -> NDArray[np.int64]:
        """Labels of the images at ``positions`` (B,), int64 (B,).

        They are the identities, as in arcface_torch. But where these go beyond 2**24, and may leave any gaps, they are
        their positions among the numbers that occur, so that ``num_classes`` is the number of identities.
        """
        identities = self.index.identity[positions].astype(np.int64)
        if self.index.numbers[-1] < FLOAT32_EXACT:
            return identities
        return np.asarray(np.searchsorted(self.index.numbers, identities), np.int64)

    def encoded(self, i: int) -> bytes:
        """Image ``i`` as it is stored. Raises RecordError if its record is damaged."""
        return bytes(self._stored(i))

    def _stored(self, i: int) -> Buffer:
        return image_of_record(self.records.read(int(self.index.offsets[i])))

    def face(self, i: int, out: Pixels | None = None) -> Pixels:
        """Image ``i``, as from ``decode_face``. Raises RecordError if its record or JPEG is damaged."""
        try:
            return decode_face(self._stored(i), out)
        except ValueError as error:
            raise RecordError(f"{self.records.path}: record {self.index.keys[i]} (identity {self.index.identity[i]}) "
                              f"cannot be decoded: {error}") from error

    def faces(self, positions: Int64s) -> tuple[Tensor, Tensor]:
        """Images uint8 (B, 112, 112, 3) RGB and labels int64 (B,) at ``positions`` (B,).

        Raises RecordError if an image is damaged and, with ``skip_damaged``, so is every other one of its identity.
        """
        batch = np.empty((len(positions), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        decode = self._face_or_another if self.skip_damaged else self.face
        for out, i in zip(batch, positions.tolist(), strict=True):
            decode(i, out)
        return torch.as_tensor(batch), torch.as_tensor(self.labels(positions))

    def _face_or_another(self, i: int, out: Pixels) -> Pixels:
        try:
            return self.face(i, out)
        except RecordError as error:
            self.damaged.append(error)
            for other in self.index.images_of(self.index.identity[i]).tolist():
                with suppress(RecordError):
                    return self.face(other, out)
            raise RecordError(f"{error}; nor can any other image of the identity") from error
