"""Where the project keeps what it can make or fetch again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """The project's cache: $F2C_CACHE, else f2c-plugin in the user's cache folder."""
    if "F2C_CACHE" in os.environ:
        return Path(os.environ["F2C_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "f2c-plugin"
