"""The images and labels of a pack, one by one or in batches."""

from pathlib import Path

import numpy as np
import simplejpeg
import torch
from torch.utils.data import Dataset

from f2c_plugin.data.identities import IdentityIndex
from f2c_plugin.data.index import open_index
from f2c_plugin.data.recordio import RecordError, RecordFile, unpack_image_record

IMAGE_SIZE = 112


def decode_face(jpeg, out: np.ndarray | None = None) -> np.ndarray:
    """Decode a JPEG into RGB, uint8 (112, 112, 3), the same pixels as ``mxnet.image.imdecode``.

    Args:
        jpeg: encoded bytes.
        out: contiguous array to decode into; a new one if None.
    Raises:
        ValueError: the bytes are no whole JPEG of 112 × 112.
    """
    height, width, _, _ = simplejpeg.decode_jpeg_header(jpeg)
    if (height, width) != (IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"it is {width}×{height} pixels, and aligned faces are {IMAGE_SIZE}×{IMAGE_SIZE}")
    return simplejpeg.decode_jpeg(jpeg, "RGB", buffer=out)


def normalize_faces(faces: torch.Tensor, flip: torch.Tensor | None = None) -> torch.Tensor:
    """What the host's transform does after decoding, for a whole batch on its device.

    Args:
        faces: uint8 (B, 112, 112, 3) RGB.
        flip: bool (B,), which to mirror left to right.
    Returns:
        float32 (B, 3, 112, 112) in [-1, 1].
    """
    images = faces.permute(0, 3, 1, 2).float().div_(255).sub_(0.5).div_(0.5)
    return images if flip is None else torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images)


class RecordDataset(Dataset):
    """A pack, ``train.rec`` and ``train.idx``, as a dataset.

    Items are those of arcface_torch's ``MXFaceDataset``: ``(image, label)``, image float32
    (3, 112, 112) in [-1, 1], mirrored at random, label int64 ().

    Args:
        root_dir: folder of the pack.
    Attributes:
        index: the IdentityIndex.
    Raises:
        RecordError: the pack is missing or cannot be read.
    """

    def __init__(self, root_dir):
        self.root_dir = Path(root_dir)
        self.records = RecordFile(self.root_dir / "train.rec")
        self.index: IdentityIndex = open_index(root_dir)

    def __reduce__(self):
        return RecordDataset, (self.root_dir,)  # a worker that is not forked maps the files itself

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
            record = unpack_image_record(self.records.read(int(self.index.offsets[i])))
            return decode_face(record.image, out)
        except ValueError as error:
            raise RecordError(f"{self.records.path}: record {self.index.keys[i]} (identity {self.index.identity[i]}) "
                              f"cannot be decoded: {error}") from error

    def faces(self, positions: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Images uint8 (B, 112, 112, 3) RGB and identities int64 (B,) at ``positions`` (B,)."""
        batch = np.empty((len(positions), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        for out, i in zip(batch, positions):
            self.face(i, out)
        return torch.from_numpy(batch), torch.from_numpy(self.index.identity[positions].astype(np.int64))
