"""Writes a pack of synthetic faces and a verification set of people who are not in it."""

import multiprocessing
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import simplejpeg
from tqdm import tqdm

from f2c_plugin.synthetic.face import draw_face, draw_identity
from f2c_plugin.data.writer import refuse_to_overwrite, write_insightface_pack
from f2c_plugin.evaluation.verification import save_bin

JPEG_QUALITY = 90
VERIFICATION_NAME = "synth"
# People of the training set and of the verification set come from different streams of random numbers.
_TRAINING, _VERIFICATION = 0, 1
_IMAGES_PER_UNSEEN_IDENTITY = 10


def write_dataset(folder, num_identities: int, images_per_identity: int, num_pairs: int = 6000, seed: int = 0,
                  processes: int | None = None) -> None:
    """Draw ``train.rec``, ``train.idx``, ``property`` and ``synth.bin`` into ``folder``.

    The same arguments give the same bytes, with any number of processes.

    Args:
        num_pairs: of the verification set, half of them same; even.
        processes: that draw; None takes one per CPU.
    Raises:
        ValueError: a count that makes no dataset.
        FileExistsError: there is a pack in the folder already.
    """
    folder = Path(folder)
    for name, value, smallest in (("identities", num_identities, 1), ("images-per-identity", images_per_identity, 1),
                                  ("pairs", num_pairs, 2)):
        if value < smallest:
            raise ValueError(f"--{name} {value}: must be at least {smallest}")
    refuse_to_overwrite(folder)
    folder.mkdir(parents=True, exist_ok=True)

    num_unseen = max(2, -(-num_pairs // _IMAGES_PER_UNSEEN_IDENTITY))
    with multiprocessing.Pool(processes) as pool:
        seen = pool.imap(partial(_draw_jpegs, seed, _TRAINING, images_per_identity), range(num_identities), 4)
        seen = tqdm(seen, "drawing train.rec", num_identities, unit=" identities", disable=None)
        write_insightface_pack(folder / "train.rec", chain.from_iterable(seen), [images_per_identity] * num_identities)
        unseen = pool.imap(partial(_draw_jpegs, seed, _VERIFICATION, _IMAGES_PER_UNSEEN_IDENTITY), range(num_unseen), 4)
        unseen = tqdm(unseen, f"drawing {VERIFICATION_NAME}.bin", num_unseen, unit=" identities", disable=None)
        save_bin(folder / f"{VERIFICATION_NAME}.bin", *_pairs(list(unseen), num_pairs, seed))
    (folder / "property").write_text(f"{num_identities},112,112\n")


def draw_contact_sheet(path, num_identities: int = 8, images_per_identity: int = 10, seed: int = 0) -> None:
    """Draw faces of the training set of ``seed`` into a PNG, one identity a row. Needs Pillow."""
    from PIL import Image

    rows = [np.hstack(list(_faces(seed, _TRAINING, images_per_identity, i))) for i in range(num_identities)]
    Image.fromarray(np.vstack(rows)).save(path)


def _faces(seed, stream, count, identity):
    """Yields faces uint8 (112, 112, 3) of one identity, the same whatever is drawn beside it."""
    rng = np.random.default_rng([seed, stream, identity])
    vector = draw_identity(rng)
    for _ in range(count):
        yield draw_face(vector, rng)


def _draw_jpegs(seed, stream, count, identity):
    return [simplejpeg.encode_jpeg(face, JPEG_QUALITY, "RGB", "420") for face in _faces(seed, stream, count, identity)]


def _pairs(people, num_pairs, seed):
    """Images and answers; same and different take turns, so that every fold has both."""
    rng = np.random.default_rng([seed, _VERIFICATION])
    images, answers = [], []
    for i in range(num_pairs):
        first = rng.integers(len(people))
        if i % 2 == 0:
            a, b = rng.choice(len(people[first]), 2, replace=False)
            images += [people[first][a], people[first][b]]
        else:
            second = (first + 1 + rng.integers(len(people) - 1)) % len(people)
            images += [people[who][rng.integers(len(people[who]))] for who in (first, second)]
        answers.append(i % 2 == 0)
    return images, answers
