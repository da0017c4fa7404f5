"""The vectorised pool against a slow reference that follows the design line by line."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn.functional import normalize

from f2c_plugin.method.pool import DynamicClassPool
from f2c_plugin.method.slots import NOT_IN_POOL
from f2c_plugin.utils.distributed import Shard
from tests.reference.pool import SlowPool


def assert_same(pool, slow):
    by_recency = pool.slot_identity[pool.last_used.argsort()]
    assert by_recency[by_recency != NOT_IN_POOL].tolist() == list(slow.slots)
    num_identities = len(pool.slot_of) - 1
    assert pool.lookup(torch.arange(num_identities)).tolist() == [slow.slots.get(i, -1) for i in range(num_identities)]
    assert all(pool.slot_identity[slot] == identity for identity, slot in slow.slots.items())
    assert all(pool.next_row[slot] == slow.next_row[slot] for slot in slow.slots.values())
    assert torch.equal(pool.rows, slow.rows)


@st.composite
def histories(draw):
    """(slots, identities, batches): every batch fits the pool."""
    num_slots = draw(st.integers(1, 8))
    num_identities = draw(st.integers(num_slots, 16))
    batch = st.lists(st.integers(0, num_identities - 1), min_size=1, max_size=12).filter(
        lambda identities: len(set(identities)) <= num_slots)
    return num_slots, num_identities, draw(st.lists(batch, min_size=1, max_size=8))


def write(pool, identities, features):
    """Preview and commit; returns the view."""
    view = pool.preview(torch.as_tensor(identities), features)
    pool.commit(view)
    return view


def state_of(pool):
    return {name: buffer.clone() for name, buffer in pool.named_buffers()}


def features_for(batch, seed):
    return torch.randn(len(batch), 5, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=300, deadline=None)
@given(histories())
def test_every_commit_leaves_slots_rows_next_rows_and_recency_as_the_reference_does(history):
    num_slots, num_identities, batches = history
    pool = DynamicClassPool(num_slots, num_identities, 5)
    slow = SlowPool(pool)
    for seed, batch in enumerate(batches):
        features = features_for(batch, seed)
        new = write(pool, batch, features).assignment
        pool.validate()
        two_keys, evicted = slow.write(batch, features)
        assert_same(pool, slow)
        assert set(new.slot[new.has_two_keys].tolist()) == two_keys
        assert new.evicted[new.evicted != NOT_IN_POOL].tolist() == evicted
        assert new.slot.tolist() == [slow.slots[identity] for identity in batch]


@settings(max_examples=200, deadline=None)
@given(histories())
def test_a_preview_leaves_the_pool_as_it_is_and_shows_what_a_commit_would_make_of_it(history):
    num_slots, num_identities, batches = history
    pool = DynamicClassPool(num_slots, num_identities, 5)
    everyone = torch.arange(num_identities)
    for seed, batch in enumerate(batches):
        before = state_of(pool)
        others = torch.tensor(batches[-1 - seed])
        if len(others.unique()) <= num_slots:
            pool.preview(others, features_for(others, seed + 100))  # a first half-step, which is forgotten
        view = pool.preview(torch.tensor(batch), features_for(batch, seed))
        for name, buffer in pool.named_buffers():
            assert torch.equal(buffer, before[name]), name
        slots, rows = view.lookup(everyone), pool.rows.clone()
        view.write_into(rows, view.assignment.slot)
        pool.commit(view)
        assert torch.equal(pool.lookup(everyone), slots)
        assert torch.equal(pool.rows, rows)


def test_of_more_than_two_features_of_one_identity_the_last_two_stand():
    pool = DynamicClassPool(4, 10, 5)
    features = features_for([3] * 5, 0)
    new = write(pool, [3] * 5, features).assignment
    stored = pool.rows[:, new.slot[0]]
    assert torch.equal(stored, normalize(features)[[4, 3]])
    assert pool.next_row[new.slot[0]] == 1


def test_entries_that_go_to_one_place_all_carry_the_last_feature_so_that_the_order_of_writes_does_not_matter():
    pool = DynamicClassPool(4, 10, 5)
    features = features_for(range(5), 0)
    features[4] = torch.nan
    view = pool.preview(torch.tensor([3, 3, 3, 3, 3]), features)  # rows 0, 1, 0, 1, 0
    assert view.assignment.row.tolist() == [0, 1, 0, 1, 0]
    assert torch.equal(view.features[[1, 3]], normalize(features)[[3, 3]])
    assert view.features[[0, 2, 4]].isnan().all() and view.finite.tolist() == [False, True, False, True, False]
    assert view.num_not_finite == 1


def test_features_that_are_not_finite_are_not_written():
    pool = DynamicClassPool(4, 10, 5)
    features = features_for(range(2), 0)
    write(pool, [3, 5], features)
    features = features.clone()
    features[0, 2] = float("nan")
    view = write(pool, [3, 7], torch.stack([features[0], torch.full((5,), float("inf"))]))
    new = view.assignment
    assert view.num_not_finite == 2
    first, second = pool.rows[:, pool.lookup(torch.tensor(3))]
    assert torch.equal(second, first) and new.has_two_keys[0]
    assert not pool.rows[0, new.slot[1]].any()


def test_a_feature_that_is_not_finite_leaves_no_evicted_identitys_feature_to_its_own():
    pool = DynamicClassPool(1, 10, 4)
    for identity, feature in (7, [1.0, 0, 0, 0]), (7, [0, 1.0, 0, 0]), (3, [0, 0, 1.0, 0]), (3, [float("nan")] * 4):
        new = write(pool, [identity], torch.tensor([feature])).assignment
    assert new.has_two_keys.all() and torch.equal(pool.rows[1, 0], torch.tensor([0, 0, 1.0, 0]))
    view = write(pool, [3], torch.full((1, 4), 1e30))  # finite, but without a finite norm
    assert view.num_not_finite == 1
    pool.validate()


def test_a_pool_of_another_size_is_refused_and_leaves_this_one_as_it_was():
    pool, other = DynamicClassPool(4, 10, 5), DynamicClassPool(5, 10, 5)
    write(pool, [4, 2], features_for(range(2), 0))
    with pytest.raises(RuntimeError, match="size mismatch, .* for a pool of 4 slots"):
        pool.load_state_dict(other.state_dict())
    pool.validate()
    assert pool.clock == 2


def test_every_shard_refuses_rows_of_which_any_is_damaged():
    state = DynamicClassPool(4, 10, 5).state_dict()
    state["rows"][0, 0] = float("nan")
    for rank in 0, 1:
        with pytest.raises(RuntimeError, match="rows are finite"):
            DynamicClassPool(4, 10, 5, shard=Shard(rank, 2)).load_state_dict(state)


def test_slots_not_yet_taken_hold_random_unit_vectors_equal_for_equal_seeds():
    pool = DynamicClassPool(6, 10, 5, seed=7)
    assert torch.allclose(pool.rows.norm(dim=2), torch.ones(2, 6))
    assert torch.equal(pool.rows, DynamicClassPool(6, 10, 5, seed=7).rows)
    assert not torch.equal(pool.rows, DynamicClassPool(6, 10, 5, seed=8).rows)


def test_a_pool_loaded_from_a_state_dict_goes_on_as_the_original():
    pool, copy = DynamicClassPool(3, 10, 5), DynamicClassPool(3, 10, 5, seed=1)
    write(pool, [4, 2, 4, 9], features_for(range(4), 0))
    copy.load_state_dict(pool.state_dict())
    for each in pool, copy:
        write(each, [2, 7], features_for(range(2), 1))
    for name, buffer in pool.named_buffers():
        assert torch.equal(buffer, dict(copy.named_buffers())[name]), name


@pytest.mark.parametrize("taken", [0, 2, 4])
def test_fill_is_the_share_of_slots_that_are_taken(taken):
    pool = DynamicClassPool(4, 10, 5)
    if taken:
        write(pool, torch.arange(taken), features_for(range(taken), 0))
    assert pool.fill() == taken / 4


@settings(max_examples=100, deadline=None)
@given(histories(), st.integers(1, 4))
def test_shards_hold_together_what_the_whole_pool_holds(history, world_size):
    num_slots, num_identities, batches = history
    world_size = min(world_size, num_slots)
    whole = DynamicClassPool(num_slots, num_identities, 5)
    shards = [DynamicClassPool(num_slots, num_identities, 5, shard=Shard(rank, world_size)) for rank in range(world_size)]
    for seed, batch in enumerate(batches):
        for pool in [whole, *shards]:
            write(pool, batch, features_for(batch, seed))
        assert torch.equal(torch.cat([shard.rows for shard in shards], dim=1), whole.rows)
        for shard in shards:
            shard.validate()
            assert torch.equal(shard.slot_of, whole.slot_of) and torch.equal(shard.last_used, whole.last_used)


def test_a_large_pool_starts_with_the_same_random_rows_however_it_is_split():
    whole = DynamicClassPool(40_000, 10, 40, seed=5).rows
    for world_size in 2, 3:
        shards = [DynamicClassPool(40_000, 10, 40, seed=5, shard=Shard(rank, world_size)).rows for rank in range(world_size)]
        assert torch.equal(torch.cat(shards, dim=1), whole)
    assert len(whole.flatten(0, 1).unique(dim=0)) == 80_000  # in each view others
    lengths = whole.norm(dim=2)
    assert torch.allclose(lengths, torch.ones_like(lengths))
    cosines = whole[0, :500] @ torch.cat([whole[0, 500:1000], whole[1, :500], DynamicClassPool(500, 10, 40, seed=6).rows[0]]).T
    assert abs(cosines.mean()) < 1e-3 and cosines.std() == pytest.approx(40 ** -0.5, rel=0.01)  # as those of any directions


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_in_half_precision_are_the_features_rounded(dtype):
    pool = DynamicClassPool(4, 10, 5, dtype=dtype)
    features = features_for(range(2), 0)
    view = write(pool, [3, 5], features)
    new = view.assignment
    assert torch.equal(pool.rows[0, new.slot], normalize(features).to(dtype))
    assert pool.rows_at(new.slot).dtype == torch.float32
    pool.validate()


DAMAGE = {
    "two slots of one identity": ("no identity has two slots", lambda pool: pool.slot_identity.__setitem__(1, 4)),
    "an identity that is none": ("numbers from 0", lambda pool: pool.slot_identity.__setitem__(0, 10)),
    "two slots used at one time": ("a different time", lambda pool: pool.last_used.__setitem__(0, pool.last_used[1])),
    "a clock before the beginning": ("the clock is not negative", lambda pool: pool.clock.fill_(-1)),
    "a slot used in the future": ("before the clock", lambda pool: pool.last_used.__setitem__(0, 99)),
    "free slots out of order": ("in the order of their numbers", lambda pool: pool.last_used.__setitem__(3, -9)),
    "a third row": ("next rows", lambda pool: pool.next_row.__setitem__(0, 2)),
    "a row that is not finite": ("rows are finite", lambda pool: pool.rows.__setitem__((1, 0), float("nan"))),
    "a row that is too long": ("unit vectors", lambda pool: pool.rows.__setitem__((0, 2), 1.0)),
}


@pytest.mark.parametrize("message, damage", DAMAGE.values(), ids=DAMAGE)
def test_a_pool_that_is_damaged_is_recognised_also_when_it_is_loaded(message, damage):
    pool = DynamicClassPool(4, 10, 5)
    write(pool, [4, 2], features_for(range(2), 0))
    pool.validate()
    damage(pool)
    with pytest.raises(ValueError, match=message):
        pool.validate()
    with pytest.raises((ValueError, RuntimeError), match=message):
        DynamicClassPool(4, 10, 5).load_state_dict(pool.state_dict())


def test_a_table_that_does_not_fit_the_slots_is_recognised():
    pool = DynamicClassPool(4, 10, 5)
    write(pool, [4, 2], features_for(range(2), 0))
    pool.slot_of[7] = 0
    with pytest.raises(ValueError, match="the table finds no other"):
        pool.validate()
