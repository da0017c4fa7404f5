"""The fused kernels in Triton's interpreter, against PyTorch's operators in float64; and heads that use them."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from f2c_plugin import Margin, build_head
from f2c_plugin.method import pool_softmax
from f2c_plugin.method.pool_softmax import learn

triton = pytest.importorskip("triton", reason="THE FUSED KERNELS ARE NOT TESTED: no Triton for this system")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3}
SCALE = 8.0
FIRST_SLOT = 7


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(pool_softmax, "FUSED_ON", {"cpu": tuple(TOLERANCE)})
    from f2c_plugin.method import fused
    assert fused.IS_INTERPRETED
    return fused


def case(num_probes, num_slots, size, dtype):
    """Probes and rows that the products' type holds exactly, so that only the passes differ; and each probe's own slot."""
    torch.manual_seed(num_slots)
    probes, rows = (normalize(torch.randn(n, size)).to(dtype).float() for n in (num_probes, num_slots))
    return probes, rows, torch.randint(num_slots, (num_probes,))


@pytest.mark.parametrize("num_probes, num_slots, size, num_hardest, threshold", [
    (5, 300, 24, 1, 0.0), (20, 150, 16, 3, 0.3), (3, 9, 8, 10, 0.0), (18, 129, 40, 10, 0.2)])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("without", ["some", "own", "both"])
def test_one_pass_equals_the_operators(dtype, num_probes, num_slots, size, num_hardest, threshold, without, interpreted):
    probes, rows, own_slot = case(num_probes, num_slots, size, dtype)
    left_out = torch.rand(num_slots) < 0.1 if without != "own" else None
    # Of slots that are the second part of a pool, as on the second of two ranks.
    keys = dict(own_slot=own_slot + FIRST_SLOT, first_slot=FIRST_SLOT) if without != "some" else {}
    exact, found = probes.double().requires_grad_(), probes.clone().requires_grad_()
    expected = pool_softmax.pool_softmax(exact, rows.double(), left_out, SCALE, num_hardest, threshold, **keys)
    fused = pool_softmax.pool_softmax(found, rows.to(dtype), left_out, SCALE, num_hardest, threshold, dtype, **keys)
    tolerance = dict(rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(fused.total.double(), expected.total, **tolerance)
    there = expected.hardest_cosine > -2
    torch.testing.assert_close(fused.hardest_cosine[there].double(), expected.hardest_cosine[there], **tolerance)
    assert (fused.hardest_cosine[~there] < -2).all()
    cosines = torch.einsum("bd,bhd->bh", probes, rows[fused.hardest])
    there &= expected.hardest_cosine != 0  # filtered ones are equal, and any of them will do
    torch.testing.assert_close(cosines[there].double(), expected.hardest_cosine[there], **tolerance)
    for each in (expected, fused):
        each.total.sum().backward()
    torch.testing.assert_close(found.grad.double(), exact.grad, rtol=0, atol=SCALE * TOLERANCE[dtype])


@pytest.mark.parametrize("num_probes, num_slots, size, threshold", [(5, 70, 24, 0.0), (20, 33, 16, 0.3)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_step_equals_the_operators(dtype, num_probes, num_slots, size, threshold, interpreted):
    probes, rows, own_slot = case(num_probes, num_slots, size, dtype)
    lengths = 0.2 + torch.rand(num_slots, 1)
    log_denominator, own_gradient = (SCALE * probes @ rows.T).logsumexp(1), -torch.rand(num_probes)
    log_denominator[2] = torch.nan  # of an embedding that is not finite
    exact, found = (rows.double(), lengths.double()), (rows.to(dtype, copy=True), lengths.clone())
    own_slot += FIRST_SLOT
    learn(*exact, probes.double(), log_denominator.double(), own_slot, own_gradient.double(), SCALE, 0.7, threshold,
          first_slot=FIRST_SLOT)
    learn(*found, probes, log_denominator, own_slot, own_gradient, SCALE, 0.7, threshold, dtype, first_slot=FIRST_SLOT)
    assert (exact[0] - rows).abs().max() > 0.05  # so it has moved
    for new, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(new.double(), expected, rtol=0, atol=TOLERANCE[dtype])


def test_scale_rate_and_seed_may_be_tensors(interpreted):
    """As in a recorded step, where they change and the kernel must read them on the GPU."""
    probes, rows, own_slot = case(5, 70, 24, torch.float16)
    given = probes, (SCALE * probes @ rows.T).logsumexp(1), own_slot, -torch.ones(5)
    found = []
    for numbers in (SCALE, 0.7, 5), torch.tensor([SCALE, 0.7, 5], dtype=torch.float64).unbind():
        changed = rows.half(), torch.ones(70, 1)
        scale, rate, seed = numbers
        learn(*changed, *given, scale, rate, dtype=torch.float16, seed=seed)
        found.append(changed)
    assert not torch.equal(found[0][0], rows.half())
    assert all(map(torch.equal, *found))


def test_half_precision_is_rounded_at_random_and_differently_in_each_step(interpreted):
    probes, rows, own_slot = case(4, 40, 16, torch.float16)
    rest = (SCALE * probes @ rows.T).logsumexp(1), own_slot, -torch.ones(4), SCALE, 1e-3
    steps = []
    for seed in range(30):
        row = rows.half()
        learn(row, torch.ones(40, 1), probes, *rest, dtype=torch.float16, seed=seed)
        steps.append(row.double())
    exact = rows.clone()
    learn(exact, torch.ones(40, 1), probes, *rest, fused=False)
    mean, step = torch.stack(steps).mean(0), exact - rows
    assert len({each.sum().item() for each in steps}) > 20
    # To the nearest, steps of less than half a unit in the last place would be lost.
    assert ((mean - rows) * step).sum() / step.square().sum() == pytest.approx(1, abs=0.1)


def record(monkeypatch, fused):
    """The names of the passes that the kernels will make."""
    made = []
    for name in ("one_pass", "learn"):
        def call(*args, call=getattr(fused, name), name=name):
            made.append(name)
            return call(*args)
        monkeypatch.setattr(fused, name, call)
    return made


@pytest.mark.parametrize("recipe", ["resident", "paper"])
def test_heads_learn_the_same_with_fused_kernels(recipe, interpreted, monkeypatch):
    losses = {}
    for fused in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(6, 16))
        head = build_head(net, 100, 20, embedding_size=16, margin=Margin(16.0, additive=0.2), num_slots=40, recipe=recipe,
                          fused=fused)
        made = record(monkeypatch, interpreted)
        losses[fused] = []
        for _ in range(4):
            images, labels = torch.randn(12, 6), torch.randint(100, (12,))
            embeddings = net(images)
            loss = head(embeddings, labels, images=images)
            losses[fused].append(loss.item())
            losses[fused].append(torch.autograd.grad(loss, net[1].weight)[0].norm().item())
        monkeypatch.undo()
        monkeypatch.setattr(pool_softmax, "FUSED_ON", {"cpu": tuple(TOLERANCE)})
        assert made == (["one_pass"] * 4 if recipe == "paper" else ["one_pass", "learn"] * 4) * fused
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)


@pytest.mark.parametrize("architecture, shared_memory, fitting", [(80, 163, 2), (90, 227, 3)], ids=["A100", "H100"])
def test_they_compile_for_gpus_and_fit_their_shared_memory(architecture, shared_memory, fitting, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", "tests.method.compile_fused", str(architecture)],
                          env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout)
    kernels = "_pass_kernel", "_join_kernel", "_learn_kernel"
    assert found.keys() == {f"{kernel} {rows}" for kernel in kernels for rows in ("*fp16", "*fp32")}
    for kernel, used in found.items():  # the tuner leaves out the others
        assert sum(each <= 1024 * shared_memory for each in used) >= min(fitting, len(used)), (kernel, used)
        assert all(used) == (not kernel.startswith("_join")), (kernel, used)


def test_without_triton_the_operators_do_the_work(interpreted, monkeypatch):
    monkeypatch.setitem(sys.modules, "f2c_plugin.method.fused", None)  # as an import that fails
    monkeypatch.delattr("f2c_plugin.method.fused", raising=False)
    probes, rows, own_slot = case(5, 30, 8, torch.float32)
    found = pool_softmax.pool_softmax(probes, rows, None, SCALE, 2, own_slot=own_slot)
    expected = pool_softmax.pool_softmax(probes, rows, None, SCALE, 2, own_slot=own_slot, fused=False)
    assert torch.equal(found.total, expected.total)
