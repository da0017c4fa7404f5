"""Files that are whole or absent, even if the power fails, and that are never written through a link."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

PARTIAL = ".partial"  # the suffix of a file that is being written


def create_beside(path: Path) -> tuple[Path, BinaryIO]:
    """Create a file next to ``path`` to write its new content into. Follows no link and opens nothing that exists."""
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    return partial, open(partial, "xb")


def partials_of(path: Path) -> Iterator[Path]:
    """What processes that were killed while they wrote ``path`` have left."""
    return path.parent.glob(f"{path.name}.{8 * '[0-9a-f]'}{PARTIAL}")


@contextmanager
def written_whole(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file beside ``path`` and move it there once all of it is on disk. Its folder is made if it is missing.

    On an error, what was at ``path`` stays, and the half-written file is removed. A process that is killed
    leaves it: see ``partials_of``. Raises OSError with the name ``path`` if it cannot be written, or as ``require_writable``.
    """
    path = Path(path)
    require_writable(path)
    with made(path.parent), naming(path):
        partial, file = create_beside(path)
        try:
            with file:
                yield file
                to_disk(file)
            os.replace(partial, path)
            _folder_to_disk(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def require_writable(path: str | Path) -> None:
    """Find out before hours of work what would keep ``written_whole`` from opening ``path``.

    Raises:
        OSError: it is a folder, a pipe or a device; or its folder cannot be made, or not be written into.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # or the superuser would replace /dev/null
        raise FileExistsError(errno.EEXIST, "Not a file, and not replaced by one", str(path))
    nearest = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not nearest.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"Its folder cannot be made, because {nearest} is not a folder", str(path))
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"Nothing may be written into {nearest}", str(path))


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make a folder and those above it. On an error, those that were missing go again, unless something is in them."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for each in missing:
                each.rmdir()
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give the name ``path`` to an OSError that has none, or that of a partial file: a full disk does not say which file it has
    no room for."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and (error.filename is None or str(error.filename).endswith(PARTIAL)):
            error.filename = str(path)
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
