"""Recorded steps: what can be seen without a GPU. `tests/method/test_gpu.py` records them."""

import gc
import weakref

import pytest

from f2c_plugin.utils.replay import no_garbage_collection


class Garbage:
    """Holds itself, so that only the collector frees it."""

    def __init__(self):
        self.myself = self


def test_garbage_is_collected_before_and_not_within():
    before = weakref.ref(Garbage())
    with no_garbage_collection():
        assert before() is None
        within = weakref.ref(Garbage())
        _ = [[] for _ in range(100_000)]  # enough for the collector to come
        assert within() is not None
    assert gc.isenabled()


def test_the_collector_is_left_as_it_was():
    with pytest.raises(ValueError), no_garbage_collection():
        raise ValueError
    assert gc.isenabled()
    gc.disable()
    try:
        with no_garbage_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
