"""Files that are whole or absent, even if the power fails."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

PARTIAL = ".partial"  # the suffix of a file that is being written


@contextmanager
def written_whole(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file beside ``path`` and move it there once all of it is on disk.

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


def to_disk(file: IO[bytes] | IO[str]) -> None:
    """Wait until the file's content is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def _folder_to_disk(folder: Path) -> None:
    """A new name is on disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
