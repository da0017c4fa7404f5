"""One pass over the slots against torch's own logsumexp, softmax and topk on the whole matrix."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn.functional import normalize

from f2c_plugin.method import pool_softmax as module
from f2c_plugin.method.pool_softmax import pool_softmax
from f2c_plugin.utils import tensors


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setitem(module.CHUNK_ENTRIES, "cpu", 30)  # several chunks, the last one narrower
    monkeypatch.setattr(tensors, "_GROUP", 3)


def problem(num_probes, num_slots, left_out, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    probes, rows = (normalize(torch.randn(n, 6, dtype=dtype, generator=generator)) for n in (num_probes, num_slots))
    mask = torch.zeros(num_slots, dtype=torch.bool)
    mask[list(left_out)] = True
    return probes.requires_grad_(), rows, mask


def plain(probes, rows, mask, scale, count, threshold):
    """(log-sum-exp, its gradient, largest cosines) with everything held at once."""
    cosine = (probes @ rows.T)[:, ~mask]
    if threshold:
        cosine = torch.where(cosine > threshold, 0.0, cosine)
    value = (scale * cosine).logsumexp(1)
    gradient, = torch.autograd.grad(value.sum(), probes)
    return value, gradient, cosine.topk(min(count, cosine.size(1)), 1).values


@settings(max_examples=150, deadline=None)
@given(num_probes=st.integers(1, 5), num_slots=st.integers(1, 40), scale=st.sampled_from([1.0, 16.0, 64.0]),
       threshold=st.sampled_from([0.0, 0.3]), count=st.integers(1, 12), data=st.data())
def test_value_gradient_and_hardest_are_those_of_the_whole_matrix(num_probes, num_slots, scale, threshold, count, data):
    left_out = data.draw(st.sets(st.integers(0, num_slots - 1), max_size=num_slots - 1))
    probes, rows, mask = problem(num_probes, num_slots, left_out, seed=num_slots)
    found = pool_softmax(probes, rows, mask, scale, count, threshold)
    gradient, = torch.autograd.grad(found.total.sum(), probes)
    value, expected_gradient, hardest = plain(probes, rows, mask, scale, count, threshold)
    torch.testing.assert_close(found.total, value, rtol=0, atol=1e-10)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-9)
    real = hardest.size(1)
    torch.testing.assert_close(found.hardest_cosine[:, :real], hardest, rtol=0, atol=1e-12)
    assert (found.hardest_cosine[:, real:] < -2).all() and not mask[found.hardest[:, :real]].any()
    if not threshold:
        cosine = (probes @ rows.T).gather(1, found.hardest[:, :real])
        torch.testing.assert_close(cosine, hardest, rtol=0, atol=1e-12)


def test_with_every_slot_left_out_it_counts_for_nothing_and_stays_finite():
    probes, rows, mask = problem(3, 11, range(11))
    found = pool_softmax(probes, rows, mask, 64.0, 2)
    total = torch.logaddexp(found.total, torch.zeros(3))
    gradient, = torch.autograd.grad(total.sum(), probes)
    assert (total == 0).all() and (gradient == 0).all()


@pytest.mark.parametrize("spread", ["probes equal a row", "all rows alike"])
def test_in_float32_it_is_right_to_rounding_where_one_slot_or_none_dominates(spread):
    probes, rows, mask = problem(4, 50, [], dtype=torch.float32)
    with torch.no_grad():
        if spread == "probes equal a row":
            probes.copy_(rows[[0, 13, 29, 49]])
        else:
            rows[:] = normalize(rows.mean(0), dim=0)
    found = pool_softmax(probes, rows, mask, 64.0, 3)
    gradient, = torch.autograd.grad(found.total.sum(), probes)
    value, expected_gradient, _ = plain(probes.detach().double().requires_grad_(), rows.double(), mask, 64.0, 3, 0)
    torch.testing.assert_close(found.total.double(), value, rtol=2e-6, atol=2e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matrix_products_in_half_precision_stay_close(dtype):
    probes, rows, mask = problem(5, 60, [3], dtype=torch.float32)
    exact, close = (pool_softmax(probes, rows.to(kind), mask, 16.0, 3, dtype=kind) for kind in (torch.float32, dtype))
    assert close.total.dtype == torch.float32
    torch.testing.assert_close(close.total, exact.total, rtol=0.02, atol=0.1)
    gradients = [torch.autograd.grad(found.total.sum(), probes)[0] for found in (exact, close)]
    assert torch.nn.functional.cosine_similarity(*gradients).min() > 0.999
