"""The pool's loss against plain autograd on explicitly built view matrices, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn.functional import normalize

from f2c_plugin.build import margin_from
from f2c_plugin.errors import ConfigError
from f2c_plugin.method.loss import HalfStep, default_hard_negatives, pool_loss
from f2c_plugin.method.margin import Margin
from f2c_plugin.method.pool import DynamicClassPool
from tests.reference.loss import slow_loss

ARCFACE = Margin(scale=64.0, angular=0.5)
COSFACE = Margin(scale=64.0, additive=0.4)
MARGINS = {"arcface": ARCFACE, "cosface": COSFACE, "cosface filtered": Margin(32.0, additive=0.35, filter_threshold=0.2)}


def half_step_of(embeddings, labels, rows, two_keys, entering=(), entering_twice=()):
    """(half-step, pool): a pool that is ``rows`` in the view of the half-step, and something else before it.

    Identity i is in slot i; labels of -1 become an identity that is not in the pool. Identities in
    ``two_keys`` are in the pool before and get their row 1; those that enter take the slot of another, with one
    feature or two.
    """
    _, num_slots, size = rows.shape
    outside = 2 * num_slots
    pool = DynamicClassPool(num_slots, outside + 1, size).to(rows.dtype)
    pool.rows.copy_(rows)
    pool.rows[1] = normalize(torch.ones_like(rows[1]), dim=1)  # row 1 is never seen but through the view
    pool.slot_identity.copy_(torch.arange(num_slots))
    pool.next_row.fill_(1)
    if not (two_keys or entering or entering_twice):
        entering = [num_slots - 1]  # a half-step always writes something
    enter = [*entering, *entering_twice]
    assert len(set(enter)) == len(enter) and not set(enter) & set(two_keys)
    pool.slot_identity[enter] += num_slots  # of others, which are evicted
    pool.rows[:, enter] = normalize(torch.ones(size, dtype=rows.dtype), dim=0)
    order = enter + [slot for slot in range(num_slots) if slot not in enter]  # from least to most recently used
    pool.last_used[order] = torch.arange(num_slots)
    pool.clock.fill_(num_slots)
    pool._after_loading()

    identities = torch.tensor([*enter, *two_keys, *entering_twice], dtype=torch.int64)
    features = torch.cat([rows[0, enter], rows[1, [*two_keys, *entering_twice]]])
    view = pool.preview(identities, features)
    labels = torch.where(labels < 0, outside, labels)
    return HalfStep(embeddings, labels, labels, view), pool


def loss_of(embeddings, labels, rows, two_keys, margin, num_hard_negatives, autocast=False, **changes):
    """pool_loss of a single half-step whose pool has ``rows``."""
    half_step, pool = half_step_of(embeddings, labels, rows, two_keys, **changes)
    return pool_loss([half_step], pool, margin, num_hard_negatives, autocast)


def problem(labels, num_slots=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(len(labels), 6, dtype=torch.float64, generator=generator, requires_grad=True)
    rows = normalize(torch.randn(2, num_slots, 6, dtype=torch.float64, generator=generator), dim=2)
    return embeddings, torch.tensor(labels), rows


def assert_exact(embeddings, labels, rows, two_keys, margin, num_hard_negatives, entering=(), entering_twice=()):
    result = loss_of(embeddings, labels, rows, two_keys, margin, num_hard_negatives, entering=entering,
                     entering_twice=entering_twice)
    gradient, = torch.autograd.grad(result.loss, embeddings)
    second_keys = torch.tensor([*two_keys, *entering_twice], dtype=torch.int64)
    expected = slow_loss(embeddings, labels, rows, second_keys, margin, num_hard_negatives)
    expected_gradient, = torch.autograd.grad(expected, embeddings)
    assert math.isclose(result.loss.item(), expected.item(), rel_tol=0, abs_tol=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-9)


@pytest.mark.parametrize("margin", MARGINS.values(), ids=MARGINS)
@pytest.mark.parametrize("labels", [[0, 3, -1, 8, -1], [0, 3, 8], [-1, -1], [5, 5, 5, -1]],
                         ids=["both", "no negatives", "no positives", "repeated identity"])
@pytest.mark.parametrize("two_keys", [[], [3], [0, 3, 5, 7]], ids=["none with two keys", "one", "several"])
def test_loss_and_gradient_equal_plain_autograd(margin, labels, two_keys):
    assert_exact(*problem(labels), two_keys, margin, num_hard_negatives=3)


@settings(max_examples=100, deadline=None)
@given(labels=st.lists(st.integers(-1, 8), min_size=1, max_size=8), kinds=st.lists(st.integers(0, 3), min_size=9, max_size=9),
       hard=st.integers(1, 12), seed=st.integers(0, 1000), name=st.sampled_from(sorted(MARGINS)))
def test_loss_and_gradient_equal_plain_autograd_for_any_batch(labels, kinds, hard, seed, name):
    two_keys, entering, entering_twice = ([slot for slot in range(9) if kinds[slot] == kind] for kind in (1, 2, 3))
    assert_exact(*problem(labels, seed=seed), two_keys, MARGINS[name], hard, entering, entering_twice)


def test_the_pool_may_change_between_loss_and_backward():
    embeddings, labels, rows = problem([0, 3, -1, 5])
    half_step, pool = half_step_of(embeddings, labels, rows, [3], entering=[5])
    loss = pool_loss([half_step], pool, ARCFACE, 3).loss
    expected, = torch.autograd.grad(slow_loss(embeddings, labels, rows, torch.tensor([3]), ARCFACE, 3), embeddings)
    pool.commit(half_step.view)
    for buffer in pool.buffers():
        buffer.zero_()
    loss.backward()
    torch.testing.assert_close(embeddings.grad, expected, rtol=0, atol=1e-9)


def test_probes_that_equal_their_slot_give_finite_losses_and_gradients():
    rows = normalize(torch.randn(2, 9, 6), dim=2)
    embeddings = rows[0, :4].clone().requires_grad_()
    loss = loss_of(embeddings, torch.arange(4), rows, [1], ARCFACE, 3).loss
    loss.backward()
    assert loss.isfinite() and embeddings.grad.isfinite().all()


def test_the_gradient_in_mixed_precision_points_where_that_in_full_precision_does():
    embeddings, labels, rows = problem([0, 3, -1, 8])
    gradients = []
    for autocast in False, True:
        probes = embeddings.detach().float().requires_grad_()
        loss_of(probes, labels, rows.float(), [3], COSFACE, 3, autocast).loss.backward()
        gradients.append(probes.grad)
    assert torch.nn.functional.cosine_similarity(*gradients).min() > 0.99
    torch.testing.assert_close(gradients[1].norm(), gradients[0].norm(), rtol=0.05, atol=0)


def test_in_mixed_precision_a_slot_at_the_filters_threshold_takes_no_other_slots_place():
    cosine = 0.3015  # above the threshold of 0.301 in float32, below in bfloat16
    rows = torch.tensor([[cosine, (1 - cosine**2) ** 0.5], [0.25, 0.9375**0.5], [-1.0, 0]]).expand(2, 3, 2)
    margin = Margin(16.0, additive=0.4, filter_threshold=0.301)
    for autocast in False, True:
        embeddings = torch.tensor([[1.0, 0]], requires_grad=True)
        loss = loss_of(embeddings, torch.tensor([-1]), rows, [], margin, 1, autocast).loss
        assert loss.item() == pytest.approx(2 * (cosine if autocast else 0.25), abs=0.01)


def test_the_statistics_describe_the_batch():
    rows = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    embeddings = torch.tensor([[3.0, 4, 0, 0], [0, 0, 5, 0]], dtype=torch.float64)
    result = loss_of(embeddings, torch.tensor([0, -1]), rows, [], COSFACE, 2)
    assert result.pool_hit_rate == 0.5
    assert math.isclose(result.positive_cosine, 0.6)
    assert math.isclose(result.hard_negative_cosine, 0.5)


def test_hard_negatives_default_to_0_02_percent_of_the_slots_from_3_to_10():
    assert [default_hard_negatives(k) for k in (10, 15_000, 20_000, 35_000, 50_000, 10**6)] == [3, 3, 4, 7, 10, 10]


class CombinedMarginLoss:
    """The attributes of arcface_torch's CombinedMarginLoss that are read."""

    def __init__(self, m1, m2, m3):
        self.s, self.m1, self.m2, self.m3, self.interclass_filtering_threshold = 64, m1, m2, m3, 0.25


def test_margins_of_arcface_torch_are_understood_and_others_refused():
    assert margin_from(CombinedMarginLoss(1.0, 0.5, 0.0)) == Margin(64, angular=0.5, filter_threshold=0.25)
    assert margin_from(CombinedMarginLoss(1.0, 0.0, 0.4)) == Margin(64, additive=0.4, filter_threshold=0.25)
    with pytest.raises(ConfigError, match=r"margin_list=\(2.0, 0.5, 0.0\)"):
        margin_from(CombinedMarginLoss(2.0, 0.5, 0.0))
