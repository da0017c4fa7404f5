"""The embeddings of a pack's images, by a model."""

import tempfile
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import normalize
from tqdm import tqdm

from f2c_plugin.data.dataset import IMAGE_SIZE, RecordDataset
from f2c_plugin.data.identities import Ints
from f2c_plugin.data.recordio import Float32s, Int64s
from f2c_plugin.errors import F2CError, RecordError
from f2c_plugin.evaluation.verification import embed
from f2c_plugin.tools.evaluate import load_model

_BATCH = 256  # images at a time


def unit_embeddings(pack: RecordDataset, net: nn.Module, positions: Ints) -> Float32s:
    """Unit embeddings (n, D) of the images at ``positions`` (n,); 0 of those that cannot be decoded.

    As in verification, an embedding is the sum of those of an image and its mirror image.
    """
    faces = np.zeros((len(positions), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    readable = np.zeros(len(positions), bool)
    for i, position in enumerate(positions.tolist()):
        with suppress(RecordError):
            pack.face(position, faces[i])
            readable[i] = True
    unit = normalize(embed(net, torch.from_numpy(faces)).sum(1)).float().numpy()
    unit[~readable] = 0
    return unit


def embedded(pack: RecordDataset, model: str | Path, folder: Path) -> NDArray[np.float16]:
    """``unit_embeddings`` of all images, float16 (n, D), in the order of ``index.grouped``: identity by identity.

    They lie in a nameless file in ``folder``, which goes with the last reference. Raises F2CError if the model cannot be read
    or an embedding is not finite.
    """
    net, grouped = load_model(model), pack.index.grouped
    with tempfile.TemporaryFile(dir=folder) as file:
        for start in tqdm(range(0, len(grouped), _BATCH), "embedding", unit=f" × {_BATCH} images", disable=None):
            unit = unit_embeddings(pack, net, grouped[start:start + _BATCH])
            if not np.isfinite(unit).all():
                raise F2CError(f"{model}: its embeddings of {pack.root_dir} are not finite")
            file.write(unit.astype(np.float16).tobytes())
        file.flush()
        return np.memmap(file, np.float16, "r").reshape(len(grouped), -1)


def by_identity(embeddings: NDArray[np.float16], starts: Int64s, doing: str) -> Iterator[tuple[int, Int64s, Float32s]]:
    """(i, rows (n,), unit embeddings (n, D)) of what ``embedded`` gives, of each identity with an image that can be decoded.

    It is number i in ``index.numbers``, and has the images ``index.grouped[rows]``.
    """
    for i, (first, end) in enumerate(tqdm(pairwise(starts.tolist()), doing, len(starts) - 1, unit=" identities", disable=None)):
        unit = embeddings[first:end].astype(np.float32)
        norms = np.linalg.norm(unit, axis=1)
        if norms.any():
            yield i, first + np.flatnonzero(norms), unit[norms > 0] / norms[norms > 0, None]
