"""Accuracy and TAR at FAR, from cosines of pairs. Without PyTorch: reports of trainings need no more."""

from collections.abc import Sequence

import numpy as np

FOLDS = 10
FARS = 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6  # at which TAR is reported, where the pairs resolve it
NOT_RESOLVED = "not resolved"
GEOMETRY = "alignment", "divergence", "concentration"
THRESHOLDS = np.arange(0, 4, 0.01)  # on squared distances of unit vectors, as in arcface_torch


def tar_at_far(scores: np.ndarray, same: np.ndarray, far: float) -> float | None:
    """As ``VerificationResult.tar_at_far``, from cosines (n,) and labels, bool (n,)."""
    return tars_at_fars(scores, same, [far])[0]


def tars_at_fars(scores: np.ndarray, same: np.ndarray, fars: Sequence[float]) -> list[float | None]:
    """``tar_at_far`` of each FAR."""
    different, alike = np.sort(scores[~same])[::-1], scores[same]
    thresholds = [threshold_at_far(different, far) if len(alike) else None for far in fars]
    return [None if threshold is None else float((alike > threshold).mean()) for threshold in thresholds]


def threshold_at_far(different: np.ndarray, far: float) -> float | None:
    """The lowest threshold that at most ``far`` of the different pairs exceed, from their falling cosines (n,); None where they
    do not resolve it."""
    allowed = int(far * len(different))
    if far * len(different) < 1:
        return None
    return float(different[allowed]) if allowed < len(different) else -np.inf


def tar_text(tar: float | None) -> str:
    """A TAR for tables and logs."""
    return NOT_RESOLVED if tar is None else f"{tar:.2%}"


def fold_accuracies(scores: np.ndarray, same: np.ndarray) -> np.ndarray:
    """Accuracy of each of 10 consecutive folds at the best threshold of the other nine, from cosines (n,) and labels (n,)."""
    correct = ((2 - 2 * scores)[:, None] < THRESHOLDS) == same[:, None]  # (n, thresholds)
    total = correct.sum(0)
    folds = [(fold.sum(0), len(fold)) for fold in np.array_split(correct, min(FOLDS, len(same)))]
    return np.array([inside[np.argmax(total - inside)] / size for inside, size in folds])
