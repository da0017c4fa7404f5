"""matplotlib, if it is installed, and the files it writes."""

from pathlib import Path
from typing import Any

from f2c_plugin.errors import InputError
from f2c_plugin.utils.extras import require


def pyplot() -> Any:
    """matplotlib's pyplot, with a backend that draws into files."""
    require("matplotlib", extra="plot").use("Agg")
    return require("matplotlib.pyplot", extra="plot")


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write a figure and close it."""
    try:
        figure.savefig(path, dpi=120)
    except ValueError as error:  # an unknown suffix
        raise InputError(f"{path}: {error}") from error
    finally:
        pyplot().close(figure)
    return Path(path)
