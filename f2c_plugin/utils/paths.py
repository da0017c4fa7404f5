"""Folders: what comes with the package, the cache, and files that are given instead of one."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from f2c_plugin.errors import F2CError


def data_folder(name: str) -> Path:
    """Folder ``configs`` or ``patches``: inside the installed package, or beside it in a source tree."""
    package = Path(__file__).parents[1]
    return next(folder for folder in (package / name, package.parent / name) if folder.is_dir())


def require_no_file(path: str | Path, kind: str, holds: str, error: type[F2CError]) -> None:
    """Raise ``error`` if ``path`` is a file where a folder is needed: with its own, if that one holds a file of the name.

    Args:
        kind: what the folder is, in words.
        holds: name of a file that such a folder holds.
    """
    path = Path(path)
    if path.is_file():
        its = f", {path.parent}" if (path.parent / holds).is_file() else ""
        raise error(f"{path}: a file: give {kind}{its}")


def cache_folder() -> Path:
    """The cache, which exists: $F2C_CACHE; else f2c-plugin in the user's cache folder; else one among the temporary files.

    Raises:
        F2CError: it cannot be written.
    """
    tried: list[str] = []
    for folder in _cache_folders():
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK | os.X_OK):
                return folder
        tried.append(str(folder))
    raise F2CError(f"the cache, {' or '.join(tried) or 'in the home of the user, who has none'}, cannot be written: set the "
                   "environment variable F2C_CACHE to a folder that can")


def _cache_folders() -> Iterator[Path]:
    if named := os.environ.get("F2C_CACHE"):
        yield Path(named)
        return
    with suppress(RuntimeError):  # a user without a home
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "f2c-plugin"
    with suppress(OSError):  # no temporary folder, or something else of that name
        temporary = Path(tempfile.gettempdir()) / f"f2c-plugin-{os.getuid()}"
        temporary.mkdir(mode=0o700, exist_ok=True)
        found = temporary.lstat()
        if found.st_uid == os.getuid() and not found.st_mode & 0o022:  # no other user has put it there, or a link
            yield temporary
