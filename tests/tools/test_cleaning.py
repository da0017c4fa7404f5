"""The dominant centre and the threshold, each against a loop that does what the papers say."""

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

from f2c_plugin.tools.cleaning import BINS, dominant_centre, halves_cosine, histogram, separation, sub_centres


def unit_vectors(rng, count, size, about=None, spread=1.0):
    points = spread * rng.normal(size=(count, size)) + (0 if about is None else about)
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


def plain_sub_centres(unit):
    """Spherical k-means, image by image."""
    mean = sum(unit) / len(unit)
    nearest = max(x @ mean for x in unit)
    centres = [next(x for x in unit if x @ mean >= nearest - 1e-5)]
    while len(centres) < min(3, len(unit)):
        centres.append(min(unit, key=lambda x: max(x @ centre for centre in centres)))
    for _ in range(10):
        members = [[] for _ in centres]
        for x in unit:
            cosines = [x @ centre for centre in centres]
            members[cosines.index(max(cosines))].append(x)
        centres = [sum(each) / np.linalg.norm(sum(each)) for each in members if each]
    return np.array(centres)


def plain_dominant_centre(unit, least):
    centres = plain_sub_centres(unit)
    votes = [0] * len(centres)
    for x in unit:
        cosines = [x @ centre for centre in centres]
        votes[cosines.index(max(cosines))] += 1
    accepted = [[x for x in unit if least is not None and x @ centre >= least] for centre in centres]
    best = max(accepted, key=len)
    return sum(best) / np.linalg.norm(sum(best)) if best else centres[votes.index(max(votes))]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30), st.sampled_from([None, -0.5, 0.3, 0.7, 0.99]))
@example(7388, 2, None)  # cosines that differ in the fifth decimal place, by rounding alone
def test_centres_are_those_of_a_plain_loop(seed, count, least):
    unit = unit_vectors(np.random.default_rng(seed), count, 5)
    assert sub_centres(unit) == pytest.approx(plain_sub_centres(unit), abs=1e-5)
    assert dominant_centre(unit, least) == pytest.approx(plain_dominant_centre(unit, least), abs=1e-5)


def test_a_person_whose_images_fill_two_sub_centres_dominates_one_who_fills_one():
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    left, right = directions[0] + 0.7 * directions[1], directions[0] - 0.7 * directions[1]  # of one person, cosine 0.34
    unit = np.concatenate([unit_vectors(rng, count, 16, about, 0.02) for count, about in
                           [(6, left), (7, right), (9, directions[2])]])
    assert dominant_centre(unit) @ directions[2] > 0.99  # the largest sub-centre is the other person's
    centre = dominant_centre(unit, 0.25)
    assert centre @ directions[0] > 0.95 and centre @ directions[2] < 0.1


def test_identical_images_and_an_only_one_have_one_centre():
    one = unit_vectors(np.random.default_rng(0), 1, 4)
    for unit in one, np.repeat(one, 7, 0):
        assert sub_centres(unit) == pytest.approx(one, abs=1e-6)
        assert dominant_centre(unit, 0.5) == pytest.approx(one[0], abs=1e-6)


def test_the_threshold_is_that_of_the_largest_j_by_a_loop_over_all_values():
    rng = np.random.default_rng(1)
    same, different = (rng.normal(mean, 0.15, 3000).clip(-1, 1) for mean in (0.6, 0.0))
    found, j = separation(histogram(same), histogram(different))
    edges = [2 * (each + 1) / BINS - 1 for each in range(BINS)]
    gains = [np.mean(different < edge) - np.mean(same < edge) for edge in edges]
    assert j == pytest.approx(max(gains), abs=1e-9) and found == pytest.approx(edges[int(np.argmax(gains))], abs=1e-6)
    assert found == pytest.approx(0.3, abs=0.05)  # where two normal distributions of one width cross


def test_wrong_labels_lower_j_but_do_not_move_the_threshold():
    rng = np.random.default_rng(2)
    same, different = rng.normal(0.7, 0.1, 10**6), rng.normal(0, 0.15, 10**6)
    clean, j = separation(histogram(same), histogram(different))
    noisy, j_noisy = separation(histogram(np.append(same[:700_000], rng.normal(0, 0.15, 300_000))), histogram(different))
    assert noisy == pytest.approx(clean, abs=0.02) and j_noisy == pytest.approx(0.7 * j, abs=0.01)


def test_between_cosines_that_do_not_overlap_the_threshold_is_in_the_middle():
    found = separation(histogram(np.array([0.7, 1.0, 0.9])), histogram(np.array([-1.0, 0.1])))
    assert found == (pytest.approx(0.4, abs=1e-3), 1)


def test_nothing_separates_cosines_from_none():
    some, none = histogram(np.array([0.7])), histogram(np.array([]))
    assert separation(some, none)[1] == separation(none, some)[1] == separation(none, none)[1] == 0


def test_halves_of_an_identity():
    unit = unit_vectors(np.random.default_rng(3), 7, 4)
    first, second = unit[:4].mean(0), unit[4:].mean(0)
    assert halves_cosine(unit) == pytest.approx([first @ second / np.linalg.norm(first) / np.linalg.norm(second)], abs=1e-6)
    assert len(halves_cosine(unit[:3])) == 0
