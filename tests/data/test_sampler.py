"""The dual sampler's guarantees over all ranks together, on packs of any shape, and its use with a plain DataLoader."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import distributed
from torch.utils.data import DataLoader

from f2c_plugin.data.identities import IdentityIndex
from f2c_plugin.data.sampler import DualSampler, ShuffledPairs, ShuffledPasses
from f2c_plugin.errors import InputError
from tests.runs import on_ranks

LABELS = [7, 0, 7, 3, 3, 0, 0, 9, 3, 7] * 5 + [4]


def index_of(sizes):
    """An index whose i-th identity has sizes[i] images, in mixed order and with gaps in the numbers."""
    identity = np.random.default_rng(0).permutation(np.repeat(3 * np.arange(len(sizes)), sizes))
    images = np.arange(len(identity))
    return IdentityIndex.of(images, 4 * images, np.full_like(images, 4), identity)


@st.composite
def set_ups(draw):
    sizes = draw(st.lists(st.sampled_from([1, 1, 1, 2, 2, 3, 4, 5, 9]), min_size=1, max_size=30))
    world_size = draw(st.integers(1, 4))
    batch_size = 2 * draw(st.integers(1, 8))
    rate = draw(st.sampled_from([0.0, 0.3, 2 / 3, 1.0]))
    return index_of(sizes), batch_size, rate, world_size, draw(st.integers(0, 99))


def samplers(index, batch_size, rate, world_size, seed, num_steps=7):
    return [DualSampler(index, batch_size, num_steps, rate, seed, rank, world_size) for rank in range(world_size)]


def sizes_of(index):
    """{identity: number of its images}."""
    return dict(zip(index.numbers.tolist(), np.diff(index.starts).tolist(), strict=True))


def with_two(index):
    return [identity for identity, size in sizes_of(index).items() if size > 1]


def assert_whole_passes(stream, everything):
    """Every full pass over ``everything``, ascending, holds each element once."""
    for end in range(len(everything), len(stream) + 1, len(everything) or 1):
        assert sorted(stream[end - len(everything):end]) == everything
    assert everything or not stream


def split(sampler, step):
    """The pairs (2, p) and the instances (n,) of a rank's batch; the sampler gives p."""
    halves = sampler.batch(step).reshape(2, -1)
    pairs = 0
    if sampler.pairs_per_step:
        first, end = (sampler._identities_before(each) for each in (step, step + 1))
        pairs = len(range(first + sampler.rank, end, sampler.world_size))
    return halves[:, :pairs], halves[:, pairs:].reshape(-1)


@settings(max_examples=60, deadline=None)
@given(set_ups())
def test_a_pass_takes_every_identity_with_two_images_once_and_every_image_once_over_all_ranks(set_up):
    index = set_up[0]
    ranks = samplers(*set_up)
    identities, images = [], []
    for step in range(60):
        for sampler in ranks:
            pairs, instances = split(sampler, step)
            identities += index.identity[pairs[0]].tolist()
            images += instances.tolist()
    assert_whole_passes(identities, with_two(index) if identities else [])
    assert_whole_passes(images, list(range(len(index))))


@settings(max_examples=150, deadline=None)
@given(set_ups(), st.integers(0, 500))
def test_the_images_of_a_pair_share_an_identity_and_differ_and_no_identity_appears_twice_in_a_step(set_up, step):
    index, batch_size, *_ = set_up
    seen = []
    for sampler in samplers(*set_up):
        batch = sampler.batch(step)
        assert len(batch) == batch_size
        (first, second), _ = split(sampler, step)
        assert (index.identity[first] == index.identity[second]).all() and (first != second).all()
        seen += index.identity[first].tolist()
    assert len(seen) == len(set(seen))


@settings(max_examples=30, deadline=None)
@given(set_ups(), st.integers(0, 40))
def test_over_the_passes_every_image_comes_equally_often_in_the_pairs_of_its_identity(set_up, skipped):
    """At any time, the counts of two images of an identity differ by 1 at most; after n visits, n images have come twice."""
    index, ranks = set_up[0], samplers(*set_up)
    sizes, counts, visits = sizes_of(index), Counter(), Counter()
    for sampler in ranks:  # resumed after 360 passes or a multiple, by when images of all these sizes have come equally often
        sampler.origin = sampler.origin._replace(step=5, identities=360 * skipped * len(sampler.paired))
    for step in range(5, 65):
        for a, b in np.concatenate([split(sampler, step)[0] for sampler in ranks], axis=1).T.tolist():
            identity = index.identity[a]
            visits[identity] += 1
            counts[a] += 1
            counts[b] += 1
            of_identity = [counts[image] for image in index.images_of(identity).tolist()]
            assert max(of_identity) - min(of_identity) <= 1
            if visits[identity] % sizes[identity] == 0:
                assert set(of_identity) == {2 * visits[identity] // sizes[identity]}
    assert not visits or set(visits) <= set(with_two(index))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**40), st.integers(2, 12) | st.integers(2, 70)), min_size=1, max_size=6),
       st.integers(0, 10**9), st.integers(0, 9))
def test_n_visits_of_n_images_show_each_twice_and_never_the_same_image_twice_in_a_pair(identities, cycle, seed):
    pairs = ShuffledPairs((seed, 2))
    for identity, size in identities:
        visits = size * cycle + np.arange(2 * size)
        taken = pairs.take(np.full(2 * size, identity), np.full(2 * size, size), visits)
        assert (taken[0] != taken[1]).all()
        shown = np.cumsum([np.bincount(pair, minlength=size) for pair in taken.T], axis=0)
        visit = np.arange(1, 2 * size + 1)
        assert (shown.min(1) == 2 * visit // size).all() and (shown.max(1) == -(-2 * visit // size)).all()


def test_visits_are_read_one_by_one_as_together_and_differ_by_seed_identity_and_cycle():
    identities, sizes = np.repeat([4, 5, 6, 7], 60), np.repeat([3, 20, 20, 61], 60)
    visits = np.tile(np.arange(60), 4)
    pairs = ShuffledPairs((1, 2))
    together = pairs.take(identities, sizes, visits)
    alone = [pairs.take(identities[i:i + 1], sizes[i:i + 1], visits[i:i + 1]) for i in range(240)]
    assert np.array_equal(np.concatenate(alone, axis=1), together)
    of_20 = [together[:, 60 * i + 10 * cycle:60 * i + 10 * cycle + 10].tolist() for i in (1, 2) for cycle in range(6)]
    other_seed = ShuffledPairs((2, 2)).take(identities, sizes, visits)[:, 60:70].tolist()
    assert len({str(each) for each in [*of_20, other_seed]}) == 13


def test_an_identity_of_any_size_costs_the_same():
    sizes = np.array([2**40 + 1, 2**40 + 1, 2, 3])
    taken = ShuffledPairs((0, 2)).take(np.arange(4), sizes, np.array([0, 2**39, 2**50, 2**50]))  # the second one crosses
    assert (taken >= 0).all() and (taken < sizes).all() and (taken[0] != taken[1]).all()


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 7, 17])
def test_every_pair_of_images_is_equally_frequent_over_identities_and_over_visits(size):
    for identities, visits in (np.arange(20000), np.full(20000, size // 2)), (np.full(20000, 8), np.arange(20000)):
        first, second = ShuffledPairs((5, 2)).take(identities, np.full(20000, size), visits)
        counts, expected = np.bincount(size * first + second, minlength=size**2), 20000 / (size * (size - 1))
        assert (np.abs(counts - expected)[~np.eye(size, dtype=bool).ravel()] < 5 * expected**0.5).all()


@pytest.mark.parametrize("rate, batch_size, warned", [(2 / 3, 6, True), (1.0, 6, True), (0.0, 5, False), (0.1, 6, False)])
def test_without_an_identity_of_two_images_batches_are_random_images_and_a_warning_says_so(rate, batch_size, warned, caplog):
    index = index_of([1] * 31)
    ranks = samplers(index, batch_size, rate, 2, seed=0)
    assert ("no identity has two images, so there are no pairs" in caplog.text) == warned
    images = np.concatenate([sampler.batch(step) for step in range(31) for sampler in ranks]).tolist()
    assert len(images) == 31 * 2 * batch_size
    assert_whole_passes(images, list(range(31)))
    assert ranks[0].position(31) == (31, 0, len(images))


def test_the_identities_of_pairs_take_four_bytes_each_and_none_without_pairs():
    sizes = np.random.default_rng(0).integers(1, 4, 1000)
    index = index_of(sizes)
    assert DualSampler(index, 8, 1, 2 / 3).paired.nbytes == 4 * np.count_nonzero(sizes > 1)
    assert DualSampler(index, 8, 1, identity_rate=0.0).paired.nbytes == 0


def test_the_identity_rate_sets_the_share_of_pairs():
    index = index_of([5] * 420)
    for batch_size, pairs in (128, 42), (12, 4), (6, 2), (2, 0):
        assert split(DualSampler(index, batch_size, 10, 2 / 3), 0)[0].shape == (2, pairs)


def test_batches_depend_only_on_seed_epoch_rank_and_world_size():
    index = index_of([4] * 50)

    def epoch(number, seed=1, rank=0, world_size=2):
        sampler = DualSampler(index, 8, 6, 2 / 3, seed=seed, rank=rank, world_size=world_size)
        sampler.set_epoch(number)
        batches = list(sampler)
        assert len(batches) == len(sampler) == 6
        return np.array(batches)

    assert np.array_equal(epoch(3), epoch(3))
    for other in epoch(4), epoch(3, seed=2), epoch(3, rank=1), epoch(3, world_size=3):
        assert not np.array_equal(epoch(3), other)


def test_an_epoch_continues_where_the_previous_one_ended():
    index = index_of([2] * 40)
    sampler = DualSampler(index, 8, 5, 2 / 3)
    taken = []
    for epoch in range(16):
        sampler.set_epoch(epoch)
        taken += [split(sampler, 5 * epoch + i)[1] for i in range(5)]
    images = np.concatenate(taken)
    assert sorted(images[:80]) == sorted(images[80:160]) == list(range(80))


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_any_part_of_a_stream_can_be_read_directly(size):
    stream = ShuffledPasses(size, (3, 1))
    whole = stream.take(np.arange(4 * size))
    assert np.array_equal(np.concatenate([stream.take(np.array([i])) for i in range(4 * size)]), whole)
    some = np.random.default_rng(0).permutation(4 * size)[:size + 1]
    assert np.array_equal(stream.take(some), whole[some])
    assert not size > 1 or not np.array_equal(whole[:size], whole[size:2 * size])


def test_a_stream_is_that_of_version_0_2_whose_passes_resumed_trainings_finish():
    of_10 = ShuffledPasses(10, (3, 1)).take(np.arange(20)).tolist()
    of_42_million = ShuffledPasses(42_474_557, (3, 1)).take(np.arange(42_474_555, 42_474_559)).tolist()
    assert of_10 == [9, 0, 3, 2, 4, 7, 1, 8, 5, 6, 8, 0, 7, 5, 1, 4, 9, 6, 3, 2]
    assert of_42_million == [1636261, 12570558, 29557078, 36309796]


def test_every_number_is_equally_frequent_at_every_position_and_after_every_other_number():
    size, passes = 11, 6000
    orders = np.stack([ShuffledPasses(size, (5, 1)).take(np.arange(size * i, size * (i + 1))) for i in range(passes)])
    positions = np.stack([np.bincount(column, minlength=size) for column in orders.T])
    followers = np.zeros((size, size))
    np.add.at(followers, (orders[:, :-1].ravel(), orders[:, 1:].ravel()), 1)
    for counts, expected in (positions, passes / size), (followers[~np.eye(size, dtype=bool)], passes / size):
        assert np.abs(counts - expected).max() < 5 * expected**0.5


@settings(max_examples=60, deadline=None)
@given(set_ups(), st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=4))
def test_passes_continue_without_gap_or_repetition_when_the_number_of_ranks_or_the_batch_size_changes(set_up, changes):
    index, batch_size, rate, world_size, seed = set_up
    identities, images, origin, shown = [], [], None, np.zeros(len(index), int)
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
                np.add.at(shown, pairs, 1)
        position = ranks[0].position(begin + steps)
        assert position[1:] == (len(identities), len(images))
        origin, world_size, batch_size = position, next_world_size, 2 * next_half
    assert_whole_passes(identities, with_two(index) if identities else [])
    assert_whole_passes(images, list(range(len(index))))
    assert all(np.ptp(shown[index.images_of(identity)]) <= 1 for identity in index.numbers)


@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple, lambda labels: np.array(labels, np.uint8),
                                  lambda labels: torch.tensor(labels, dtype=torch.int32)])
def test_labels_of_any_kind_give_the_same_batches(kind):
    samplers = [DualSampler.from_labels(labels, 8, 2 / 3, seed=2) for labels in (kind(LABELS), LABELS)]
    assert list(samplers[0]) == list(samplers[1])


def test_a_sampler_from_labels_pairs_images_of_equal_labels_and_covers_the_images_in_an_epoch():
    sampler = DualSampler.from_labels(LABELS, 8, identity_rate=1.0)
    assert len(sampler) == len(LABELS) // 8 == len(list(sampler))
    pairs, _ = split(sampler, 0)
    assert pairs.shape[1] > 0 and all(LABELS[a] == LABELS[b] for a, b in pairs.T)
    assert len(DualSampler.from_labels(LABELS, 8, 2 / 3, rank=1, world_size=2)) == len(LABELS) // 16
    assert len(DualSampler.from_labels(LABELS, 8, num_steps=100)) == 100


@pytest.mark.parametrize("identity_rate", [0.0, 2 / 3])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_plain_data_loader_yields_epoch_after_epoch_and_each_pass_takes_every_image_once(num_workers, identity_rate):
    sampler = DualSampler.from_labels(LABELS, 8, identity_rate, seed=4)
    loader = DataLoader(range(len(LABELS)), batch_sampler=sampler, num_workers=num_workers)
    epochs = [[batch.tolist() for batch in loader] for _ in range(10)]
    assert [len(epoch) for epoch in epochs] == [len(loader)] * 10 == [6] * 10

    batches = [batch for epoch in epochs for batch in epoch]
    assert batches == [sampler.batch(step).tolist() for step in range(60)]
    images = np.concatenate([split(sampler, step)[1] for step in range(60)])
    passes = len(images) // len(LABELS)
    assert passes >= 2
    for each in np.split(images[:passes * len(LABELS)], passes):
        assert sorted(each) == list(range(len(LABELS)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_set_epoch_chooses_the_next_epoch_of_a_plain_data_loader(num_workers):
    sampler = DualSampler.from_labels(LABELS, 8, 2 / 3, seed=4)
    loader = DataLoader(range(len(LABELS)), batch_sampler=sampler, num_workers=num_workers, persistent_workers=num_workers > 0)
    for epoch, first_step in (3, 0), (1, 2), (1, 0):
        sampler.set_epoch(epoch, first_step)
        steps = list(sampler.steps)
        assert steps == list(range(6 * epoch + first_step, 6 * epoch + 6))
        assert [batch.tolist() for batch in loader] == [sampler.batch(step).tolist() for step in steps]
    assert sampler.epoch == 2


def write_batches(rank, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    from_group = DualSampler.from_labels(LABELS, 8, 2 / 3, seed=3)
    given = DualSampler.from_labels(LABELS, 8, 2 / 3, seed=3, rank=2, world_size=3)
    torch.save([list(from_group), list(given)], folder / f"{rank}.pt")
    distributed.destroy_process_group()


def test_ranks_come_from_the_process_group_unless_given(tmp_path):
    on_ranks(write_batches, (tmp_path,), 2)
    for rank in range(2):
        from_group, given = torch.load(tmp_path / f"{rank}.pt")
        assert from_group == list(DualSampler.from_labels(LABELS, 8, 2 / 3, seed=3, rank=rank, world_size=2))
        assert given == list(DualSampler.from_labels(LABELS, 8, 2 / 3, seed=3, rank=2, world_size=3))


@pytest.mark.parametrize("labels, found", [
    ([0.5, 1.0], r"float64 of shape \(2,\)"), (torch.zeros(4), r"float32 of shape \(4,\)"), ([], r"of shape \(0,\)"),
    ([[0, 1], [2, 3]], r"int64 of shape \(2, 2\)"), (np.zeros((3, 1), int), r"int64 of shape \(3, 1\)"),
    (np.array(["anna"]), r"of shape \(1,\)"), ([True, False], "bool of shape"), ([1, 2**70], "object of shape"),
    ([3, -1, 8], "from -1 to 8"), (np.array([0, 2**63], np.uint64), f"from 0 to {2**63}")], ids=str)
def test_bad_labels_are_refused_with_what_was_found(labels, found):
    with pytest.raises(InputError, match=f"labels are .*{found}.*: must be"):
        DualSampler.from_labels(labels, 2)


@pytest.mark.parametrize("arguments, message", [
    (dict(batch_size=7, identity_rate=0.5), "batch_size=7: .* make it even"),
    (dict(batch_size=0), "batch_size=0 gives"),
    (dict(batch_size=-2), "batch_size=-2 gives"),
    (dict(batch_size=52), "batch_size=52 gives 0 steps an epoch for 51 images on 1 ranks"),
    (dict(batch_size=26, rank=0, world_size=2), "batch_size=26 gives 0 steps an epoch for 51 images on 2 ranks"),
    (dict(batch_size=8, num_steps=0), "gives 0 steps"),
    (dict(batch_size=8, identity_rate=1.5), "identity_rate=1.5: must be"),
    (dict(batch_size=8, rank=2, world_size=2), "rank=2, world_size=2: rank must be"),
    (dict(batch_size=8, rank=1), "rank=1, world_size=1: rank must be")],
    ids=str)
def test_batches_that_cannot_be_made_are_refused_with_what_was_found(arguments, message):
    with pytest.raises(InputError, match=message):
        DualSampler.from_labels(LABELS, **arguments)


def test_an_odd_batch_is_allowed_without_pairs():
    assert {len(batch) for batch in DualSampler.from_labels(LABELS, 7, identity_rate=0.0)} == {7}


def test_labels_beyond_int32_stay_exact():
    labels = [2**31 + 1, 5, 2**63 - 1, 2**31 + 1, 2**63 - 1, 5, 2**63 - 2, 1]  # int32 wraps, float64 merges the largest
    index = IdentityIndex.from_labels(labels)
    assert index.identity.tolist() == labels and index.numbers.tolist() == sorted(set(labels))
    assert [index.images_of(label).tolist() for label in (2**31 + 1, 2**63 - 1, 2**63 - 2)] == [[0, 3], [2, 4], [6]]
    small = np.unique(labels, return_inverse=True)[1]
    assert list(DualSampler.from_labels(labels, 4, 2 / 3)) == list(DualSampler.from_labels(small, 4, 2 / 3))
    assert IdentityIndex.from_labels(LABELS).identity.dtype == IdentityIndex.from_labels([2**31 - 1]).identity.dtype == np.int32
