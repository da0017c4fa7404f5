"""Trainings that are long: whether anything grows, runs over or drifts apart. By `pytest -m long`."""

import gc
import os
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from f2c_plugin import Margin, build_head
from f2c_plugin.method.pool import DynamicClassPool
from tests.runs import by_torchrun, completed

IDENTITIES, SLOTS, BATCH = 1000, 64, 16


def resident_mb():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


@pytest.mark.parametrize("recipe", ["resident", "paper"])
@pytest.mark.parametrize("steps", [3000, pytest.param(100_000, marks=pytest.mark.long)])
def test_memory_and_files_stay_flat_and_the_pool_whole_over_many_steps(steps, recipe):
    gc.collect()  # what earlier tests left in cycles would be let go, and its files closed, somewhere in the middle
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 8), nn.BatchNorm1d(8))
    head = build_head(net, IDENTITIES, steps, embedding_size=8, margin=Margin(32.0, additive=0.3), num_slots=SLOTS,
                      recipe=recipe, hook=True)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    memory, files = [], []
    for step in range(steps):
        loss = head(net(torch.randn(BATCH, 3, 4, 4)), torch.randint(IDENTITIES, (BATCH,)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % (steps // 20) == 0:
            memory.append(resident_mb())
            files.append(len(os.listdir("/proc/self/fd")))
    print(f"{steps} steps: memory {memory[4]:.1f} MB after a fifth, {memory[-1]:.1f} MB at the end; {files[-1]} open files")
    assert memory[-1] - memory[4] < 0.01 * memory[4] + 1 and files[-1] <= files[4]
    head.pool.validate()
    assert head.pool.clock == steps * BATCH // (1 if recipe == "resident" else 2) and head.pool.fill() == 1
    assert all(value.isfinite().all() for value in head.state_dict().values() if value.is_floating_point())


def test_the_clock_would_run_over_after_centuries_and_is_refused_then():
    pool = DynamicClassPool(SLOTS, IDENTITIES, 8)
    assert pool.clock.dtype == torch.int64
    writes_a_second = 10**6  # far more than any cluster's
    assert (2**63 - 1) / writes_a_second / (365 * 86400) > 100_000  # years
    # Near the end of its range it still works. Past it, the clock is negative, and the pool refused.
    pool.clock.fill_(2**63 - 1 - 8)
    pool.commit(pool.preview(torch.arange(4), torch.randn(4, 8)))
    pool.validate()
    pool.commit(pool.preview(torch.arange(8), torch.randn(8, 8)))
    with pytest.raises(ValueError, match="the clock is not negative"):
        pool.validate()


@pytest.mark.parametrize("hours", [0.002, pytest.param(2, marks=[pytest.mark.long, pytest.mark.timeout(3 * 3600)])])
def test_the_pools_of_two_ranks_do_not_drift_apart(config, hours):
    path = config(batch_size=6, num_epoch=10**6, val_targets=[], f2c_save_every=500, frequent=100, verbose=10**9)
    done = completed(*by_torchrun(2), Path(__file__).with_name("long_run.py"), path, hours)
    assert "AssertionError" not in done.stderr and "stopped by a signal" in done.stderr, done.stderr[-3000:]
    print(done.stdout.strip().splitlines()[-1])
    assert int(done.stdout.split("the pools were equal ")[1].split()[0]) >= 1
