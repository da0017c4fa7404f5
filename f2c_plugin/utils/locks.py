"""Locks between processes, which the system releases when their holder dies; and temporary folders that need them."""

import fcntl
import glob
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path


@contextmanager
def locked(path: Path, wait: float) -> Iterator[None]:
    """Hold the lock on the file ``path``, which is created and stays, while this lasts.

    Goes on without a lock where none can be had: on a file system that has no locks, or if ``path`` is a
    link, a pipe or another user's file. The lock is the process's: its children do not hold it on.

    Raises:
        TimeoutError: another process has held the lock for longer than ``wait`` seconds.
    """
    descriptor = None
    with suppress(OSError):  # O_NONBLOCK: a pipe would wait for its other end
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        if descriptor is not None and stat.S_ISREG(os.fstat(descriptor).st_mode):
            _wait(descriptor, path, time.monotonic() + wait)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _wait(descriptor: int, path: Path, until: float) -> None:
    while True:
        try:
            return fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # held by another process
            if time.monotonic() >= until:
                raise TimeoutError(f"{path} is locked by another process") from None
            time.sleep(0.05)
        except OSError:  # no locks here
            return None


@contextmanager
def temporary_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in ``parent`` whose name begins with ``prefix``; it is removed at the end. Those that killed processes have
    left are removed at the beginning.

    A process holds a lock on its folder. Where folders cannot be locked, as on NFS, none is taken for left.
    """
    for path in parent.glob(glob.escape(prefix) + 8 * "?"):
        with suppress(OSError), _locked_folder(path, fcntl.LOCK_NB):
            if any(path.iterdir()):  # or another process may have created it just now, and lock it next
                shutil.rmtree(path)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as name, ExitStack() as stack:
        with suppress(OSError):
            stack.enter_context(_locked_folder(Path(name)))
        yield Path(name)


@contextmanager
def _locked_folder(path: Path, how: int = 0) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | how)
        yield
    finally:
        os.close(descriptor)
