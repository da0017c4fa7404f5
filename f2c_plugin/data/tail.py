"""What the numbers of images per identity mean for training."""

import numpy as np

from f2c_plugin.data.identities import IdentityIndex

MANY_ALONE = 0.25  # identities with one image are many from this share of the identities on
LARGE_SHARE = 0.01  # an identity is large above this share of the images, ...
LARGE_RATIO = 10  # ... if it also has more than this many times the mean, as no identity of a small, even pack has


def images_per_identity(index: IdentityIndex) -> str:
    """The numbers of images per identity in a line: range, median, and what part of the pack has one."""
    counts = np.diff(index.starts)
    alone = int(np.count_nonzero(counts == 1))
    return (f"{counts.min():,} to {counts.max():,}, median {np.median(counts):g}, {alone / len(counts):.1%} with one image "
            f"({alone:,}, {alone / len(index):.1%} of the images)")


def many_alone(index: IdentityIndex) -> str | None:
    """What it means that many identities have one image; None if few have."""
    share = np.count_nonzero(np.diff(index.starts) == 1) / len(index.numbers)
    if share < MANY_ALONE:
        return None
    if share == 1:
        return "no identity has two images: nothing shows which images are of one person, check the labels"
    return (f'{share:.1%} of the identities have one image: f2c_recipe = "paper" makes no pairs of them, and learns them in '
            "their first pass only as negatives")


def large_identities(index: IdentityIndex) -> str | None:
    """Which identity holds a suspiciously large share of the images, and how many do; None if none does."""
    counts = np.diff(index.starts)
    large = np.count_nonzero(counts > max(LARGE_SHARE, LARGE_RATIO / len(counts)) * len(index))
    if not large:
        return None
    largest = counts.argmax()
    number = index.numbers[largest]
    others = f" ({large - 1:,} more have over {LARGE_SHARE:.0%} each)" if large > 1 else ""
    return (f"identity {number} has {counts[largest]:,} images, {counts[largest] / len(index):.1%} of all{others}: check with "
            f"`f2c-plugin inspect --identity {number}` that it is one person, not a merge of several or a class of rejects")
