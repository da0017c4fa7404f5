"""How recognizable images are, and the error-reject curve, against slow references."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from f2c_plugin.evaluation.recognizability import error_reject, recognizability


def test_the_score_is_the_distance_to_the_centre_of_unrecognizable_faces_and_at_most_1():
    rng = np.random.default_rng(0)
    unrecognizable, embeddings = (rng.normal(size=(count, 5)) * rng.uniform(1, 9, (count, 1)) for count in (4, 30))
    unit = [each / np.sqrt((each ** 2).sum()) for each in unrecognizable]
    centre = sum(unit) / len(unit)
    centre /= np.sqrt((centre ** 2).sum())
    expected = [min(1 - (each / np.sqrt((each ** 2).sum())) @ centre, 1) for each in embeddings]
    found = recognizability(torch.tensor(embeddings), torch.tensor(unrecognizable))
    np.testing.assert_allclose(found, expected)
    assert (found == 1).any() and (found < 1).any()  # at an obtuse angle to the centre, and at an acute one
    np.testing.assert_allclose(recognizability(torch.tensor(centre[None]), torch.tensor(unrecognizable)), 0, atol=1e-12)


def slow_rates(scores, same, images, far):
    """False non-match rates when 0, 1, … images are rejected; None if no same pair remains."""
    thresholds = sorted(scores[~same])
    threshold = next(each for each in thresholds if sum(scores[~same] > each) <= far * (~same).sum())
    rates = []
    left = sorted(range(len(images)), key=lambda image: images[image])
    while left:
        accepted = [scores[pair] > threshold for pair in range(len(same))
                    if same[pair] and 2 * pair in left and 2 * pair + 1 in left]
        rates.append(accepted.count(False) / len(accepted) if accepted else None)
        left.pop(0)
    return rates


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.sampled_from([10, 25, 100, 150]))
def test_the_error_reject_curve_is_that_of_a_slow_count(seed, alike, different):
    rng = np.random.default_rng(seed)
    same = rng.permutation(np.arange(alike + different) < alike)
    scores = rng.normal(size=len(same)).round(1)  # with ties
    images = rng.uniform(size=2 * len(same)).round(2)
    found = error_reject(scores, same, images)
    assert found.far == (0.01 if different >= 100 else 0.1)
    expected = slow_rates(scores, same, images, found.far)
    np.testing.assert_allclose(found.fnmr, np.array(expected, float))
    assert found.at(0) == pytest.approx(expected[0]) and found.at(0.999) is expected[-1] is None
    assert found.at(0.5) == (None if (half := expected[len(same)]) is None else pytest.approx(half))


def test_the_threshold_lies_at_a_far_of_1_in_1000_where_the_pairs_resolve_it():
    scores, same = np.linspace(1, 0, 1002), np.arange(1002) % 501 == 2
    assert error_reject(scores, same, np.arange(2004.0)).far == 1e-3


def test_errors_fall_when_the_images_that_cause_them_are_least_recognizable():
    same = np.arange(40) % 2 == 0
    scores = np.where(same, 0.9, 0.1)
    scores[:8:2] = 0.0  # four pairs fail, by one image each
    images = np.ones(80)
    images[:16:4] = 0.2
    found = error_reject(scores, same, images)
    assert [found.at(share) for share in (0, 0.02, 0.05, 0.5)] == [0.2, 3 / 19, 0, 0]
