"""Worker processes: order, what is taken ahead, and their end."""

import os

import pytest

from f2c_plugin.errors import F2CError
from f2c_plugin.utils.workers import worker_pool


def squared(number):
    if number < 0:
        os.kill(os.getpid(), 9)
    return number * number


def test_results_come_in_order_and_few_items_are_taken_ahead():
    taken = []
    with worker_pool(2) as pool:
        results = pool.imap(squared, (taken.append(i) or i for i in range(1000)), 3)
        assert next(results) == 0 and len(taken) == 4 * 2 * 3
        assert list(results) == [i * i for i in range(1, 1000)]
        assert list(pool.imap(squared, range(5))) == [0, 1, 4, 9, 16]


def test_the_ranks_of_a_machine_share_its_cpus(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    taken = []
    with worker_pool() as pool:
        next(pool.imap(squared, (taken.append(i) or i for i in range(1000))))
        assert len(taken) == 4  # of one process


def test_a_killed_worker_is_an_error_and_not_the_end_of_all_waiting():
    with pytest.raises(F2CError, match="a worker process was killed"), worker_pool(2) as pool:
        list(pool.imap(squared, [1, -1, 2, 3], 1))


def test_an_error_in_a_worker_is_raised_here():
    with pytest.raises(TypeError), worker_pool(1) as pool:
        list(pool.imap(squared, [1, "a"]))
