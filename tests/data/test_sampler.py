"""The dual sampler's guarantees, over all ranks together, on packs of any shape."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from f2c_plugin.data.identities import IdentityIndex
from f2c_plugin.data.sampler import DualSampler, ShuffledPasses


def index_of(sizes):
    """A pack whose i-th identity has sizes[i] images, in mixed order and with gaps in the numbers."""
    identity = np.random.default_rng(0).permutation(np.repeat(3 * np.arange(len(sizes)), sizes))
    images = np.arange(len(identity))
    return IdentityIndex.of(images, 4 * images, np.full_like(images, 4), identity)


@st.composite
def set_ups(draw):
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=30))
    world_size = draw(st.integers(1, 4))
    batch_size = 2 * draw(st.integers(1, 8))
    rate = draw(st.sampled_from([0.0, 0.3, 2 / 3, 1.0]))
    return index_of(sizes), batch_size, rate, world_size, draw(st.integers(0, 99))


def samplers(index, batch_size, rate, world_size, seed, num_steps=7):
    return [DualSampler(index, batch_size, num_steps, rate, seed, rank, world_size) for rank in range(world_size)]


def split(sampler, step):
    """The pairs (2, p) and the instances (n,) of a rank's batch; p from the sampler's own order."""
    halves = sampler.batch(step).reshape(2, -1)
    pairs = 0
    if sampler.pairs_per_step:
        first, end = (sampler._identities_before(each) for each in (step, step + 1))
        pairs = len(range(first + sampler.rank, end, sampler.world_size))
    return halves[:, :pairs], halves[:, pairs:].reshape(-1)


@settings(max_examples=60, deadline=None)
@given(set_ups())
def test_a_pass_takes_every_identity_once_and_every_image_once_over_all_ranks(set_up):
    index = set_up[0]
    ranks = samplers(*set_up)
    identities, images = [], []
    for step in range(60):
        for sampler in ranks:
            pairs, instances = split(sampler, step)
            identities += index.identity[pairs[0]].tolist()
            images += instances.tolist()
    for stream, everything in (identities, index.numbers.tolist()), (images, list(range(len(index)))):
        for end in range(len(everything), len(stream) + 1, len(everything)):
            assert sorted(stream[end - len(everything):end]) == everything


@settings(max_examples=150, deadline=None)
@given(set_ups(), st.integers(0, 500))
def test_pairs_share_an_identity_differ_if_they_can_and_no_identity_comes_twice_in_a_step(set_up, step):
    index, batch_size, *_ = set_up
    seen = []
    for sampler in samplers(*set_up):
        batch = sampler.batch(step)
        assert len(batch) == batch_size
        (first, second), _ = split(sampler, step)
        assert (index.identity[first] == index.identity[second]).all()
        for a, b in zip(first, second):
            assert (a != b) == (len(index.images_of(index.identity[a])) > 1)
        seen += index.identity[first].tolist()
    assert len(seen) == len(set(seen))


def test_both_images_of_a_pair_are_drawn_evenly():
    index = index_of([3])
    sampler = DualSampler(index, 2, 1, 1.0, seed=5)
    pairs = Counter(tuple(sampler.batch(step).tolist()) for step in range(6000))
    assert len(pairs) == 6 and all(850 < count < 1150 for count in pairs.values())


def test_the_share_of_the_identity_loader_is_the_identity_rate():
    index = index_of([5] * 420)
    for batch_size, pairs in (128, 42), (12, 4), (6, 2), (2, 0):
        assert split(DualSampler(index, batch_size, 10), 0)[0].shape == (2, pairs)


def test_batches_depend_on_seed_epoch_rank_and_world_size_alone():
    index = index_of([4] * 50)

    def epoch(number, seed=1, rank=0, world_size=2):
        sampler = DualSampler(index, 8, 6, seed=seed, rank=rank, world_size=world_size)
        sampler.set_epoch(number)
        batches = list(sampler)
        assert len(batches) == len(sampler) == 6
        return np.array(batches)

    assert np.array_equal(epoch(3), epoch(3))
    for other in epoch(4), epoch(3, seed=2), epoch(3, rank=1), epoch(3, world_size=3):
        assert not np.array_equal(epoch(3), other)


def test_an_epoch_goes_on_where_the_one_before_it_ended():
    index = index_of([2] * 40)
    sampler = DualSampler(index, 8, 5)
    taken = []
    for epoch in range(16):
        sampler.set_epoch(epoch)
        taken += [split(sampler, 5 * epoch + i)[1] for i in range(5)]
    images = np.concatenate(taken)
    assert sorted(images[:80]) == sorted(images[80:160]) == list(range(80))


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_stream_can_be_asked_for_any_stretch(size):
    stream = ShuffledPasses(size, (3, 1))
    whole = stream.take(0, 4 * size)
    assert np.array_equal(np.concatenate([stream.take(i, i + 1) for i in range(4 * size)]), whole)
    assert np.array_equal(stream.take(size // 2, 3 * size, 3), whole[size // 2:3 * size:3])
    assert not size > 1 or not np.array_equal(whole[:size], whole[size:2 * size])


def test_every_number_comes_equally_often_at_every_place_and_after_every_other():
    size, passes = 11, 6000
    orders = np.stack([ShuffledPasses(size, (5, 1)).take(size * i, size * (i + 1)) for i in range(passes)])
    places = np.stack([np.bincount(column, minlength=size) for column in orders.T])
    followers = np.zeros((size, size))
    np.add.at(followers, (orders[:, :-1].ravel(), orders[:, 1:].ravel()), 1)
    for counts, expected in (places, passes / size), (followers[~np.eye(size, dtype=bool)], passes / size):
        assert np.abs(counts - expected).max() < 5 * expected**0.5


@settings(max_examples=60, deadline=None)
@given(set_ups(), st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=4))
def test_passes_go_on_without_gap_or_repetition_with_another_number_of_ranks_or_batch_size(set_up, changes):
    index, batch_size, rate, world_size, seed = set_up
    identities, images, origin = [], [], None
    for steps, next_world_size, next_half in [*changes, (40, 1, 1)]:
        ranks = samplers(index, batch_size, rate, world_size, seed)
        for sampler in ranks:
            sampler.origin = origin or sampler.origin
        begin = ranks[0].origin.step
        for step in range(begin, begin + steps):
            for sampler in ranks:
                pairs, instances = split(sampler, step)
                identities += index.identity[pairs[0]].tolist()
                images += instances.tolist()
        position = ranks[0].position(begin + steps)
        assert position[1:] == (len(identities), len(images))
        origin, world_size, batch_size = position, next_world_size, 2 * next_half
    for stream, everything in (identities, index.numbers.tolist()), (images, list(range(len(index)))):
        for end in range(len(everything), len(stream) + 1, len(everything)):
            assert sorted(stream[end - len(everything):end]) == everything
