"""matplotlib, if it is installed, and the files it writes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

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


def draw_roc(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], path: str | Path) -> Path:
    """Plot TAR against FAR, from {label: (cosines of pairs (n,), whether they are the same person's, bool (n,))}."""
    figure, axis = pyplot().subplots(figsize=(6, 4.2), layout="constrained")
    for label, (scores, same) in curves.items():
        ordered = same[np.argsort(-scores)]
        far, tar = (np.cumsum(ordered == answer) / max((same == answer).sum(), 1) for answer in (False, True))
        corners = np.flatnonzero(np.diff(ordered, prepend=~ordered[:1], append=~ordered[-1:]))  # IJB-C has 16 million pairs
        corners = np.union1d(corners[1:] - 1, corners[:-1])
        far, tar = far[corners], tar[corners]
        far = np.maximum(far, 0.5 / max((~same).sum(), 1))  # a log axis cannot show 0
        axis.semilogx(far, tar, label=label, drawstyle="steps-post")
    axis.set(xlabel="FAR, different people accepted", ylabel="TAR, same person accepted", ylim=(0, 1.02))
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3, which="both")
    return save_figure(figure, path)
