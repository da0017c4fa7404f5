"""The vectorised pool against a slow reference that follows the design line by line."""

from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn.functional import normalize

from f2c_plugin.pool import NOT_IN_POOL, DynamicClassPool


class SlowPool:
    """An OrderedDict from least to most recently used identity, and a loop over features."""

    def __init__(self, pool: DynamicClassPool):
        self.rows = pool.rows.clone()
        self.slots = OrderedDict()
        self.due = {}
        self.free = list(range(pool.num_slots))

    def write(self, identities, features):
        renewed, evicted = set(), []
        protected = {identity for identity in identities if identity in self.slots}
        for identity in protected:  # touched before anything is evicted
            self.slots.move_to_end(identity)
        for identity, feature in zip(identities, normalize(features)):
            if identity not in self.slots:
                if self.free:
                    slot = self.free.pop(0)
                else:
                    loser, slot = self.slots.popitem(last=False)
                    assert loser not in identities
                    evicted.append(loser)
                self.rows[0, slot] = feature
                self.due[slot] = 1
            else:
                slot = self.slots[identity]
                self.rows[self.due[slot], slot] = feature
                self.due[slot] = 1 - self.due[slot]
                renewed.add(slot)
            self.slots[identity] = slot
            self.slots.move_to_end(identity)
        return renewed, evicted


def assert_same(pool, slow):
    by_recency = pool.slot_identity[pool.last_used.argsort()]
    assert by_recency[by_recency != NOT_IN_POOL].tolist() == list(slow.slots)
    num_identities = len(pool.slot_of) - 1
    assert pool.lookup(torch.arange(num_identities)).tolist() == [slow.slots.get(i, -1) for i in range(num_identities)]
    assert all(pool.slot_identity[slot] == identity for identity, slot in slow.slots.items())
    assert all(pool.due_row[slot] == slow.due[slot] for slot in slow.slots.values())
    assert torch.equal(pool.rows, slow.rows)


@st.composite
def histories(draw):
    """(slots, identities, batches): every batch fits the pool."""
    num_slots = draw(st.integers(1, 8))
    num_identities = draw(st.integers(num_slots, 16))
    batch = st.lists(st.integers(0, num_identities - 1), min_size=1, max_size=12).filter(
        lambda identities: len(set(identities)) <= num_slots)
    return num_slots, num_identities, draw(st.lists(batch, min_size=1, max_size=8))


def write_into(pool, identities, features):
    """Place and write; returns (placement, write)."""
    placement = pool.place(torch.as_tensor(identities))
    return placement, pool.write(placement, features)


def features_for(batch, seed):
    return torch.randn(len(batch), 5, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=300, deadline=None)
@given(histories())
def test_every_write_leaves_slots_rows_due_rows_and_recency_as_the_reference_does(history):
    num_slots, num_identities, batches = history
    pool = DynamicClassPool(num_slots, num_identities, 5)
    slow = SlowPool(pool)
    for seed, batch in enumerate(batches):
        features = features_for(batch, seed)
        placed, _ = write_into(pool, batch, features)
        pool.validate()
        renewed, evicted = slow.write(batch, features)
        assert_same(pool, slow)
        assert set(placed.slot[placed.renewed].tolist()) == renewed
        assert placed.evicted[placed.evicted != NOT_IN_POOL].tolist() == evicted
        assert placed.slot.tolist() == [slow.slots[identity] for identity in batch]


@settings(max_examples=200, deadline=None)
@given(histories(), st.data())
def test_undo_restores_the_pool_bit_for_bit(history, data):
    num_slots, num_identities, batches = history
    pool = DynamicClassPool(num_slots, num_identities, 5)
    for seed, batch in enumerate(batches):
        before = {name: buffer.clone() for name, buffer in pool.named_buffers()}
        _, write = write_into(pool, batch, features_for(batch, seed))
        pool.undo(write)
        pool.validate()
        for name, buffer in pool.named_buffers():
            assert torch.equal(buffer, before[name]), name
        if data.draw(st.booleans()):
            write_into(pool, batch, features_for(batch, seed))


def test_of_more_than_two_features_of_one_identity_the_last_two_stand():
    pool = DynamicClassPool(4, 10, 5)
    features = features_for([3] * 5, 0)
    placed, _ = write_into(pool, [3] * 5, features)
    stored = pool.rows[:, placed.slot[0]]
    assert torch.equal(stored, normalize(features)[[4, 3]])
    assert pool.due_row[placed.slot[0]] == 1


def test_features_that_are_not_finite_are_not_written():
    pool = DynamicClassPool(4, 10, 5)
    features = features_for(range(2), 0)
    write_into(pool, [3, 5], features)
    kept = pool.rows.clone()
    features[0, 2] = float("nan")
    placed, write = write_into(pool, [3, 7], torch.stack([features[0], torch.full((5,), float("inf"))]))
    assert write.num_skipped == 2
    assert torch.equal(pool.rows[:, pool.lookup(torch.tensor(3))], kept[:, pool.lookup(torch.tensor(3))])
    assert not pool.rows[0, placed.slot[1]].any()


def test_slots_not_yet_taken_hold_random_unit_vectors_equal_for_equal_seeds():
    pool = DynamicClassPool(6, 10, 5, seed=7)
    assert torch.allclose(pool.rows.norm(dim=2), torch.ones(2, 6))
    assert torch.equal(pool.rows, DynamicClassPool(6, 10, 5, seed=7).rows)
    assert not torch.equal(pool.rows, DynamicClassPool(6, 10, 5, seed=8).rows)


def test_a_pool_loaded_from_a_state_dict_goes_on_as_the_original():
    pool, copy = DynamicClassPool(3, 10, 5), DynamicClassPool(3, 10, 5, seed=1)
    write_into(pool, [4, 2, 4, 9], features_for(range(4), 0))
    copy.load_state_dict(pool.state_dict())
    for each in pool, copy:
        write_into(each, [2, 7], features_for(range(2), 1))
    for name, buffer in pool.named_buffers():
        assert torch.equal(buffer, dict(copy.named_buffers())[name]), name


@pytest.mark.parametrize("taken", [0, 2, 4])
def test_fill_is_the_share_of_slots_that_are_taken(taken):
    pool = DynamicClassPool(4, 10, 5)
    if taken:
        write_into(pool, torch.arange(taken), features_for(range(taken), 0))
    assert pool.fill() == taken / 4
