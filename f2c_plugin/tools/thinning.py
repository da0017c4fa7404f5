"""Which images of an identity to keep, from unit embeddings alone: after Face-NMS (arXiv 2109.04698)."""

import numpy as np
from numpy.typing import NDArray

from f2c_plugin.data.recordio import Float32s

Float64s = NDArray[np.float64]
_ROWS = 256  # of the matrix of cosines at a time


def contributions(unit: Float32s, others: Float64s) -> Float64s:
    """What each of the n images (n, D) of an identity contributes to sparsity, (n,): local + global.

    Local is the mean cosine distance to the other images of the identity, global that to the centres of all other
    identities, whose mean is ``others`` (D,). The means of cosines are cosines to sums, so no pair is compared.
    """
    wide = unit.astype(np.float64)
    local = (wide @ wide.sum(0) - 1) / max(len(wide) - 1, 1)
    return (1 - local) + (1 - wide @ others)


def suppressed(ranked: Float32s, thresholds: Float64s) -> NDArray[np.bool_]:
    """What non-maximum suppression keeps, bool (T, n), at each of the thresholds (T,).

    The n images (n, D) come from the largest contribution to the smallest. Each is kept unless its cosine to one that is kept
    before it is above the threshold.
    """
    found = np.ones((len(thresholds), len(ranked)), bool)
    for start in range(0, len(ranked), _ROWS):
        for i, cosines in enumerate(ranked[start:start + _ROWS] @ ranked[:start + _ROWS].T, start):
            found[:, i] = ~(found[:, :i] & (cosines[:i] > thresholds[:, None])).any(1)
    return found
