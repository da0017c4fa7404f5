"""The images and labels of a pack, one by one or in batches."""

from io import BytesIO
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from torch.utils.data import Dataset

from f2c_plugin.data.identities import IdentityIndex
from f2c_plugin.data.index import open_index
from f2c_plugin.data.recordio import RecordFile, image_of_record
from f2c_plugin.errors import RecordError

IMAGE_SIZE = 112


def decode_face(encoded, out: np.ndarray | None = None) -> np.ndarray:
    """Decode an image into RGB, uint8 (112, 112, 3), the same pixels as ``mxnet.image.imdecode``.

    Args:
        encoded: bytes of a JPEG, in colour or grey; with Pillow also of a CMYK JPEG or a PNG.
        out: contiguous array to decode into; a new one if None.
    Raises:
        ValueError: the bytes are no whole image of 112 × 112.
    """
    if out is None:
        out = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    try:
        if simplejpeg.decode_jpeg(encoded, "RGB", buffer=out).shape == out.shape:
            return out
    except ValueError:
        pass
    # Whatever is not a whole JPEG of the right size and colours is rare, and looked at closely only now.
    if not simplejpeg.is_jpeg(encoded):
        return _decode_by_pillow(encoded, out)
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(encoded)
    _check_size(width, height)
    if colorspace in ("CMYK", "YCCK"):
        return _decode_by_pillow(encoded, out)
    return simplejpeg.decode_jpeg(encoded, "RGB", buffer=out)


def _check_size(width, height):
    if (width, height) != (IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"it is {width}×{height} pixels, and aligned faces are {IMAGE_SIZE}×{IMAGE_SIZE}")


def _decode_by_pillow(encoded, out):
    """The rare formats."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise ValueError("it is no JPEG in RGB or grey; other images need Pillow: pip install f2c-plugin[images]") from None
    try:
        with Image.open(BytesIO(encoded), formats=("JPEG", "PNG")) as image:
            _check_size(*image.size)  # before anything is decoded: a small file can announce a huge picture
            face = np.asarray(image.convert("RGB"))
    except UnidentifiedImageError:
        raise ValueError(f"it is neither a JPEG nor a PNG: it begins with {bytes(encoded[:4])!r}") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises for a damaged file
        raise ValueError(str(error)) from error
    out[:] = face
    return out


def normalize_faces(faces: torch.Tensor, flip: torch.Tensor | None = None) -> torch.Tensor:
    """What the host's transform does after decoding, for a whole batch on its device.

    Args:
        faces: uint8 (B, 112, 112, 3) RGB.
        flip: bool (B,), which to mirror left to right.
    Returns:
        float32 (B, 3, 112, 112) in [-1, 1].
    """
    if flip is not None:
        faces = torch.where(flip.view(-1, 1, 1, 1), faces.flip(2), faces)  # as bytes, a quarter of the traffic
    return faces.permute(0, 3, 1, 2).float().div_(255).sub_(0.5).div_(0.5)


class RecordDataset(Dataset):
    """A pack, ``train.rec`` and ``train.idx``, as a dataset.

    Items are those of arcface_torch's ``MXFaceDataset``: ``(image, label)``, image float32
    (3, 112, 112) in [-1, 1], mirrored at random, label int64 ().

    Args:
        root_dir: folder of the pack.
        skip_damaged: whether to go on over damage: ``faces`` puts another image of the same identity
            in the place of one that cannot be decoded, and counts it; records so damaged that their
            identity is unknown are left out.
    Attributes:
        index: the IdentityIndex.
        damaged: the errors of the images that were replaced in this process.
    Raises:
        RecordError: the pack is missing or cannot be read, or has a record of unknown identity that
            is not to be left out.
    """

    def __init__(self, root_dir, skip_damaged: bool = False):
        self.skip_damaged = skip_damaged
        self.damaged: list[RecordError] = []
        self.root_dir = Path(root_dir)
        self.records = RecordFile(self.root_dir / "train.rec")
        self.index: IdentityIndex = open_index(root_dir)
        if len(self.index.unreadable) and not skip_damaged:
            key, offset = self.index.unreadable[0].tolist()
            raise RecordError(f"{self.records.damage(offset)}: record {key} cannot be read, so that nobody knows whose "
                              f"image it is ({len(self.index.unreadable)} such records). f2c-plugin index --verify lists "
                              "all damage; f2c_skip_damaged = True trains without these records")

    def __reduce__(self):
        return RecordDataset, (self.root_dir, self.skip_damaged)  # a worker that is not forked maps the files itself

    def __len__(self):
        return len(self.index)

    def __getitem__(self, i):
        faces = torch.from_numpy(self.face(i))[None]
        return normalize_faces(faces, torch.rand(1) < 0.5)[0], torch.tensor(int(self.index.identity[i]))

    def face(self, i: int, out: np.ndarray | None = None) -> np.ndarray:
        """Image ``i``, uint8 (112, 112, 3) RGB.

        Raises:
            RecordError: its record or JPEG is damaged; names pack, record and identity.
        """
        try:
            return decode_face(image_of_record(self.records.read(int(self.index.offsets[i]))), out)
        except ValueError as error:
            raise RecordError(f"{self.records.path}: record {self.index.keys[i]} (identity {self.index.identity[i]}) "
                              f"cannot be decoded: {error}") from error

    def faces(self, positions: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Images uint8 (B, 112, 112, 3) RGB and identities int64 (B,) at ``positions`` (B,)."""
        batch = np.empty((len(positions), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        for out, i in zip(batch, positions):
            if self.skip_damaged:
                self._face_or_another(i, out)
            else:
                self.face(i, out)
        return torch.from_numpy(batch), torch.from_numpy(self.index.identity[positions].astype(np.int64))

    def _face_or_another(self, i, out):
        try:
            self.face(i, out)
        except RecordError as error:
            self.damaged.append(error)
            for other in self.index.images_of(self.index.identity[i]):
                try:
                    return self.face(other, out)
                except RecordError:
                    continue
            raise RecordError(f"{error}; nor can any other image of the identity") from error
