"""Files that are whole or not there, whenever the power goes."""

import os
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"  # what follows the name of a file that is being written


@contextmanager
def written_whole(path):
    """Opens a binary file beside ``path`` and moves it there once all of it is on disk.

    On an error, what was at ``path`` stays, and the half-written file is removed. A process that is
    killed leaves it, with ``PARTIAL`` at the end of its name.
    """
    path = Path(path)
    partial = path.with_name(path.name + PARTIAL)
    try:
        with open(partial, "wb") as file:
            yield file
            to_disk(file)
        os.replace(partial, path)
        _folder_to_disk(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def to_disk(file):
    """Wait until what was written is on the disk, not in the system's memory."""
    file.flush()
    os.fsync(file.fileno())


def _folder_to_disk(folder):
    """A new name is on disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
