"""Folders: what comes with the package, and the cache."""

import os
from pathlib import Path


def data_folder(name: str) -> Path:
    """Folder ``configs`` or ``patches``: inside the installed package, or beside it in a source tree."""
    package = Path(__file__).parents[1]
    return next(folder for folder in (package / name, package.parent / name) if folder.is_dir())


def cache_folder() -> Path:
    """The cache: $F2C_CACHE, else f2c-plugin in the user's cache folder."""
    if "F2C_CACHE" in os.environ:
        return Path(os.environ["F2C_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "f2c-plugin"
