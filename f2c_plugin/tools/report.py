"""Pictures and a summary of a training run."""

import json
from pathlib import Path

import numpy as np


class ReportError(ValueError):
    """The folder holds no run that could be reported on."""


def report(folder) -> list[Path]:
    """Print the summary of the run in ``folder`` and draw its pictures there. Needs matplotlib.

    Returns:
        The pictures: curves.png, and scores.png if there was a verification.
    """
    folder = Path(folder)
    if not (folder / "report.json").is_file():
        raise ReportError(f"{folder}: no report.json; a training by f2c_plugin.train leaves one when it ends")
    summary = json.loads((folder / "report.json").read_text())
    pictures = [draw_curves(folder / "history.jsonl", folder / "curves.png")]
    name = next(iter(summary["verification_sets"]), None)
    if name:
        pictures.append(draw_scores(folder / f"{name}_scores.npz", folder / "scores.png"))

    print(f"head {summary['head']}, network {summary['network']}: {summary['images_seen']:,} images "
          f"in {summary['seconds']:.0f} s")
    for name, result in summary["verification_sets"].items():
        print(f"verification on {name} ({result['pairs']} pairs): accuracy {result['accuracy']:.2%} "
              f"± {result['accuracy_std']:.2%}, TAR at FAR 1e-3 {result['tar_at_far_1e-3']:.2%}")
    if summary.get("onnx_cosine"):
        print(f"{folder / 'model.onnx'}: smallest cosine to PyTorch's embeddings {summary['onnx_cosine']:.6f}")
    for picture in pictures:
        print(picture)
    return pictures


def draw_curves(history, path) -> Path:
    """Loss, verification accuracy, cosines and pool of a run, against images seen."""
    plt = pyplot()
    entries = [json.loads(line) for line in Path(history).read_text().splitlines()]
    names = {name for entry in entries for name in entry}
    accuracies = sorted(name for name in names if name.endswith("accuracy"))
    panels = [("loss", {"loss": "loss"}, None),
              ("verification accuracy", {name: name.split("/")[0] + (", gallery net" if "gallery" in name else "") for name in accuracies}, None),
              ("cosines to the pool", {"f2c/positive_cosine": "own slot", "f2c/hard_negative_cosine": "hardest negatives"}, None),
              ("pool", {"f2c/pool_fill": "slots taken", "f2c/found": "probes whose identity is in it"}, (0, 1.05))]
    panels = [(title, {name: label for name, label in lines.items() if name in names}, limits)
              for title, lines, limits in panels]
    panels = [panel for panel in panels if panel[1]]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), squeeze=False, layout="constrained")
    for axis, (title, lines, limits) in zip(axes[0], panels):
        for name, label in lines.items():
            points = [(entry["images"], entry[name]) for entry in entries if name in entry]
            axis.plot(*zip(*points), label=label, marker="o" if len(points) < 20 else None, markersize=4)
        axis.set(title=title, xlabel="images seen", ylim=limits)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k")
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend()
    if "f2c/scale" in names:  # under the ramp the loss grows because its scale does
        axis = axes[0, 0].twinx()
        axis.plot(*zip(*((entry["images"], entry["f2c/scale"]) for entry in entries if "f2c/scale" in entry)), "k:", alpha=0.5)
        axis.set(ylabel="scale s (dotted)", ylim=(0, None))
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def draw_scores(scores_file, path) -> Path:
    """Histogram of the cosines of same and of different pairs."""
    plt = pyplot()
    with np.load(scores_file) as saved:
        scores, same = saved["scores"], saved["same"]
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    bins = np.linspace(min(scores.min(), 0), 1, 60)
    for answer, label in (False, "different people"), (True, "same person"):
        axis.hist(scores[same == answer], bins, alpha=0.65, label=f"{label} ({(same == answer).sum()} pairs)")
    axis.set(title="verification of unseen identities", xlabel="cosine of the embeddings", ylabel="pairs")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def pyplot():
    """matplotlib's pyplot, drawing into files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt
