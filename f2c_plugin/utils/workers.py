"""Worker processes that end with their parent, however it ends."""

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing import parent_process
from multiprocessing.connection import wait
from typing import Any, TypeVar

from f2c_plugin.errors import F2CError

Item = TypeVar("Item")
Result = TypeVar("Result")


class WorkerPool:
    """What ``worker_pool`` opens."""

    def __init__(self, executor: ProcessPoolExecutor, ahead: int):
        self._executor, self._ahead = executor, ahead

    def imap(self, function: Callable[[Item], Result], items: Iterable[Item], chunksize: int = 1) -> Iterator[Result]:
        """``function`` of every item, in order. Only a few chunks are under way, so any number of items takes little memory.

        Raises F2CError if a worker is killed.
        """
        items = iter(items)
        under_way: deque[Future[list[Result]]] = deque()
        try:
            for chunk in iter(lambda: list(islice(items, chunksize)), []):
                with _deaf():  # this may start workers
                    under_way.append(self._executor.submit(_apply, function, chunk))
                if len(under_way) == self._ahead:
                    yield from under_way.popleft().result()
            while under_way:
                yield from under_way.popleft().result()
        except BrokenProcessPool as error:
            raise F2CError("a worker process was killed; most often, the machine has too little memory") from error


@contextmanager
def worker_pool(processes: int | None = None, initializer: Callable[..., object] | None = None,
                initargs: tuple[Any, ...] = ()) -> Iterator[WorkerPool]:
    """Worker processes that end with this block. They leave Ctrl-C to this process.

    If ``processes`` is None, one per CPU; under torchrun, the ranks of a machine share its CPUs.
    """
    if not processes:
        cpus = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        processes = max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    executor = ProcessPoolExecutor(processes, initializer=_start, initargs=(initializer, initargs))
    try:
        yield WorkerPool(executor, 4 * processes)
    finally:
        executor.shutdown(cancel_futures=True)


@contextmanager
def _deaf() -> Iterator[None]:
    """Processes that this starts never hear Ctrl-C, and this one hears it at the end: inside a fork it would be lost."""
    heard: list[int] = []
    in_main = threading.current_thread() is threading.main_thread()  # the only one that hears it
    # Another thread may take a signal that this one blocks.
    handler = signal.signal(signal.SIGINT, lambda number, _: heard.append(number)) if in_main else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if in_main:
            signal.signal(signal.SIGINT, handler or signal.SIG_DFL)
    if heard:
        signal.raise_signal(signal.SIGINT)


def _start(initializer: Callable[..., object] | None, initargs: tuple[Any, ...]) -> None:
    end_with_parent()
    if initializer:
        initializer(*initargs)


def end_with_parent() -> None:
    """End this worker process as soon as its parent has ended, in whatever way."""
    def watch() -> None:
        if parent := parent_process():
            wait([parent.sentinel])
            os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def _apply(function: Callable[[Item], Result], chunk: list[Item]) -> list[Result]:
    return [function(item) for item in chunk]
