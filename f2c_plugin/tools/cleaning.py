"""Which images do not show their identity, from unit embeddings alone."""

import numpy as np

from f2c_plugin.data.recordio import Float32s, Int64s

SUB_CENTRES = 3  # K in sub-center ArcFace
BINS = 2000  # of a histogram of cosines, from -1 to 1
_ITERATIONS = 10
_EQUAL = 1e-5  # cosines that differ by less are equally near


def sub_centres(unit: Float32s, most: int = SUB_CENTRES) -> Float32s:
    """Centres (k, D), k from 1 to ``most``, of n images (n, D) by spherical k-means (Dhillon and Modha, 2001).

    It starts with the image nearest to the mean, and each time the one that is farthest from those before.
    """
    to_mean = unit @ unit.mean(0)
    seeds = [int(np.argmax(to_mean >= to_mean.max() - _EQUAL))]  # of two images, which are equally near, the first
    while len(seeds) < min(most, len(unit)):
        seeds.append(int(np.argmin((unit @ unit[seeds].T).max(1))))
    centres = unit[seeds]
    for _ in range(_ITERATIONS):
        before, owner = centres, np.argmax(unit @ centres.T, 1)
        centres = np.stack([normalized(unit[owner == each].sum(0)) for each in np.unique(owner)])
        if np.array_equal(before, centres):
            break
    return centres


def dominant_centre(unit: Float32s, least: float | None = None) -> Float32s:
    """The centre (D,) of most of the images (n, D) of an identity (sub-center ArcFace, ECCV 2020, section 3.4).

    The dominant sub-centre is the one that most images are nearest to, as there. With ``least``, it is the one to which most
    images have that cosine, and its centre is theirs: so a person whose images fill two sub-centres counts as one.
    """
    centres = sub_centres(unit)
    cosines = unit @ centres.T  # (n, k)
    if least is not None:
        accepted = cosines >= least
        accepted = accepted[:, np.argmax(accepted.sum(0))]
        if accepted.any():
            return normalized(unit[accepted].sum(0))
    return centres[np.argmax(np.bincount(cosines.argmax(1), minlength=len(centres)))]


def halves_cosine(unit: Float32s) -> Float32s:
    """The cosine of the centre of the first half of the images (n, D) to that of the second, (1,); (0,) below four images."""
    if len(unit) < 4:
        return np.zeros(0, np.float32)
    first, second = (normalized(half.sum(0)) for half in np.array_split(unit, 2))
    return np.array([first @ second])


def histogram(cosines: Float32s) -> Int64s:
    """Counts (BINS,) from -1 to 1."""
    return np.bincount(np.clip((cosines + 1) * (BINS / 2), 0, BINS - 1).astype(int), minlength=BINS)


def separation(same: Int64s, different: Int64s) -> tuple[float, float]:
    """The cosine that best separates two histograms, and Youden's J there: the share of ``different`` below less ``same``'s.

    Wrong labels in ``same`` (or pairs of one person in ``different``) lower J, but not where it is largest: it is the threshold
    of the least balanced error, which such labels do not move (Menon et al., ICML 2015). Between histograms that do not overlap
    it is the middle of the gap. Where one is empty, J is 0.
    """
    if not (same.any() and different.any()):
        return 0.0, 0.0
    below = [np.cumsum(each) / each.sum() for each in (same, different)]
    gain = below[1] - below[0]
    first = int(np.argmax(gain))
    length = int(np.argmin(np.append(gain[first:] >= gain[first], False)))
    return round((first + first + length + 1) / BINS - 1, 6), float(gain[first])


def normalized(vector: Float32s) -> Float32s:
    """At length 1; 0 stays."""
    return vector / max(float(np.linalg.norm(vector)), 1e-12)
