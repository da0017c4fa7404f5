"""Ranking and suppression, each against a loop over pairs of images."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from f2c_plugin.tools import thinning
from f2c_plugin.tools.thinning import contributions, suppressed


def unit_vectors(seed, count, size=4):
    points = np.random.default_rng(seed).normal(size=(count, size))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


def plain_nms(ranked, threshold):
    kept = []
    for i in range(len(ranked)):
        if all(ranked[i] @ ranked[j] <= threshold for j in kept):
            kept.append(i)
    return [i in kept for i in range(len(ranked))]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 25), st.lists(st.floats(-1, 1), min_size=1, max_size=5))
def test_what_is_kept_is_what_a_plain_loop_keeps(seed, count, thresholds):
    ranked = unit_vectors(seed, count)
    cosines = ranked @ ranked.T
    thresholds = [each for each in thresholds if np.abs(cosines - each).min() > 1e-5] or [0.5]  # not decided by rounding
    assert suppressed(ranked, np.array(thresholds)).tolist() == [plain_nms(ranked, each) for each in thresholds]


def test_rows_of_any_number_at_a_time_give_the_same(monkeypatch):
    ranked = unit_vectors(0, 50)
    whole = suppressed(ranked, np.array([0.2, 0.9]))
    monkeypatch.setattr(thinning, "_ROWS", 7)
    assert (suppressed(ranked, np.array([0.2, 0.9])) == whole).all() and 1 < whole[0].sum() < whole[1].sum() < 50


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 6))
def test_contributions_are_mean_distances_over_all_pairs(seed, count, identities):
    unit, centres = unit_vectors(seed, count), unit_vectors(seed + 1, identities)
    found = contributions(unit, centres.mean(0, dtype=np.float64))
    for i, x in enumerate(unit):
        local = [1 - x @ other for j, other in enumerate(unit) if j != i]
        expected = (np.mean(local) if local else 1) + np.mean([1 - x @ centre for centre in centres])
        assert found[i] == pytest.approx(expected, abs=1e-5)
