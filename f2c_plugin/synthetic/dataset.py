"""Writes a pack of synthetic faces, and a verification set of identities that are not in the pack."""

import math
from bisect import bisect_right
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
_TAIL = math.log(2, 3)  # the exponent with which half of the identities have fewer than three images


def power_law(num_identities: int, mean: float, seed: int = 0) -> list[int]:
    """Numbers of images in a long tail, one for each identity, in random order.

    A share k^-0.63 of the identities has k images or more: half have one or two. The largest numbers are cut to one that
    gives ``mean`` images of an identity. Raises InputError if none does.
    """
    if num_identities < 1:
        raise InputError(f"--identities {num_identities}: must be at least 1")
    shares = (np.arange(num_identities) + 0.5) / num_identities
    counts = (shares ** (-1 / _TAIL)).astype(np.int64)  # from the largest to the smallest
    total = round(num_identities * mean)
    if not num_identities <= total <= counts.sum():
        raise InputError(f"--images-per-identity {mean:g}: must be from 1 to {counts.mean():.3g} in a long tail of "
                         f"{num_identities} identities")
    most = bisect_right(range(1, int(counts[0]) + 1), total, key=lambda most: np.minimum(counts, most).sum())
    counts = np.minimum(counts, most)
    counts[:total - counts.sum()] += 1  # what is left; all of these were cut
    return np.random.default_rng(seed).permutation(counts).tolist()


def write_dataset(folder: str | Path, num_identities: int, images_per_identity: int | Sequence[int], num_pairs: int = 6000,
                  seed: int = 0, processes: int | None = None) -> None:
    """Draw ``train.rec``, ``train.idx``, ``property`` and ``synth.bin`` into ``folder``.

    ``images_per_identity`` is one number for all identities, or one for each. The same arguments give the same bytes
    with any number of processes; None means one per CPU. Half of the pairs are the same identity. Raises InputError if a
    count is too small, OverwriteError if the folder holds a pack.
    """
    folder = Path(folder)
    sizes = [images_per_identity] * num_identities if isinstance(images_per_identity, int) else list(images_per_identity)
    if len(sizes) != max(num_identities, 0):
        raise InputError(f"images_per_identity has {len(sizes)} numbers: must have one for each of {num_identities} identities")
    for name, value, smallest in (("identities", num_identities, 1), ("images-per-identity", min(sizes, default=1), 1),
                                  ("pairs", num_pairs, 2), ("processes", processes, 1)):
        if value is not None and value < smallest:
            raise InputError(f"--{name} {value}: must be at least {smallest}")
    refuse_to_overwrite(folder)
    folder.mkdir(parents=True, exist_ok=True)
    num_unseen = max(2, -(-num_pairs // _IMAGES_PER_UNSEEN_IDENTITY))
    with worker_pool(processes) as pool:  # train.rec comes last, so that no folder with a pack lacks the rest
        numbers = ((identity, _IMAGES_PER_UNSEEN_IDENTITY) for identity in range(num_unseen))
        unseen = pool.imap(partial(_draw_jpegs, seed, _VERIFICATION), numbers, 4)
        unseen = tqdm(unseen, f"drawing {VERIFICATION_NAME}.bin", num_unseen, unit=" identities", disable=None)
        save_bin(folder / f"{VERIFICATION_NAME}.bin", *_pairs(list(unseen), num_pairs, seed))
        write_property(folder, num_identities)
        seen = pool.imap(partial(_draw_jpegs, seed, _TRAINING), enumerate(sizes), 4)
        seen = tqdm(seen, "drawing train.rec", num_identities, unit=" identities", disable=None)
        write_insightface_pack(folder / "train.rec", chain.from_iterable(seen), sizes)


def draw_contact_sheet(path: str | Path, num_identities: int = 8, images_per_identity: int = 10, seed: int = 0) -> None:
    """Draw faces of the training set of ``seed`` into a PNG, one identity per row. Needs Pillow."""
    pillow = require("PIL.Image", extra="plot")
    rows = [np.hstack(list(_faces(seed, _TRAINING, i, images_per_identity))) for i in range(num_identities)]
    with written_whole(path) as file:
        pillow.fromarray(np.vstack(rows)).save(file, "PNG")


def _faces(seed: int, stream: int, identity: int, count: int) -> Iterator[np.ndarray]:
    """Draws faces, uint8 (112, 112, 3), of one identity. They do not depend on other identities."""
    rng = np.random.default_rng([seed, stream, identity])
    vector = draw_identity(rng)
    for _ in range(count):
        yield draw_face(vector, rng)


def _draw_jpegs(seed: int, stream: int, identity_and_count: tuple[int, int]) -> list[bytes]:
    return [simplejpeg.encode_jpeg(face, JPEG_QUALITY, "RGB", "420") for face in _faces(seed, stream, *identity_and_count)]


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
