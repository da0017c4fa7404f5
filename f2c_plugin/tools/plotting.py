"""matplotlib, if it is installed, and the files it writes."""

from pathlib import Path
from typing import Any

from f2c_plugin.errors import InputError
from f2c_plugin.utils.atomic import written_whole
from f2c_plugin.utils.extras import require


def pyplot() -> Any:
    """matplotlib's pyplot, with a backend that draws into files."""
    require("matplotlib", extra="plot").use("Agg")
    return require("matplotlib.pyplot", extra="plot")


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write a figure and close it."""
    try:
        with written_whole(path) as file:
            figure.savefig(file, dpi=120, format=Path(path).suffix[1:] or "png")
    except ValueError as error:  # an unknown suffix
        raise InputError(f"{path}: {error}") from error
    finally:
        pyplot().close(figure)
    return Path(path)
