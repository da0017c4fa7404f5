"""Signals to a training: save, or save and stop."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType

import torch
from torch import distributed

from f2c_plugin.utils.distributed import this_rank


class Request(IntEnum):
    """NOTHING; SAVE and go on (SIGUSR1); SAVE_AND_STOP (SIGTERM). Of two the larger counts."""

    NOTHING = 0
    SAVE = 1
    SAVE_AND_STOP = 2


_SIGNALS: dict[int, Request] = {signal.SIGUSR1: Request.SAVE, signal.SIGTERM: Request.SAVE_AND_STOP}


class Stopped(Exception):
    """A signal has ended the training. Its state is saved."""


class Requests:
    """Signals that this or any other rank has received.

    A signal reaches one rank or all of them, at a step that differs from rank to rank; ranks that
    saved at different steps would wait for each other forever. So they agree at every step, in a
    separate process group on the CPU, where nothing waits for a GPU.
    """

    def __init__(self):
        self._pending = Request.NOTHING
        self._group = distributed.new_group(backend="gloo") if this_rank()[1] > 1 else None

    def receive(self, number: int, _frame: FrameType | None) -> None:
        self._pending = max(self._pending, _SIGNALS[number])

    def agreed(self) -> Request:
        """The largest request of any rank since the last ``done``; all ranks call this together."""
        if self._group is None:
            return self._pending
        largest = torch.tensor(int(self._pending))
        distributed.all_reduce(largest, distributed.ReduceOp.MAX, group=self._group)
        return Request(int(largest))

    def done(self) -> None:
        self._pending = Request.NOTHING


@contextmanager
def listening() -> Iterator[Requests]:
    """Receive signals as Requests while this lasts."""
    requests = Requests()
    before = {number: signal.signal(number, requests.receive) for number in _SIGNALS}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
