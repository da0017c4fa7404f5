"""The monitor of the head: log lines, scalars, warnings, and no reads in between."""

import logging

import pytest
import torch
from torch.nn.functional import normalize

from f2c_plugin.errors import TrainingDiverged
from f2c_plugin.evaluation.monitor import Monitor
from f2c_plugin.method.pool import DynamicClassPool
from f2c_plugin.method.pool_head import StepStatistics
from f2c_plugin.method.resident import ResidentPool


def statistics(**given):
    values = dict(pool_hit_rate=0.7, positive_cosine=0.4, hard_negative_cosine=0.2, evictions=0.0, not_finite=0.0,
                  finite=1.0) | given
    return StepStatistics(**{name: torch.tensor(value) for name, value in values.items()}, scale=16.0)


def pool_after(steps, batch=2, num_slots=8):
    pool = DynamicClassPool(num_slots, 100, 4)
    for step in range(steps):
        identities = torch.arange(batch * step, batch * (step + 1)) % 100
        pool.commit(pool.preview(identities, normalize(torch.randn(batch, 4))))
    return pool


def warnings(caplog):
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def test_every_so_many_steps_it_logs_averages_and_keeps_them_as_scalars(caplog, tmp_path):
    monitor = Monitor(4, 100, tmp_path)
    pool = pool_after(3)
    with caplog.at_level(logging.INFO):
        for step in range(1, 9):
            cosine = float("nan") if step < 8 else 0.5
            monitor.update(step, statistics(pool_hit_rate=step / 10, positive_cosine=cosine), pool, 2)
            assert bool(monitor.scalars) == (step >= 4)
    lines = [record.message for record in caplog.records]
    assert [line.split(":")[0] for line in lines] == ["F²C step 4", "F²C step 8"]
    assert "pool fill 0.750  pool hit rate 0.650" in lines[1] and "positive cosine 0.500" in lines[1]
    assert monitor.scalars["f2c/pool_hit_rate"] == pytest.approx(0.65) and monitor.scalars["f2c/positive_cosine"] == 0.5
    assert monitor.scalars["f2c/age"] == pytest.approx(3.5 / 2)  # six writes, 1 to 6 ago, two a step

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("f2c/pool_hit_rate")] == [4, 8]
    assert [event.step for event in events.Scalars("f2c/positive_cosine")] == [8]


@pytest.mark.parametrize("given, writes, total_steps, message", [
    (dict(evictions=4.0), 2, 10**6, "only 2.0 steps before they are evicted: raise f2c_pool_rate"),
    (dict(not_finite=1.0), 2, 10**6, "2 features were not finite"),
])
def test_a_problem_is_logged_once_with_the_key_to_change(caplog, given, writes, total_steps, message):
    monitor = Monitor(2, total_steps)
    pool = pool_after(20)
    for step in range(1, 3):
        monitor.update(step, statistics(**given), pool, writes)
    assert caplog.text.count(message) == 1
    if "not_finite" not in given:
        for step in range(3, 5):
            monitor.update(step, statistics(**given), pool, writes)
        assert caplog.text.count(message) == 1


def test_a_pool_of_stale_features_is_noticed(caplog):
    pool = pool_after(4)  # eight identities, two of which come again and again
    for _ in range(250):
        pool.commit(pool.preview(torch.arange(2), torch.randn(2, 4)))
    Monitor(1, 10_000).update(1, statistics(), pool, 2)
    assert not warnings(caplog)
    Monitor(1, 1000).update(1, statistics(), pool, 2)
    assert "are 189 steps old on average, of 1000 in all, and the net has changed since: lower f2c_pool_rate" in caplog.text


def test_every_fall_of_the_positive_cosine_is_noticed(caplog):
    monitor = Monitor(1, 10**6)
    pool = pool_after(3)
    for step, cosine in enumerate((0.3, 0.6, 0.55, 0.4, 0.45, 0.6, 0.3), 1):
        monitor.update(step, statistics(positive_cosine=cosine), pool, 2)
    falls = [record.message for record in caplog.records if "has fallen" in record.message]
    assert len(falls) == 2 and "from 0.60 to 0.40" in falls[0] and "f2c_momentum" in falls[0]


def test_class_weights_that_learn_may_leave_soon_and_stay_long(caplog):
    pool = ResidentPool(4, 20, 4)
    for first in (0, 4, *[8] * 300):
        pool.admit(torch.arange(first, first + 2), normalize(torch.randn(2, 4)))
    monitor = Monitor(1, 1000)
    for cosine in 0.6, 0.3:
        monitor.update(1, statistics(evictions=4.0, positive_cosine=cosine), pool, 2)
    warning, = warnings(caplog)
    assert "has fallen" in warning and "f2c_" not in warning


def test_a_normal_run_gets_no_warnings(caplog):
    monitor = Monitor(1, 1000)
    for step in range(1, 6):
        monitor.update(step, statistics(evictions=0.5), pool_after(20), 2)
    assert not warnings(caplog)


def test_too_many_steps_in_a_row_whose_loss_is_not_finite_end_the_training(caplog):
    monitor = Monitor(2, 1000, max_bad_steps=5)
    pool = pool_after(3)
    for step in range(1, 8):  # one good step in between
        monitor.update(step, statistics(finite=float(step == 4)), pool, 2)
    with pytest.raises(TrainingDiverged, match=r"not finite in 6 steps in a row, up to step 10 \(f2c_max_bad_steps=5\)"):
        for step in range(8, 20):
            monitor.update(step, statistics(finite=0.0), pool, 2)
