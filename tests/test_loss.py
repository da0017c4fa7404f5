"""The pool's loss against plain autograd on explicitly built view matrices, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn.functional import normalize

from f2c_plugin.loss import HalfStep, Margin, default_hard_negatives, pool_loss
from f2c_plugin.pool import DynamicClassPool

ARCFACE = Margin(scale=64.0, angular=0.5)
COSFACE = Margin(scale=64.0, additive=0.4)
MARGINS = {"arcface": ARCFACE, "cosface": COSFACE, "cosface filtered": Margin(32.0, additive=0.35, filter_threshold=0.2)}


def slow_loss(embeddings, labels, rows, renewed, margin, num_hard_negatives, twins=None):
    """Probe by probe and slot by slot, as the design says it; probes outside the pool tell their twins from it, if there are any."""
    second_view = rows[0].clone()
    for slot in renewed.tolist():
        second_view[slot] = rows[1, slot]
    total = embeddings.sum() * 0
    for view in rows[0], second_view:
        positives, negatives = [], []
        for number, (embedding, label) in enumerate(zip(embeddings, labels.tolist())):
            cosines = []
            for slot, feature in enumerate(view):
                cosine = embedding @ feature / embedding.norm()
                if margin.filter_threshold and slot != label and cosine > margin.filter_threshold:
                    cosine = cosine * 0
                cosines.append(cosine)
            if label >= 0:
                own = cosines[label]
                if margin.angular:
                    own = torch.cos(torch.acos(own) + margin.angular)
                cosines[label] = own - margin.additive
                logits = margin.scale * torch.stack(cosines)
                positives.append(torch.logsumexp(logits, 0) - logits[label])
            elif twins is not None:
                twin = embedding @ twins[number] / embedding.norm() / twins[number].norm()
                negatives.append(torch.logsumexp(margin.scale * torch.stack([*cosines, twin]), 0) - margin.scale * twin)
            else:
                hardest = sorted(cosines, key=lambda cosine: cosine.item(), reverse=True)[:num_hard_negatives]
                negatives += [cosine.clamp_min(0) for cosine in hardest]
        if positives:
            total = total + sum(positives) / len(positives)
        if negatives:
            total = total + sum(negatives) / len(negatives)
    return total


def loss_of(embeddings, labels, rows, renewed, margin, num_hard_negatives, autocast=False, more_apart=(), twins=None):
    """pool_loss of a single half-step whose pool has ``rows``."""
    pool = DynamicClassPool(rows.size(1), rows.size(1), rows.size(2)).to(rows.dtype)
    pool.rows.copy_(rows)
    apart = torch.cat([renewed, labels, torch.tensor(more_apart, dtype=torch.int64)])
    half_step = HalfStep(embeddings, labels, pool.rows_at(apart), torch.isin(apart, renewed), twins)
    return pool_loss([half_step], apart, pool, margin, num_hard_negatives, autocast)


def problem(labels, renewed, num_slots=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(len(labels), 6, dtype=torch.float64, generator=generator, requires_grad=True)
    rows = normalize(torch.randn(2, num_slots, 6, dtype=torch.float64, generator=generator), dim=2)
    return embeddings, torch.tensor(labels), rows, torch.tensor(renewed, dtype=torch.int64)


def assert_exact(embeddings, labels, rows, renewed, margin, num_hard_negatives, more_apart=(), twins=None):
    result = loss_of(embeddings, labels, rows, renewed, margin, num_hard_negatives, more_apart=more_apart, twins=twins)
    gradient, = torch.autograd.grad(result.loss, embeddings)
    expected = slow_loss(embeddings, labels, rows, renewed, margin, num_hard_negatives, twins)
    expected_gradient, = torch.autograd.grad(expected, embeddings)
    assert math.isclose(result.loss.item(), expected.item(), rel_tol=0, abs_tol=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-9)


@pytest.mark.parametrize("margin", MARGINS.values(), ids=MARGINS)
@pytest.mark.parametrize("labels", [[0, 3, -1, 8, -1], [0, 3, 8], [-1, -1], [5, 5, 5, -1]],
                         ids=["both", "no negatives", "no positives", "repeated identity"])
@pytest.mark.parametrize("renewed", [[], [3], [0, 3, 5, 5, 7]], ids=["none renewed", "one", "several, repeated"])
def test_loss_and_gradient_equal_plain_autograd(margin, labels, renewed):
    assert_exact(*problem(labels, renewed), margin, num_hard_negatives=3)


@settings(max_examples=60, deadline=None)
@given(labels=st.lists(st.integers(-1, 8), min_size=1, max_size=8), renewed=st.lists(st.integers(0, 8), max_size=9),
       hard=st.integers(1, 12), seed=st.integers(0, 1000), name=st.sampled_from(sorted(MARGINS)),
       more_apart=st.lists(st.integers(-1, 8), max_size=5), with_twins=st.booleans())
def test_loss_and_gradient_equal_plain_autograd_for_any_batch(labels, renewed, hard, seed, name, more_apart, with_twins):
    twins = 3 * torch.randn(len(labels), 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) if with_twins else None
    assert_exact(*problem(labels, renewed, seed=seed), MARGINS[name], hard, more_apart, twins)


def test_a_twin_that_is_not_finite_counts_as_far_from_everything():
    embeddings, labels, rows, renewed = problem([0, -1, -1], [3])
    twins = torch.randn(3, 6, dtype=torch.float64)
    twins[1] = torch.nan
    loss = loss_of(embeddings, labels, rows, renewed, COSFACE, 3, twins=twins).loss
    loss.backward()
    assert loss.isfinite() and embeddings.grad.isfinite().all()


def test_the_pool_may_change_between_loss_and_backward():
    embeddings, labels, rows, renewed = problem([0, 3, -1], [3])
    loss = loss_of(embeddings, labels, rows, renewed, ARCFACE, 3).loss
    expected, = torch.autograd.grad(slow_loss(embeddings, labels, rows, renewed, ARCFACE, 3), embeddings)
    rows.zero_()
    loss.backward()
    torch.testing.assert_close(embeddings.grad, expected, rtol=0, atol=1e-9)


def test_probes_that_equal_their_slot_give_finite_losses_and_gradients():
    rows = normalize(torch.randn(2, 9, 6), dim=2)
    embeddings = rows[0, :4].clone().requires_grad_()
    loss = loss_of(embeddings, torch.arange(4), rows, torch.tensor([1]), ARCFACE, 3).loss
    loss.backward()
    assert loss.isfinite() and embeddings.grad.isfinite().all()


def test_the_gradient_in_mixed_precision_points_where_that_in_full_precision_does():
    embeddings, labels, rows, renewed = problem([0, 3, -1, 8], [3])
    gradients = []
    for autocast in False, True:
        probes = embeddings.detach().float().requires_grad_()
        loss_of(probes, labels, rows.float(), renewed, COSFACE, 3, autocast).loss.backward()
        gradients.append(probes.grad)
    assert torch.nn.functional.cosine_similarity(*gradients).min() > 0.99
    torch.testing.assert_close(gradients[1].norm(), gradients[0].norm(), rtol=0.05, atol=0)


def test_in_mixed_precision_a_slot_at_the_filters_threshold_takes_no_other_slots_place():
    cosine = 0.3015  # above the threshold of 0.301 in float32, below in bfloat16
    rows = torch.tensor([[cosine, (1 - cosine**2) ** 0.5], [0.25, 0.9375**0.5], [-1.0, 0]]).expand(2, 3, 2)
    margin = Margin(16.0, additive=0.4, filter_threshold=0.301)
    for autocast in False, True:
        embeddings = torch.tensor([[1.0, 0]], requires_grad=True)
        loss = loss_of(embeddings, torch.tensor([-1]), rows, torch.tensor([], dtype=torch.int64), margin, 1, autocast).loss
        assert loss.item() == pytest.approx(2 * (cosine if autocast else 0.25), abs=0.01)


def test_what_is_watched_describes_the_batch():
    rows = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    embeddings = torch.tensor([[3.0, 4, 0, 0], [0, 0, 5, 0]], dtype=torch.float64)
    result = loss_of(embeddings, torch.tensor([0, -1]), rows, torch.tensor([], dtype=torch.int64), COSFACE, 2)
    assert result.found == 0.5
    assert math.isclose(result.positive_cosine, 0.6)
    assert math.isclose(result.hard_negative_cosine, 0.5)


def test_hard_negatives_default_to_0_02_percent_of_the_slots_from_3_to_10():
    assert [default_hard_negatives(k) for k in (10, 15_000, 20_000, 35_000, 50_000, 10**6)] == [3, 3, 4, 7, 10, 10]


class HostMargin:
    """The attributes of the host's CombinedMarginLoss that are read."""

    def __init__(self, m1, m2, m3):
        self.s, self.m1, self.m2, self.m3, self.interclass_filtering_threshold = 64, m1, m2, m3, 0.25


def test_margins_of_the_host_are_understood_and_others_refused():
    assert Margin.of_host(HostMargin(1.0, 0.5, 0.0)) == Margin(64, angular=0.5, filter_threshold=0.25)
    assert Margin.of_host(HostMargin(1.0, 0.0, 0.4)) == Margin(64, additive=0.4, filter_threshold=0.25)
    with pytest.raises(ValueError, match=r"margin_list=\(2.0, 0.5, 0.0\)"):
        Margin.of_host(HostMargin(2.0, 0.5, 0.0))
