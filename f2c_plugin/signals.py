"""What the outside asks of a training by a signal."""

import signal
from contextlib import contextmanager
from enum import IntEnum

import torch
from torch import distributed

from f2c_plugin.ranks import this_rank


class Request(IntEnum):
    """NOTHING; SAVE and go on (SIGUSR1); SAVE_AND_STOP (SIGTERM). Of two the larger counts."""

    NOTHING = 0
    SAVE = 1
    SAVE_AND_STOP = 2


_SIGNALS = {signal.SIGUSR1: Request.SAVE, signal.SIGTERM: Request.SAVE_AND_STOP}


class Stopped(Exception):
    """A signal has ended the training, and its state is saved."""


class Requests:
    """Signals that this or any other rank has received.

    A signal comes to one rank or to all, at a step that differs from rank to rank; ranks that saved
    at different steps would wait for each other forever. So they agree at every step, over a process
    group of its own on the CPU, where nothing has to wait for a GPU.
    """

    def __init__(self):
        self._own = Request.NOTHING
        self._group = distributed.new_group(backend="gloo") if this_rank()[1] > 1 else None

    def receive(self, number, _frame):
        self._own = max(self._own, _SIGNALS[number])

    def agreed(self) -> Request:
        """The largest request of any rank since the last ``done``; all ranks call this together."""
        if self._group is None:
            return self._own
        largest = torch.tensor(int(self._own))
        distributed.all_reduce(largest, distributed.ReduceOp.MAX, group=self._group)
        return Request(int(largest))

    def done(self):
        self._own = Request.NOTHING


@contextmanager
def listening():
    """Requests, as long as this lasts."""
    requests = Requests()
    before = {number: signal.signal(number, requests.receive) for number in _SIGNALS}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
