"""matplotlib, if it is installed, and the files it writes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from f2c_plugin.errors import InputError
from f2c_plugin.utils.atomic import require_writable, written_whole
from f2c_plugin.utils.extras import require

COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"  # Okabe and Ito's, without yellow
STYLES = ((0, ()), (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))

Scores = tuple[np.ndarray, np.ndarray]  # cosines (n,); whether the pair is the same, bool (n,)


def pyplot() -> Any:
    """matplotlib's pyplot, with a backend that draws into files."""
    require("matplotlib", extra="plot").use("Agg")
    return require("matplotlib.pyplot", extra="plot")


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write a figure and close it. Raises as ``require_drawable``."""
    try:
        require_drawable(path)
        with written_whole(path) as file:
            figure.savefig(file, dpi=120, format=Path(path).suffix[1:] or "png")
    finally:
        pyplot().close(figure)
    return Path(path)


def require_drawable(path: str | Path) -> None:
    """Raise what would otherwise be found out when the picture is drawn: F2CError without matplotlib, InputError for an unknown
    format, OSError as ``require_writable``."""
    pyplot()
    forms = require("matplotlib.backend_bases", extra="plot").FigureCanvasBase.filetypes
    if (form := Path(path).suffix[1:].lower() or "png") not in forms:
        raise InputError(f"{path}: unknown picture format {form!r}: name a file that ends with .png, .svg or .pdf")
    require_writable(path)


def look(number: int) -> dict[str, Any]:
    """Colour and line style of the curve with this number, from 0: 28 looks, which colour-blind readers can tell apart."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": STYLES[number // len(COLOURS) % len(STYLES)]}


def plain(text: str) -> str:
    """A label that matplotlib shows as it is: no formulas between dollars, and not hidden for a leading underscore."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def panels(count: int, columns: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    """A figure of ``count`` axes in rows of up to ``columns``, of ``size`` inches each; and the axes."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure, axes = pyplot().subplots(rows, columns, figsize=(size[0] * columns, size[1] * rows), squeeze=False,
                                     layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)
    for axis in axes.flat[count:]:
        axis.axis("off")
    return figure, list(axes.flat[:count])


def add_legend(figure: Any, numbers: Mapping[str, int], where: str = "lower") -> None:
    """Below or above ("upper") all panels, from {label: number of its look}."""
    from matplotlib.lines import Line2D
    letters = figure.get_figwidth() * 10
    columns = max(1, min(len(numbers), int(letters // (max(map(len, numbers)) + 8))))
    figure.legend([Line2D([], [], linewidth=2, **look(number)) for number in numbers.values()], [*map(plain, numbers)],
                  loc=f"outside {where} center", ncols=columns, fontsize=9, handlelength=3)


def draw_roc(curves: Mapping[str, Mapping[str, Scores]], path: str | Path, labels: Sequence[str] = (),
             errors: Mapping[str, np.ndarray] | None = None) -> Path:
    """Plot TAR against FAR where the pairs resolve it.

    Args:
        curves: {title of a panel: {label: (cosines of pairs (n,), whether they are the same person's, bool (n,))}}.
        path: of the picture.
        labels: in the order of their looks, if it is another than that of their first curves.
        errors: {label: rates when 0, 1, … of all images are rejected, (images,)}, for a panel with error-reject curves, up
            to half of the images: the rates of the few pairs that remain at last are chance.
    """
    used = dict.fromkeys(label for panel in curves.values() for label in panel)
    numbers = {label: number for number, label in enumerate(labels or used)}
    count = len(curves) + bool(errors)
    figure, axes = panels(count, 3, (5, 3.8) if count > 1 else (6, 4.2))
    for label, rates in (errors or {}).items():
        half = rates[:len(rates) // 2 + 1]
        axes[-1].plot(np.arange(len(half)) / len(rates), half, drawstyle="steps-post", **look(numbers[label]))
        axes[-1].set(title="error-reject curve", xlabel="least recognizable images rejected",
                     ylabel="FNMR, same person refused", xlim=(0, 0.5), ylim=(0, None))
        axes[-1].grid(alpha=0.3)
    for axis, (title, panel) in zip(axes, curves.items(), strict=False):
        for label, (scores, same) in panel.items():
            order = np.argsort(-scores)
            far, tar = (np.cumsum(same[order] == answer) / max((same == answer).sum(), 1) for answer in (False, True))
            drawn = np.flatnonzero(np.append(np.diff(far) > 0, True) & (far > 0))  # the highest TAR at each FAR
            drawn = drawn[(np.diff(tar[drawn], prepend=-1) > 0) | (drawn == drawn[-1:])]  # steps: IJB-C has 16 million pairs
            axis.semilogx(far[drawn], tar[drawn], drawstyle="steps-post", **look(numbers[label]))
        axis.set(title=plain(title), xlabel="FAR, different people accepted", ylabel="TAR, same person accepted")
        axis.grid(alpha=0.3, which="both")
    add_legend(figure, {label: numbers[label] for label in used})
    return save_figure(figure, path)
