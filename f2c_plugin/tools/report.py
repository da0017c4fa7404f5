"""Reports on training runs, of the built-in host or of arcface_torch: pictures, and a page that holds them all."""

import base64
import html
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from f2c_plugin.errors import ReportError
from f2c_plugin.evaluation.verification import tar_at_far
from f2c_plugin.tools.plotting import pyplot

FARS = (1e-1, 1e-2, 1e-3, 1e-4)
HEADINGS = {"curves": "Curves", "scores": "Cosines of the verification pairs", "roc": "ROC"}
_LOSS = re.compile(r"Speed ([\d.]+) samples/sec\s+Loss (\S+)\s+LearningRate (\S+).*Global Step: (\d+)")
_MONITOR = re.compile(r"F²C step (\d+): (.*)")
_ACCURACY = re.compile(r"\[(\w+)\]\[(\d+)\]Accuracy-Flip: ([\d.]+)")
_OLD_NAMES = {"f2c/found": "f2c/pool_hit_rate"}  # of version 0.1
_CONFIG = re.compile(r"(?:^|[-\s]): ([a-z0-9_]+[a-z_]) *(.*)")


@dataclass
class Run:
    """What is known of one training.

    Attributes:
        name: of its folder.
        history: entries with "step", "images" and scalars, in order.
        config: {key: value as text}.
        scores: {verification set: (cosines (n,), whether the pair is one person, bool (n,))}; not
            kept by arcface_torch without F²C.
        facts: {what: text}, the summary.
    """

    name: str
    history: list[dict]
    config: dict[str, str]
    scores: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder) -> "Run":
        """Read what a training has left in ``folder``.

        Raises:
            ReportError: nothing that could be reported on.
        """
        folder = Path(folder)
        log = folder / "training.log"
        if not log.is_file():
            raise ReportError(f"{folder}: no training.log; give the output folder of a training by arcface_torch or by "
                              "f2c_plugin.train")
        lines = log.read_text(errors="replace").splitlines()
        config = {found[1]: found[2].strip() for line in lines if (found := _CONFIG.search(line))}
        if (folder / "history.jsonl").is_file():
            history = [_todays_names(json.loads(line)) for line in (folder / "history.jsonl").read_text().splitlines()]
        else:
            history = _history_of_log(lines, int(config.get("total_batch_size", 1)))
        if not history:
            raise ReportError(f"{folder}: the training has logged no step yet")
        run = cls(folder.resolve().name, history, config)
        for path in sorted(folder.glob("*_scores.npz")):
            with np.load(path) as saved:
                run.scores[path.name.removesuffix("_scores.npz")] = saved["scores"], saved["same"]
        run.facts = run._summarise(folder)
        return run

    def series(self, name: str) -> list[tuple[int, float]]:
        """(images seen, value) wherever ``name`` was logged."""
        return [(entry["images"], entry[name]) for entry in self.history if name in entry]

    @property
    def accuracies(self) -> list[str]:
        """The scalars that are accuracies."""
        return sorted({name for entry in self.history for name in entry if name.endswith("accuracy")})

    def _summarise(self, folder):
        last = {name: value for entry in self.history for name, value in entry.items()}
        speeds = [value for _, value in self.series("images_per_second")]
        facts = {"head": self.config.get("head", ""), "network": self.config.get("network", ""),
                 "images seen": f"{self.history[-1]['images']:,}",
                 "images/s (median)": f"{np.median(speeds):,.0f}" if speeds else ""}
        for name in self.accuracies:
            best = max(value for _, value in self.series(name))
            facts[f"{name} (last, best)"] = f"{last[name]:.2%}, {best:.2%}"
        for name, (scores, same) in self.scores.items():
            facts |= {f"{name}: TAR at FAR {far:g}": f"{tar_at_far(scores, same, far):.2%}" for far in FARS}
        if (folder / "report.json").is_file():
            summary = json.loads((folder / "report.json").read_text())
            facts |= {"shipped": f"the {summary['exported']} net", "minutes": f"{summary['seconds'] / 60:.1f}"}
            if "peak_mb" in summary:
                facts["peak memory of rank 0, MB"] = f"{summary['peak_mb']:,}"
            if summary.get("onnx_cosine"):
                facts["ONNX to PyTorch, smallest cosine"] = f"{summary['onnx_cosine']:.6f}"
        return facts


def _history_of_log(lines, images_per_step):
    """The entries of a run of arcface_torch, from the lines of its log."""
    entries = {}

    def entry(step):
        return entries.setdefault(int(step), {"step": int(step), "images": int(step) * images_per_step})
    for line in lines:
        if found := _LOSS.search(line):
            entry(found[4]).update(loss=float(found[2]), learning_rate=float(found[3]), images_per_second=float(found[1]))
        elif found := _ACCURACY.search(line):
            of_gallery, name = re.fullmatch(r"(gallery_)?(.*)", found[1]).groups("")
            entry(found[2])[f"{name}/{of_gallery}accuracy"] = float(found[3])
        elif found := _MONITOR.search(line):
            for name, value in re.findall(r"([a-zA-Z -]+?) (nan|-?[\d.]+)(?: steps)?(?:  |$)", found[2]):
                if value != "nan":
                    entry(found[1])["f2c/" + name.strip().replace(" ", "_").replace("-", "_")] = float(value)
    return [_todays_names(entries[step]) for step in sorted(entries)]


def _todays_names(entry):
    return {_OLD_NAMES.get(name, name): value for name, value in entry.items()}


def report(folders, out=None) -> Path:
    """Print the summary of one run or several, draw their pictures, and write ``report.html`` that holds it all.

    The page needs no network. Needs matplotlib.

    Args:
        folders: output folders of trainings.
        out: where to; the first of ``folders`` if None.
    Returns:
        The page; the PNGs are beside it.
    """
    runs = [Run.read(folder) for folder in folders]
    for run in runs:
        print(run.name)
        for what, fact in run.facts.items():
            print(f"  {what:<34} {fact}")
    out = Path(out or folders[0])
    out.mkdir(parents=True, exist_ok=True)
    pictures = [draw_curves(runs, out / "curves.png")]
    if any(run.scores for run in runs):
        pictures += [draw_scores(runs, out / "scores.png"), draw_roc(runs, out / "roc.png")]
    page = out / "report.html"
    page.write_text(_page(runs, pictures), encoding="utf-8")
    return page


def draw_curves(runs: list[Run], path) -> Path:
    """Loss, verification accuracy, cosines and pool of runs, against images seen."""
    plt = pyplot()
    panels = [("loss", {"loss": ""}, None),
              ("verification accuracy", {name: _of_accuracy(name) for run in runs for name in run.accuracies}, None),
              ("cosines to the pool", {"f2c/positive_cosine": "own slot", "f2c/hard_negative_cosine": "hardest negatives"}, None),
              ("pool", {"f2c/pool_fill": "slots taken", "f2c/pool_hit_rate": "probes whose identity is in the pool"}, (0, 1.05)),
              ("age of the features in the pool, steps", {"f2c/age": ""}, None),
              ("evictions a step", {"f2c/evictions": ""}, None)]
    panels = [panel for panel in panels if any(run.series(name) for run in runs for name in panel[1])]
    columns = min(3, len(panels))
    figure, axes = plt.subplots(-(-len(panels) // columns), columns, figsize=(4.4 * columns, 3.4 * -(-len(panels) // columns)),
                                squeeze=False, layout="constrained")
    for axis, (title, lines, limits) in zip(axes.flat, panels):
        for number, run in enumerate(runs):
            for style, (name, label) in zip(("-", "--", ":", "-."), lines.items()):
                if points := run.series(name):
                    label = ", ".join(part for part in (run.name if len(runs) > 1 else "", label) if part)
                    colour = {"color": f"C{number}"} if len(runs) > 1 else {}
                    axis.plot(*zip(*points), style if len(runs) > 1 else "-", label=label or None,
                              marker="o" if len(points) < 20 else None, markersize=4, **colour)
        axis.set(title=title, xlabel="images seen", ylim=limits)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=8)
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    if len(runs) == 1 and (scales := runs[0].series("f2c/scale")):  # under the ramp the loss grows because its scale does
        axis = axes[0, 0].twinx()
        axis.plot(*zip(*scales), "k:", alpha=0.5)
        axis.set(ylabel="scale s (dotted)", ylim=(0, None))
    return _save(figure, path)


def _of_accuracy(name):
    return name.split("/")[0] + (", gallery net" if "gallery" in name else "")


def draw_scores(runs: list[Run], path) -> Path:
    """Histograms of the cosines of same and of different pairs, a panel for each run and set."""
    plt = pyplot()
    panels = [(run, name) for run in runs for name in run.scores]
    figure, axes = plt.subplots(len(panels), 1, figsize=(6, 3.2 * len(panels)), squeeze=False, layout="constrained")
    for axis, (run, name) in zip(axes[:, 0], panels):
        scores, same = run.scores[name]
        bins = np.linspace(min(scores.min(), 0), 1, 60)
        for answer, label in (False, "different people"), (True, "same person"):
            axis.hist(scores[same == answer], bins, alpha=0.65, label=f"{label} ({(same == answer).sum()} pairs)")
        axis.set(title=f"{run.name}: {name}", xlabel="cosine of the embeddings", ylabel="pairs")
        axis.legend()
        axis.grid(alpha=0.3)
    return _save(figure, path)


def draw_roc(runs: list[Run], path) -> Path:
    """TAR against FAR of every run and set."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6, 4.2), layout="constrained")
    for run in runs:
        for name, (scores, same) in run.scores.items():
            order = np.argsort(-scores)
            far, tar = (np.cumsum(same[order] == answer) / max((same == answer).sum(), 1) for answer in (False, True))
            axis.semilogx(np.maximum(far, 0.5 / max((~same).sum(), 1)), tar, label=f"{run.name}: {name}", drawstyle="steps-post")
    axis.set(xlabel="FAR, different people accepted", ylabel="TAR, same person accepted", ylim=(0, 1.02))
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3, which="both")
    return _save(figure, path)


def _save(figure, path):
    figure.savefig(path, dpi=120)
    pyplot().close(figure)
    return Path(path)


def _page(runs, pictures):
    facts = list(dict.fromkeys(what for run in runs for what in run.facts))
    keys = sorted({key for run in runs for key in run.config})
    differing = [key for key in keys if len({run.config.get(key) for run in runs}) > 1]
    shown = differing if len(runs) > 1 else keys
    parts = [_table("Summary", runs, facts, lambda run, what: run.facts.get(what, ""))]
    for picture in pictures:
        data = base64.b64encode(picture.read_bytes()).decode()
        parts.append(f'<h2>{HEADINGS[picture.stem]}</h2>\n<img alt="{picture.stem}" src="data:image/png;base64,{data}">')
    parts.append(_table("Config, where it differs" if len(runs) > 1 else "Config", runs, shown,
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


def _table(title, runs, rows, cell):
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    body = "\n".join(f"<tr><th>{html.escape(row)}</th>" + "".join(f"<td>{html.escape(cell(run, row))}</td>" for run in runs)
                     + "</tr>" for row in rows)
    return f"<h2>{title}</h2>\n<table>\n<tr><th></th>{head}</tr>\n{body}\n</table>"
