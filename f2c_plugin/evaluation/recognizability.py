"""How recognizable are the images of a verification set, and how many errors go if the least recognizable are rejected?"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.nn.functional import normalize

from f2c_plugin.errors import VerificationSetError
from f2c_plugin.evaluation.accuracy import threshold_at_far

UNRECOGNIZABLE = 4  # pixels, of images that nobody recognizes
REJECTED = 0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5  # shares of images at which errors are reported
_FARS = 1e-3, 1e-2, 1e-1  # the threshold lies at the first that the pairs resolve


@dataclass
class Recognizability:
    """How recognizable images are, and the errors that remain when the least recognizable are rejected.

    Attributes:
        images: from 0, unrecognizable, to 1; float64 (2n,).
        far: at which the threshold lies, of all pairs.
        fnmr: false non-match rates, the share of same pairs below the threshold, of the pairs that remain when 0, 1, … of the
            images are rejected, (2n,); nan if none remains.
    """

    images: np.ndarray
    far: float
    fnmr: np.ndarray

    def at(self, share: float) -> float | None:
        """The false non-match rate with this share of the images rejected, or None if no same pair remains."""
        rate = self.fnmr[int(round(share * len(self.fnmr), 6))]
        return None if np.isnan(rate) else float(rate)

    def summary(self) -> dict[str, object]:
        return {"mean": float(self.images.mean()), "far": self.far,
                "fnmr_at_rejected": {f"{share:g}": self.at(share) for share in REJECTED}}


def recognizability(embeddings: Tensor, unrecognizable: Tensor) -> np.ndarray:
    """The embedding recognizability score: 1 minus the cosine to the centre of unrecognizable faces, and at most 1.

    From Deng et al., "Harnessing Unrecognizable Faces for Improving Face Recognition", arXiv 2106.04112, section 2.2.1:
    e = min(1 − ⟨f_UI, f⟩, 1), with f_UI the normalised mean of the normalised embeddings of unrecognizable faces. It needs
    no labels.

    Args:
        embeddings: of images, float64 (n, D).
        unrecognizable: of images that nobody recognizes, float64 (m, D). In the paper, the largest cluster of the faces of
            WIDER FACE; here, images of ``UNRECOGNIZABLE`` pixels.
    Returns:
        float64 (n,).
    """
    centre = normalize(normalize(unrecognizable).mean(0), dim=0)  # (D,)
    return (1 - normalize(embeddings) @ centre).clamp(max=1).numpy()


def check_pairs(path: Path, same: np.ndarray) -> None:
    """Raise VerificationSetError if a set has too few pairs for ``error_reject``."""
    if not same.any() or _FARS[-1] * (~same).sum() < 1:
        raise VerificationSetError(f"{path}: {same.sum()} same and {(~same).sum()} different pairs: the error-reject curve "
                                   f"needs one same pair or more, and {1 / _FARS[-1]:.0f} different ones")


def error_reject(scores: np.ndarray, same: np.ndarray, images: np.ndarray) -> Recognizability:
    """The error-reject curve: the false non-match rate, the more images are rejected, from the least recognizable on.

    The threshold stays where 1 of 1000 of all different pairs passes, or 1 of 100 or 10 if they do not resolve it. A pair
    remains as long as both of its images do.

    Args:
        scores: cosines of pairs, (n,).
        same: bool (n,); ``check_pairs`` says whether they suffice.
        images: how recognizable each is, (2n,), the two of a pair in a row.
    """
    different = np.sort(scores[~same])[::-1]
    far, threshold = next((far, threshold) for far in _FARS
                          if (threshold := threshold_at_far(different, far)) is not None)
    place = np.empty(len(images), np.int64)
    place[np.argsort(images, kind="stable")] = np.arange(len(images))
    leaves = place.reshape(-1, 2).min(1)[same]  # a same pair remains when up to so many images are rejected
    remaining, refused = (np.bincount(leaves, weights, len(images))[::-1].cumsum()[::-1]
                          for weights in (None, scores[same] <= threshold))
    return Recognizability(images, far, np.divide(refused, remaining, out=np.full(len(images), np.nan), where=remaining > 0))
