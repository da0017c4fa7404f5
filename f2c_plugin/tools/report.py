"""Compares training runs of the built-in trainer or arcface_torch: plots, and a page that holds them all."""

import base64
import html
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from f2c_plugin.errors import ReportError
from f2c_plugin.evaluation.verification import tar_at_far, tar_text
from f2c_plugin.tools.plotting import draw_roc, pyplot, save_figure
from f2c_plugin.utils.atomic import written_whole

FARS = (1e-1, 1e-2, 1e-3, 1e-4)
HEADINGS = {"curves": "Curves", "scores": "Cosines of the verification pairs", "roc": "ROC"}
STYLES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 4)))
_LOSS = re.compile(r"Speed ([\d.]+) samples/sec\s+Loss (\S+)\s+LearningRate (\S+).*Global Step: (\d+)")
_MONITOR = re.compile(r"F²C step (\d+): (.*)")
_ACCURACY = re.compile(r"\[(gallery_)?(\w+)\]\[(\d+)\]Accuracy-Flip: ([\d.]+)")
_OLD_NAMES = {"f2c/found": "f2c/pool_hit_rate"}  # names of version 0.1
# A time, then ": key   value". arcface_torch pads keys to 25 characters, so the value directly follows a longer key.
_CONFIG = re.compile(r"(?:Training: )?[\d-]+ [\d:,]+[- ]: (?:(\w+) +|([a-z0-9_]{24,}[a-z_]))(.*)")

Entry = dict[str, float]
Scores = tuple[np.ndarray, np.ndarray]  # cosines (n,); whether the pair is the same, bool (n,)


@dataclass
class Run:
    """The results of one training."""

    name: str
    history: list[Entry]  # with "step", "images" and scalars, in order
    config: dict[str, str]
    scores: dict[str, Scores] = field(default_factory=dict)  # by verification set; arcface_torch saves them only with F²C
    facts: dict[str, str] = field(default_factory=dict)  # the summary

    @classmethod
    def read(cls, folder: str | Path, name: str | None = None) -> "Run":
        """Read the output folder of a training, which names the run by default. Raises ReportError without intact results."""
        folder = Path(folder)
        log = folder / "training.log"
        if not log.is_file():
            raise ReportError(f"{folder}: no training.log; give the output folder of a training by arcface_torch or by "
                              "f2c_plugin.train")
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        config = {found[1] or found[2]: found[3].strip() for line in lines if (found := _CONFIG.match(line))}
        file = folder / "history.jsonl"
        if file.is_file():
            with _reading(file):
                history = [_current_names(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
        else:
            history = _history_of_log(lines, config.get("total_batch_size", ""))
        if not history:
            raise ReportError(f"{folder}: the training has not logged a step yet")
        run = cls(name or Path(os.path.realpath(folder)).name, history, config)
        for path in sorted(folder.glob("*_scores.npz")):
            with _reading(path), np.load(path) as saved:
                run.scores[path.name.removesuffix("_scores.npz")] = saved["scores"], saved["same"]
        run.facts = run._summarize(folder)
        return run

    def series(self, name: str) -> list[tuple[float, float]]:
        """(images seen, value) of every entry that holds ``name``."""
        return [(entry["images"], entry[name]) for entry in self.history if name in entry]

    @property
    def accuracies(self) -> list[str]:
        return sorted({name for entry in self.history for name in entry if name.endswith("accuracy")})

    def _summarize(self, folder: Path) -> dict[str, str]:
        last = {name: value for entry in self.history for name, value in entry.items()}
        speeds = [value for _, value in self.series("images_per_second")]
        facts = {"head": self.config.get("head", ""), "network": self.config.get("network", ""),
                 "images seen": f"{self.history[-1]['images']:,}",
                 "images/s (median)": f"{np.median(speeds):,.0f}" if speeds else ""}
        for name in self.accuracies:
            best = max(value for _, value in self.series(name))
            facts[f"{name} (last, best)"] = f"{last[name]:.2%}, {best:.2%}"
        for name, (scores, same) in self.scores.items():
            facts |= {f"{name}: TAR at FAR {far:g}": tar_text(tar_at_far(scores, same, far)) for far in FARS}
        file = folder / "report.json"
        if file.is_file():
            with _reading(file):
                summary = json.loads(file.read_text(encoding="utf-8"))
            facts |= {"exported net": summary["exported"], "minutes": f"{summary['seconds'] / 60:.1f}"}
            if "peak_mb" in summary:
                facts["peak memory of rank 0, MB"] = f"{summary['peak_mb']:,}"
            if isinstance(cosine := summary.get("onnx_cosine"), float):
                facts["ONNX to PyTorch, smallest cosine"] = f"{cosine:.6f}"
        return facts


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, AttributeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ReportError(f"{file}: damaged: {error}") from error


def _history_of_log(lines: Sequence[str], total_batch_size: str) -> list[Entry]:
    """The entries of a run of arcface_torch, from the lines of its log."""
    images_per_step = int(total_batch_size) if total_batch_size.isdecimal() else 1
    entries: dict[int, Entry] = {}

    def entry(step: str) -> Entry:
        return entries.setdefault(int(step), {"step": int(step), "images": int(step) * images_per_step})
    for line in lines:
        if found := _LOSS.search(line):
            entry(found[4]).update(loss=float(found[2]), learning_rate=float(found[3]), images_per_second=float(found[1]))
        elif found := _ACCURACY.search(line):
            entry(found[3])[f"{found[2]}/{found[1] or ''}accuracy"] = float(found[4])
        elif found := _MONITOR.search(line):
            for name, value in re.findall(r"([a-zA-Z -]+?) (nan|-?[\d.]+)(?: steps)?(?:  |$)", found[2]):
                if value != "nan":
                    entry(found[1])["f2c/" + name.strip().replace(" ", "_").replace("-", "_")] = float(value)
    return [_current_names(entries[step]) for step in sorted(entries)]


def _current_names(entry: Entry) -> Entry:
    return {_OLD_NAMES.get(name, name): value for name, value in entry.items()}


def report(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Plot runs, write plots and summaries into ``report.html`` in ``out``, or in the first folder, and print the summaries.

    The page holds its plots, so it is always of one report.
    """
    runs = [Run.read(folder, name) for folder, name in zip(folders, _distinct_names(folders), strict=True)]
    out = Path(out or folders[0])
    out.mkdir(parents=True, exist_ok=True)
    plots = [draw_curves(runs, out / "curves.png")]
    if any(run.scores for run in runs):
        plots += [draw_scores(runs, out / "scores.png"), draw_roc(_by_label(runs), out / "roc.png")]
    page = out / "report.html"
    with written_whole(page) as file:
        file.write(_page(runs, plots).encode("utf-8", "surrogateescape"))  # a folder's name may be in another encoding
    for run in runs:
        print(run.name)
        for name, fact in run.facts.items():
            print(f"  {name:<34} {fact}")
    return page


def _distinct_names(folders: Sequence[str | Path]) -> list[str]:
    """The folders' names, each with as many parent folders as make it unique."""
    paths = [Path(os.path.realpath(folder)) for folder in folders]

    def name(path: Path) -> str:
        for depth in range(1, len(path.parts)):
            end = path.parts[-depth:]
            if [other.parts[-depth:] for other in paths].count(end) == 1:
                return "/".join(end)
        return str(path)
    return [name(path) for path in paths]


def draw_curves(runs: Sequence[Run], path: Path) -> Path:
    """Plot loss, verification accuracy, cosines and pool statistics against images seen."""
    panels = {
        "loss": {"loss": ""},
        "verification accuracy": {name: name.split("/")[0] + (", gallery net" if "gallery" in name else "")
                                  for run in runs for name in run.accuracies},
        "cosines to the pool": {"f2c/positive_cosine": "own slot", "f2c/hard_negative_cosine": "hardest negatives"},
        "pool": {"f2c/pool_fill": "occupied slots", "f2c/pool_hit_rate": "probes with their identity in the pool"},
        "age of the features in the pool, steps": {"f2c/age": ""},
        "evictions per step": {"f2c/evictions": ""},
    }
    panels = {title: lines for title, lines in panels.items() if any(run.series(name) for run in runs for name in lines)}
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    several = len(runs) > 1
    figure, axes = pyplot().subplots(rows, columns, figsize=(4.4 * columns, 3.4 * rows), squeeze=False, layout="constrained")
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=False):  # the last axes may stay empty
        for number, run in enumerate(runs):
            for style, (name, line) in zip(cycle(STYLES), lines.items(), strict=False):
                if points := run.series(name):
                    look: dict[str, Any] = {"color": f"C{number}", "linestyle": style} if several else {}
                    label = ", ".join(part for part in (run.name if several else "", line) if part)
                    axis.plot(*zip(*points, strict=True), label=label or None, marker="o" if len(points) < 20 else None,
                              markersize=4, **look)
        axis.set(title=title, xlabel="images seen", ylim=(0, 1.05) if title == "pool" else None)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=8)
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    if not several and (scales := runs[0].series("f2c/scale")):  # with the ramp, the loss grows with its scale
        axis = axes[0, 0].twinx()
        axis.plot(*zip(*scales, strict=True), "k:", alpha=0.5)
        axis.set(ylabel="scale s (dotted)", ylim=(0, None))
    return save_figure(figure, path)


def draw_scores(runs: Sequence[Run], path: Path) -> Path:
    """Plot histograms of the cosines of same and different pairs, one panel per run and set."""
    panels = [(run, name) for run in runs for name in run.scores]
    figure, axes = pyplot().subplots(len(panels), 1, figsize=(6, 3.2 * len(panels)), squeeze=False, layout="constrained")
    for axis, (run, name) in zip(axes[:, 0], panels, strict=True):
        scores, same = run.scores[name]
        bins = np.linspace(min(scores.min(), 0), 1, 60)
        for answer, label in (False, "different people"), (True, "same person"):
            axis.hist(scores[same == answer], bins, alpha=0.65, label=f"{label} ({(same == answer).sum()} pairs)")
        axis.set(title=f"{run.name}: {name}", xlabel="cosine of the embeddings", ylabel="pairs")
        axis.legend()
        axis.grid(alpha=0.3)
    return save_figure(figure, path)


def _by_label(runs: Sequence[Run]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {f"{run.name}: {name}": scores for run in runs for name, scores in run.scores.items()}


def _page(runs: Sequence[Run], plots: Sequence[Path]) -> str:
    facts = list(dict.fromkeys(name for run in runs for name in run.facts))
    keys = sorted({key for run in runs for key in run.config})
    if len(runs) > 1:
        keys = [key for key in keys if len({run.config.get(key) for run in runs}) > 1]
    parts = [_table("Summary", runs, facts, lambda run, name: run.facts.get(name, ""))]
    for plot in plots:
        data = base64.b64encode(plot.read_bytes()).decode()
        parts.append(f'<h2>{HEADINGS[plot.stem]}</h2>\n<img alt="{plot.stem}" src="data:image/png;base64,{data}">')
    parts.append(_table("Config, where it differs" if len(runs) > 1 else "Config", runs, keys,
                        lambda run, key: run.config.get(key, "not set")))
    title = html.escape(", ".join(run.name for run in runs))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 15px sans-serif; margin: 2em auto; max-width: 1100px; }} img {{ max-width: 100%; }}
table {{ border-collapse: collapse; }} th, td {{ border: 1px solid #ccc; padding: .25em .6em; text-align: left; }}</style>
</head><body><h1>{title}</h1>
{chr(10).join(parts)}
</body></html>
"""


def _table(title: str, runs: Sequence[Run], rows: Sequence[str], cell: Callable[[Run, str], str]) -> str:
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    body = "\n".join(f"<tr><th>{html.escape(row)}</th>" + "".join(f"<td>{html.escape(cell(run, row))}</td>" for run in runs)
                     + "</tr>" for row in rows)
    return f"<h2>{title}</h2>\n<table>\n<tr><th></th>{head}</tr>\n{body}\n</table>"
