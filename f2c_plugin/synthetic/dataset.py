"""Writes a pack of synthetic faces, and a verification set of identities that are not in the pack."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import simplejpeg
from tqdm import tqdm

from f2c_plugin.data.writer import refuse_to_overwrite, write_insightface_pack, write_property
from f2c_plugin.errors import InputError
from f2c_plugin.evaluation.verification import save_bin
from f2c_plugin.synthetic.face import draw_face, draw_identity
from f2c_plugin.utils.atomic import written_whole
from f2c_plugin.utils.extras import require
from f2c_plugin.utils.workers import worker_pool

JPEG_QUALITY = 90
VERIFICATION_NAME = "synth"
# Identities of the training set and the verification set come from different random streams.
_TRAINING, _VERIFICATION = 0, 1
_IMAGES_PER_UNSEEN_IDENTITY = 10


def write_dataset(folder: str | Path, num_identities: int, images_per_identity: int, num_pairs: int = 6000, seed: int = 0,
                  processes: int | None = None) -> None:
    """Draw ``train.rec``, ``train.idx``, ``property`` and ``synth.bin`` into ``folder``.

    The same arguments give the same bytes with any number of processes; None means one per CPU. Half of the pairs
    are the same identity. Raises InputError if a count is too small, OverwriteError if the folder holds a pack.
    """
    folder = Path(folder)
    for name, value, smallest in (("identities", num_identities, 1), ("images-per-identity", images_per_identity, 1),
                                  ("pairs", num_pairs, 2), ("processes", processes, 1)):
        if value is not None and value < smallest:
            raise InputError(f"--{name} {value}: must be at least {smallest}")
    refuse_to_overwrite(folder)
    folder.mkdir(parents=True, exist_ok=True)
    num_unseen = max(2, -(-num_pairs // _IMAGES_PER_UNSEEN_IDENTITY))
    with worker_pool(processes) as pool:  # train.rec comes last, so that no folder with a pack lacks the rest
        unseen = pool.imap(partial(_draw_jpegs, seed, _VERIFICATION, _IMAGES_PER_UNSEEN_IDENTITY), range(num_unseen), 4)
        unseen = tqdm(unseen, f"drawing {VERIFICATION_NAME}.bin", num_unseen, unit=" identities", disable=None)
        save_bin(folder / f"{VERIFICATION_NAME}.bin", *_pairs(list(unseen), num_pairs, seed))
        write_property(folder, num_identities)
        seen = pool.imap(partial(_draw_jpegs, seed, _TRAINING, images_per_identity), range(num_identities), 4)
        seen = tqdm(seen, "drawing train.rec", num_identities, unit=" identities", disable=None)
        write_insightface_pack(folder / "train.rec", chain.from_iterable(seen), [images_per_identity] * num_identities)


def draw_contact_sheet(path: str | Path, num_identities: int = 8, images_per_identity: int = 10, seed: int = 0) -> None:
    """Draw faces of the training set of ``seed`` into a PNG, one identity per row. Needs Pillow."""
    pillow = require("PIL.Image", extra="plot")
    rows = [np.hstack(list(_faces(seed, _TRAINING, images_per_identity, i))) for i in range(num_identities)]
    with written_whole(path) as file:
        pillow.fromarray(np.vstack(rows)).save(file, "PNG")


def _faces(seed: int, stream: int, count: int, identity: int) -> Iterator[np.ndarray]:
    """Draws faces, uint8 (112, 112, 3), of one identity. They do not depend on other identities."""
    rng = np.random.default_rng([seed, stream, identity])
    vector = draw_identity(rng)
    for _ in range(count):
        yield draw_face(vector, rng)


def _draw_jpegs(seed: int, stream: int, count: int, identity: int) -> list[bytes]:
    return [simplejpeg.encode_jpeg(face, JPEG_QUALITY, "RGB", "420") for face in _faces(seed, stream, count, identity)]


def _pairs(identities: Sequence[Sequence[bytes]], num_pairs: int, seed: int) -> tuple[list[bytes], list[bool]]:
    """Draw pairs of images and their labels. Same and different alternate, so that every fold has both."""
    rng = np.random.default_rng([seed, _VERIFICATION])
    images: list[bytes] = []
    for i in range(num_pairs):
        first = int(rng.integers(len(identities)))
        if i % 2 == 0:
            images += [identities[first][image] for image in rng.choice(len(identities[first]), 2, replace=False).tolist()]
        else:
            second = (first + 1 + int(rng.integers(len(identities) - 1))) % len(identities)
            images += [identities[each][int(rng.integers(len(identities[each])))] for each in (first, second)]
    return images, [i % 2 == 0 for i in range(num_pairs)]
