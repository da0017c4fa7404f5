"""Signals to a training: save, or save and stop. Imports PyTorch only for the steps, so that it can listen before."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType
from typing import Any


class Request(IntEnum):
    """NOTHING; SAVE and go on (SIGUSR1); SAVE_AND_STOP (SIGTERM). Of two the larger counts."""

    NOTHING = 0
    SAVE = 1
    SAVE_AND_STOP = 2


_SIGNALS: dict[int, Request] = {signal.SIGUSR1: Request.SAVE, signal.SIGTERM: Request.SAVE_AND_STOP}
_BEFORE = "stopped by a signal before the first step: checkpoints are as they were"
_AFTER = ("stopped by a signal after the last step, before all results were written: if that step is saved (f2c_save_every, "
          "save_all_states), resume=True writes them")


class Stopped(BaseException):
    """A signal has ended the training. Like KeyboardInterrupt it is no Exception, so that nothing on its way swallows it."""


class Requests:
    """Signals that this or any other rank has received.

    A signal reaches one rank or all of them, at a step that differs from rank to rank; ranks that
    saved at different steps would wait for each other forever. So they agree during every step on what was
    received before it, in a separate process group on the CPU, where nothing waits for a GPU.

    Before and after the steps there is nothing to save: a request to stop raises Stopped there, and one
    to save waits for the first step.
    """

    def __init__(self):
        # Signals so far, of which some are seen by ``agreed`` and some of these are done. The handler, which can run
        # between any two operations, writes the first alone; so no signal is lost.
        self._received = dict.fromkeys(_SIGNALS, 0)
        self._seen = self._done = dict(self._received)
        self._group: Any = None  # a ProcessGroup; torch's annotations say otherwise
        self._asked: tuple[Any, Any] | None = None  # the largest request of all ranks, and when it is there
        self._in_steps = False
        self._otherwise = _BEFORE
        self.raised: Stopped | None = None

    def receive(self, number: int, _frame: FrameType | None) -> None:
        self._received[number] += 1
        self._stop_outside_steps()

    def _pending(self, received: dict[int, int]) -> Request:
        return max((request for number, request in _SIGNALS.items() if received[number] > self._done[number]),
                   default=Request.NOTHING)

    def _stop_outside_steps(self) -> None:
        if self._pending(self._received) is Request.SAVE_AND_STOP and not self._in_steps and not self.raised:
            self.raised = Stopped(self._otherwise)  # once: a second signal must not disturb what the first has begun
            raise self.raised

    @contextmanager
    def in_steps(self) -> Iterator[None]:
        """While this lasts, requests wait for ``agreed``. All ranks enter together."""
        from torch import distributed

        from f2c_plugin.utils.distributed import this_rank

        self._group = distributed.new_group(backend="gloo") if this_rank()[1] > 1 else None
        self._in_steps = True
        try:
            yield
        finally:
            self._in_steps, self._otherwise, self._asked = False, _AFTER, None
        self._stop_outside_steps()  # it came after the last step

    def ask(self) -> None:
        """Begin to find what ``agreed`` will return. All ranks call this together, before a step."""
        if self._group is None:
            return
        import torch
        from torch import distributed

        self._seen = dict(self._received)
        largest = torch.tensor(int(self._pending(self._seen)))
        self._asked = largest, distributed.all_reduce(largest, distributed.ReduceOp.MAX, group=self._group, async_op=True)

    def agreed(self) -> Request:
        """The largest request of any rank that is not done, as they were asked for. All ranks call this together."""
        if self._asked is None:
            self._seen = dict(self._received)
            return self._pending(self._seen)
        (largest, there), self._asked = self._asked, None
        there.wait()
        return Request(int(largest))

    def done(self) -> None:
        """What ``agreed`` has returned is done; later requests are not."""
        self._done = self._seen


_listening: Requests | None = None


@contextmanager
def listening() -> Iterator[Requests]:
    """Receive signals as Requests while this lasts; within another ``listening``, as those of the outer one."""
    global _listening
    if _listening is not None:
        yield _listening
        return
    requests = _listening = Requests()
    before = {number: signal.signal(number, requests.receive) for number in _SIGNALS}
    try:
        yield requests
    except Exception as error:
        if requests.raised:  # surfaced as another error, as in a rank that waits for one that has stopped
            raise requests.raised from error
        raise
    finally:
        _listening = None
        for number, handler in before.items():
            signal.signal(number, handler)
