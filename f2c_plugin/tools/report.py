"""Compares training runs of the built-in trainer or arcface_torch: plots, and a page that holds them all."""

import base64
import html
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from f2c_plugin.errors import ReportError
from f2c_plugin.evaluation.accuracy import GEOMETRY, NOT_RESOLVED
from f2c_plugin.tools.findings import findings
from f2c_plugin.tools.plotting import add_legend, draw_roc, look, panels, plain, require_drawable, save_figure
from f2c_plugin.tools.runs import Run, beside, differing_settings, distinct_names, scores_of
from f2c_plugin.utils.atomic import written_whole
from f2c_plugin.utils.extras import require

MAX_POINTS = 200  # of a curve; more are averaged
SHORT = 0.1  # of the longest run: beside such a run, curves are drawn against a logarithm
FAR_ABOVE = 20  # times the median: curves that rise so far are drawn on a logarithmic axis
_CURVES = {"loss": "loss", "learning_rate": "learning rate", "f2c/scale": "scale s of the loss",
           "images_per_second": "images/s", "f2c/positive_cosine": "cosine to the own slot",
           "f2c/hard_negative_cosine": "cosine to the hardest negatives",
           "f2c/pool_fill": "pool: occupied slots", "f2c/pool_hit_rate": "pool: hit rate",
           "f2c/age": "pool: age of the features, steps", "f2c/evictions": "pool: evictions per step"}
_FROM_0 = {"f2c/pool_fill": 1.05, "f2c/pool_hit_rate": 1.05, "f2c/age": None, "f2c/evictions": None, "images_per_second": None}
_STYLE = """\
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, sans-serif; color: #222; background: #fff; margin: 1.5em; }
img { max-width: min(100%, 1500px); height: auto; }
.wide { overflow-x: auto; }
.wide img { max-width: clamp(900px, 100%, 1500px); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13.5px; }
th, td { border: 1px solid #ccc; padding: .25em .6em; text-align: left; vertical-align: top; }
th { background: #f3f3f3; font-weight: 600; }
td { max-width: 22em; overflow-wrap: break-word; }
.runs td { text-align: right; }
.runs td.setting { text-align: left; }
.runs td.short { white-space: nowrap; }
.runs thead th { vertical-align: bottom; min-width: 4.5em; }
th[scope=row] { position: sticky; left: 0; white-space: nowrap; }
.best { font-weight: 700; }
.line { vertical-align: middle; margin-right: .4em; }
summary { cursor: pointer; font-size: 1.3em; font-weight: 600; margin: 1em 0; }
#images:checked ~ .hours, #hours:checked ~ .images { display: none; }"""


def report(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Plot runs, write plots and summaries into ``report.html`` in ``out``, or in the first folder shown; print the summaries.

    The page holds its plots, so it is always of one report, and opens without a network. Folders that cannot be shown are left
    out, and page and terminal say why. Raises ReportError, with a line for each of them, if none can be shown.
    """
    shown, left_out = _readable(folders)
    for run, name in zip(shown.values(), distinct_names([*shown]), strict=True):
        run.name = name
    runs = [*shown.values()]
    out = Path(out or next(iter(shown)))
    require_drawable(out / "curves.png")
    pictures = {"curves": draw_curves(runs, out / "curves.png")}
    if any(run.speed for run in runs):
        pictures["hours"] = draw_curves(runs, out / "curves_hours.png", against_hours=True)
    if sets := list(dict.fromkeys(name for run in runs for name in run.scores)):
        curves = {name: {run.name: run.scores[name] for run in runs if name in run.scores} for name in sets}
        pictures["roc"] = draw_roc(curves, out / "roc.png", [run.name for run in runs])
        pictures["scores"] = draw_scores(runs, out / "scores.png")
    sentences = findings(runs)
    page = out / "report.html"
    with written_whole(page) as file:  # a folder's name may be in another encoding
        file.write(_page(runs, sentences, pictures, left_out).encode("utf-8", "surrogateescape"))
    for run in runs:
        print(run.name)
        for name, fact in run.facts.items():
            if fact != NOT_RESOLVED:
                print(f"  {name:<34} {fact}")
    print(*sentences, *(f"Left out: {reason}" for reason in left_out), sep="\n")
    return page


def _readable(folders: Sequence[str | Path]) -> tuple[dict[str | Path, Run], list[str]]:
    """The runs in those folders that hold one, each folder once; and why the others are left out."""
    runs: dict[str | Path, Run] = {}
    left_out: list[str] = []
    for folder in {os.path.realpath(folder): folder for folder in folders}.values():
        try:
            runs[folder] = Run.read(folder)
        except (ReportError, OSError) as error:
            left_out.append(str(error))
    if not runs:
        raise ReportError("\n".join(left_out))
    return runs, left_out


def draw_curves(runs: Sequence[Run], path: Path, against_hours: bool = False) -> Path:
    """Plot what the histories hold, one panel each with all runs, against images seen or hours of training."""
    names = {name: title for name, title in _CURVES.items() if name in ("loss", "learning_rate")}
    for accuracy in dict.fromkeys(name for run in runs for name in run.accuracies):
        names[accuracy] = f"{scores_of(accuracy)}: accuracy"
        names[beside(accuracy, "tar_at_far_1e-3")] = f"{scores_of(accuracy)}: TAR at FAR 0.001"
        names |= {beside(accuracy, metric): f"{scores_of(accuracy)}: {metric}" for metric in GEOMETRY}
    names |= _CURVES
    names = {name: title for name, title in names.items() if any(run.series(name) for run in runs)}
    lengths = [run.clock[1][-1] if against_hours else run.images_seen for run in runs]
    figure, axes = panels(len(names), 3, (4.4, 3.1))
    for axis, (name, title) in zip(axes, names.items(), strict=True):
        drawn = np.zeros(0)
        for number, run in enumerate(runs):
            if points := run.series(name):
                x, y = _averaged(np.array(points, float), MAX_POINTS)
                if against_hours:
                    x = np.interp(x, *run.clock)
                axis.plot(x, y, marker="o" if len(x) < 20 else None, markersize=3.5, linewidth=1.4, **look(number))
                drawn = np.append(drawn, y[np.isfinite(y)])
        axis.set(title=plain(title), xlabel="hours of training" if against_hours else "images seen")
        if name in _FROM_0:
            axis.set_ylim(bottom=0, top=_FROM_0[name])
        elif drawn.size and drawn.min() > 0 and FAR_ABOVE * np.median(drawn) < drawn.max():
            axis.set_yscale("log")
        if 0 < min(lengths) < SHORT * max(lengths):
            axis.set(xscale="log", xlim=(SHORT * min(lengths), 1.1 * max(lengths)))
            axis.tick_params(axis="x", which="minor", labelbottom=False)
        else:
            axis.set_xlim(0, 1.03 * max(lengths))
        ticker = require("matplotlib.ticker", extra="plot")
        axis.xaxis.set_major_formatter("{x:g}" if against_hours else ticker.EngFormatter(sep=""))
        axis.grid(alpha=0.3)
    if len(runs) > 1:
        add_legend(figure, {run.name: number for number, run in enumerate(runs)}, "upper")
    return save_figure(figure, path)


def _averaged(points: np.ndarray, count: int) -> np.ndarray:
    """Points (n, 2) as (2, up to count), each the mean of its neighbours."""
    return np.array([part.mean(0) for part in np.array_split(points, min(len(points), count))]).T


def draw_scores(runs: Sequence[Run], path: Path) -> Path:
    """Plot histograms of the cosines of same and different pairs, one panel per run and set."""
    drawn = [(run, name) for name in dict.fromkeys(name for run in runs for name in run.scores)
             for run in runs if name in run.scores]
    figure, axes = panels(len(drawn), 4, (3.4, 2.6) if len(drawn) > 1 else (6, 3.2))
    bins = np.linspace(min(0, *(run.scores[name][0].min() for run, name in drawn)), 1, 60)
    for axis, (run, name) in zip(axes, drawn, strict=True):
        scores, same = run.scores[name]
        for answer, color in (False, 1), (True, 0):
            axis.hist(scores[same == answer], bins, alpha=0.65, color=look(color)["color"])
        axis.set_title(plain(f"{run.name}\n{name}, {len(same):,} pairs"), fontsize=9)
        axis.set(xlabel="cosine of the embeddings", ylabel="pairs")
        axis.grid(alpha=0.3)
    add_legend(figure, {"same person": 0, "different people": 1})
    return save_figure(figure, path)


def _page(runs: Sequence[Run], sentences: Sequence[str], pictures: dict[str, Path], left_out: Sequence[str]) -> str:
    names = [run.name for run in runs]
    title = html.escape(", ".join(names) if len(runs) < 4 else f"{len(runs)} runs: {', '.join(names[:2])}, …")
    parts = [f"<h2>What stands out</h2>\n{_list(sentences or ['Nothing.'])}"]
    if left_out:
        parts.append(f"<h2>Left out</h2>\n{_list(left_out)}")
    if len(runs) > 1:
        parts.append(f"<h2>Runs</h2>\n{_table_of_runs(runs)}")
    else:
        parts.append(f"<h2>Summary</h2>\n{_table(runs, [*runs[0].facts], lambda run, name: run.facts[name])}")
    curves = _picture(pictures["curves"], "images")
    if "hours" in pictures:
        curves = ('<input type="radio" name="against" id="images" checked="" />\n'
                  '<label for="images">against images seen</label>\n'
                  '<input type="radio" name="against" id="hours" />\n<label for="hours">against hours of training</label>\n'
                  f'{curves}\n{_picture(pictures["hours"], "hours")}')
    parts.append(f"<h2>Curves</h2>\n<div>\n{curves}\n</div>")
    if "roc" in pictures:
        parts.append(f"<h2>ROC of the last verification</h2>\n{_picture(pictures['roc'])}")
        parts.append(f"<h2>Cosines of the verification pairs</h2>\n{_picture(pictures['scores'])}")
    keys = sorted({key for run in runs for key in run.config})
    parts.append("<details>\n<summary>All settings</summary>\n"
                 f"{_table(runs, keys, _setting)}\n</details>")
    return html_page(title, "\n".join(parts))


def _list(items: Sequence[str]) -> str:
    return "<ul>\n" + "\n".join(f"<li>{html.escape(item)}</li>" for item in items) + "\n</ul>"


def html_page(title: str, body: str) -> str:
    """A page of its own, without a network; both are HTML."""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8" /><meta name="viewport" content="width=device-width" /><title>{title}</title>
<style>
{_STYLE}
</style>
</head><body><h1>{title}</h1>
{body}
</body></html>
"""


def _picture(path: Path, kind: str = "") -> str:
    return html_picture(path.stem, path.read_bytes(), kind)


def html_picture(name: str, encoded: bytes, kind: str = "") -> str:
    """An image that a narrow window does not shrink until it cannot be read: it scrolls in its box."""
    return f'<div class="wide {kind}">{html_image(name, encoded)}</div>'


def html_image(name: str, encoded: bytes) -> str:
    """A PNG or JPEG within the page."""
    form = "png" if encoded[:4] == b"\x89PNG" else "jpeg"
    return f'<img alt="{name}" src="data:image/{form};base64,{base64.b64encode(encoded).decode()}" />'


def _setting(run: Run, key: str) -> str:
    return run.config.get(key, "not set" if run.config else "not recorded")


def _table_of_runs(runs: Sequence[Run]) -> str:
    """A row for each run: the settings that differ, and the facts, grouped by what precedes their colon."""
    recorded = {key for run in runs for key in run.config}
    facts = [fact for fact in dict.fromkeys(fact for run in runs for fact in run.facts) if fact not in recorded
             and {run.facts.get(fact, "") for run in runs} - {"", NOT_RESOLVED}]
    columns = [("settings that differ", key) for key in differing_settings(runs)]
    groups = [fact.split(": ")[0] if ": " in fact else "" for fact in facts]
    columns += [(group, fact) for group in sorted(dict.fromkeys(groups), key=lambda group: group in ("", "pool"))  # sets first
                for fact, its in zip(facts, groups, strict=True) if its == group]
    heads = "".join(f'<th colspan="{sum(each == group for each, _ in columns)}">{html.escape(group)}</th>'
                    for group in dict.fromkeys(group for group, _ in columns))
    subheads = "".join(f"<th>{_breakable(column.removeprefix(f'{group}: '))}</th>" for group, column in columns)
    rows = []
    for number, run in enumerate(runs):
        cells = "".join(_cell(runs, run, group, column) for group, column in columns)
        rows.append(f'<tr><th scope="row">{_line(number)}{html.escape(run.name)}</th>{cells}</tr>')
    return (f'<div class="wide"><table class="runs">\n<thead><tr><th rowspan="2">run</th>{heads}</tr>\n'
            f"<tr>{subheads}</tr></thead>\n<tbody>\n{chr(10).join(rows)}\n</tbody></table></div>")


def _cell(runs: Sequence[Run], run: Run, group: str, column: str) -> str:
    if group == "settings that differ":
        value = _setting(run, column)
        short = len(value) < 30
        return f'<td class="setting{" short" if short else ""}">{html.escape(value) if short else _breakable(value)}</td>'
    fact = run.facts.get(column, "")
    best = column.endswith("accuracy") and fact == max((each.facts.get(column, "") for each in runs), key=_percent)
    return f'<td class="best">{fact}</td>' if best else f"<td>{html.escape(fact)}</td>"


def _percent(fact: str) -> float:
    return float(fact.removesuffix("%") or 0)


def _breakable(text: str) -> str:
    """As HTML that may break within a word, at what keys and paths are made of."""
    return re.sub("[_/,]", r"\g<0><wbr />", html.escape(text))


def _line(number: int) -> str:
    """The look of a run in the curves."""
    color, (_, dashes) = look(number).values()
    dashes = f' stroke-dasharray="{" ".join(str(2 * each) for each in dashes)}"' if dashes else ""
    return (f'<svg class="line" width="28" height="6" aria-hidden="true"><line x1="0" y1="3" x2="28" y2="3" stroke="{color}" '
            f'stroke-width="3"{dashes} /></svg>')


def _table(runs: Sequence[Run], rows: Sequence[str], cell: Callable[[Run, str], str]) -> str:
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    body = "\n".join(f'<tr><th scope="row">{html.escape(row)}</th>'
                     + "".join(f"<td>{html.escape(cell(run, row))}</td>" for run in runs) + "</tr>" for row in rows)
    return f'<div class="wide"><table>\n<tr><td></td>{head}</tr>\n{body}\n</table></div>'
