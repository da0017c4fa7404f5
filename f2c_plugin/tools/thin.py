"""Writes a part of a pack that stands for the whole: images much like another of their identity go first."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.data.recordio import FLOAT32_EXACT, Int64s
from f2c_plugin.data.writer import new_pack
from f2c_plugin.errors import InputError
from f2c_plugin.tools import repack
from f2c_plugin.tools.cleaning import normalized
from f2c_plugin.tools.pack_embeddings import by_identity, embedded
from f2c_plugin.tools.thinning import Float64s, contributions, suppressed

_NAMES = ("property", repack.IDENTITIES, "train.idx", "train.rec")  # in the order in which they appear
_ALL = 1.01  # a threshold above all cosines; its negative is below all
_GRID = 32  # thresholds that are tried at a time
_ROUNDS = 3  # of which each searches between two of those before it: down to steps of 0.0001


@dataclass
class Thinned:
    """What is left of a pack.

    Attributes:
        out: folder of the new pack.
        images, identities: that it holds.
        of: images of the pack that can be decoded.
        unreadable: images that cannot, which are left out.
        threshold: cosine to a kept image of the identity above which images are left out.
    """

    out: Path
    images: int
    identities: int
    of: int
    unreadable: int
    threshold: float

    def report(self) -> str:
        """In lines for people."""
        unreadable = f"\n  left out: {self.unreadable} images that cannot be decoded" if self.unreadable else ""
        return (f"{self.out}: {self.images} of {self.of} images, of {self.identities} identities; left out are those with a "
                f"cosine above {self.threshold:.4f} to another of the identity{unreadable}")


def thin(source: str | Path, model: str | Path, out: str | Path, keep: float = 0.6) -> Thinned:
    """Write the share ``keep`` of a pack's images, chosen after Face-NMS (arXiv 2109.04698).

    Within an identity, images are ranked by what they contribute to sparsity (``thinning.contributions``), and suppressed
    where they are too near to one that is kept (``thinning.suppressed``). One threshold for the whole pack leaves the share;
    what a step of it leaves open is filled with the images that contribute most. Every identity with an image that can be
    decoded keeps one, and its number; beyond 2**24, the number that it has in training.

    Raises:
        InputError: the share is none, or there are more identities than it has images.
        RecordError: the pack cannot be read.
        OverwriteError: ``out`` already holds a pack.
        F2CError: the model cannot be read, or its embeddings are not finite.
    """
    out = Path(out)
    if not 0 < keep < 1:
        raise InputError(f"--keep {keep}: must be a share of the images, above 0 and below 1")
    with new_pack(out, _NAMES) as folder:
        pack = RecordDataset(source, skip_damaged=True)
        index = pack.index
        embeddings = embedded(pack, model, folder)
        scores = _scores(embeddings, index.starts)
        readable = ~np.isnan(scores)
        has_images = np.logical_or.reduceat(readable, index.starts[:-1])
        count, identities = int(readable.sum()), int(has_images.sum())
        wanted = round(keep * count)
        if wanted < max(identities, 1):
            raise InputError(f"--keep {keep}: would keep {wanted} of {count} images, but each of {identities} identities keeps "
                             f"one: keep {identities / max(count, 1):.3f} or more")
        chosen, threshold = _chosen(embeddings, index.starts, scores, wanted)
        in_pack = np.zeros(len(index), bool)
        in_pack[index.grouped] = chosen
        numbers = np.arange(len(index.numbers)) if index.numbers[-1] >= FLOAT32_EXACT else index.numbers.astype(np.int64)
        repack.write_kept(source, folder, in_pack, np.where(has_images, numbers, -1))
    unreadable = len(index) - count + len(index.unusable)
    return Thinned(out, wanted, identities, count, unreadable, threshold)


def _scores(embeddings: NDArray[np.float16], starts: Int64s) -> Float64s:
    """The contributions of all images (n,); NaN of those that cannot be decoded."""
    centres, identities = np.zeros(embeddings.shape[1]), 0
    for _, _, unit in by_identity(embeddings, starts, "centres"):
        centres += normalized(unit.sum(0))
        identities += 1
    scores = np.full(len(embeddings), np.nan)
    for _, rows, unit in by_identity(embeddings, starts, "ranking"):
        scores[rows] = contributions(unit, (centres - normalized(unit.sum(0))) / max(identities - 1, 1))
    return scores


def _chosen(embeddings: NDArray[np.float16], starts: Int64s, scores: Float64s, wanted: int) -> tuple[NDArray[np.bool_], float]:
    """The images to keep, bool (n,), as many as wanted, and the threshold that leaves at most so many."""
    lower, upper = -_ALL, _ALL
    for number in range(1, _ROUNDS + 1):
        thresholds = np.linspace(lower, upper, _GRID)
        counts = np.zeros(_GRID, np.int64)
        for _, rows, unit in by_identity(embeddings, starts, f"suppressing, {number} of {_ROUNDS + 1}"):
            counts += suppressed(unit[_ranked(scores[rows])], thresholds).sum(1)
        at = int(np.flatnonzero(counts[:-1] <= wanted)[-1])  # the first keeps one of each identity, the last keeps all
        lower, upper = thresholds[at:at + 2].tolist()
    found = np.zeros((2, len(embeddings)), bool)
    for _, rows, unit in by_identity(embeddings, starts, f"suppressing, {_ROUNDS + 1} of {_ROUNDS + 1}"):
        order = _ranked(scores[rows])
        found[:, rows[order]] = suppressed(unit[order], np.array([lower, upper]))
    chosen, more = found
    more = np.flatnonzero(more & ~chosen)
    chosen[more[_ranked(scores[more])][:wanted - np.count_nonzero(chosen)]] = True
    return chosen, lower


def _ranked(scores: Float64s) -> Int64s:
    """From the largest to the smallest; of equal ones the first comes first."""
    return np.argsort(-scores, kind="stable")
