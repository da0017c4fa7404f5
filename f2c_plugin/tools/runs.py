"""Reads the output folders of trainings, by the built-in trainer or arcface_torch."""

import json
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np

from f2c_plugin.errors import ReportError
from f2c_plugin.evaluation.accuracy import FARS, GEOMETRY, tar_at_far, tar_text
from f2c_plugin.tools.plotting import Scores
from f2c_plugin.utils.paths import require_no_file

# Settings that change no result.
NO_RESULT = re.compile("output|resume|frequent|verbose|num_workers|f2c_save_every|save_all_states|suffix_run_name|"
                       ".*wandb.*|.*mlflow.*")
_LOSS = re.compile(r"Speed ([\d.]+) samples/sec\s+Loss (\S+)\s+LearningRate (\S+).*Global Step: (\d+)")
_TIMED_LOSS = re.compile(rf"Training: ([\d-]+ [\d:,]+)-{_LOSS.pattern}")
_MONITOR = re.compile(r"F²C step (\d+): (.*)")
_ACCURACY = re.compile(r"\[(gallery_)?(\w+)\]\[(\d+)\]Accuracy-Flip: ([\d.]+)(?:\+-([\d.]+))?")
_GEOMETRY = re.compile(rf"  ({'|'.join(GEOMETRY)}): (-?[\d.]+)")
_SKIPPED = re.compile(r"step (\d+) is skipped because its gradient is not finite")
_NOT_FINITE_LOSS = re.compile(r"the loss is \S+ at step (\d+)|Loss (?:nan|-?inf) .*Global Step: (\d+)")
_OLD_NAMES = {"f2c/found": "f2c/pool_hit_rate"}  # names of version 0.1
# A time, then ": key   value". arcface_torch pads keys to 25 characters, so the value directly follows a longer key.
_CONFIG = re.compile(r"(?:Training: )?[\d-]+ [\d:,]+[- ]: (?:(\w+) +|([a-z0-9_]{24,}[a-z_]))(.*)")
_POOL = {"f2c/pool_fill": ("occupied slots", ".1%"), "f2c/pool_hit_rate": ("hit rate", ".1%"),
         "f2c/evictions": ("evictions per step", ",.1f"), "f2c/age": ("age, steps", ",.1f")}

Entry = dict[str, float]


@dataclass
class Run:
    """The results of one training."""

    name: str
    history: list[Entry]  # with "step", "images" and scalars, in order
    config: dict[str, str]
    scores: dict[str, Scores] = field(default_factory=dict)  # by verification set; arcface_torch saves them only with F²C
    facts: dict[str, str] = field(default_factory=dict)  # the summary
    skipped_steps: int = 0  # because their gradient was not finite
    not_finite_losses: list[int] = field(default_factory=list)  # the steps
    derived_batch: int | None = None  # images of a step where the log does not say it; 1 if nothing does

    @classmethod
    def read(cls, folder: str | Path) -> "Run":
        """Read the output folder of a training, which names the run. Raises ReportError without intact results."""
        folder = Path(folder)
        require_no_file(folder, "the output folder of a training", "training.log", ReportError)
        log = folder / "training.log"
        if not log.is_file():
            raise ReportError(f"{folder}: no training.log; give the output folder of a training by arcface_torch or by "
                              "f2c_plugin.train")
        lines = _since_the_last_start(log.read_text(encoding="utf-8", errors="replace").splitlines())
        config = {found[1] or found[2]: found[3].strip() for line in lines if (found := _CONFIG.match(line))}
        derived = None
        file = folder / "history.jsonl"
        if file.is_file():
            with _reading(file):
                history = [_current_names(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
        else:
            total = config.get("total_batch_size", "")
            derived = None if total.isdecimal() else _images_of_a_step(lines)
            history = _history_of_log(lines, derived or int(total))
        if not history:
            raise ReportError(f"{folder}: the training has not logged a step yet")
        run = cls(Path(os.path.realpath(folder)).name, history, config, derived_batch=derived)
        run.skipped_steps = len({found[1] for found in filter(None, map(_SKIPPED.search, lines))})
        losses = filter(None, map(_NOT_FINITE_LOSS.search, lines))
        run.not_finite_losses = sorted({int(found[1] or found[2]) for found in losses})
        for path in sorted(folder.glob("*_scores.npz"), key=lambda path: (path.name.removeprefix("gallery_"), len(path.name))):
            with _reading(path), np.load(path) as saved:
                run.scores[path.name.removesuffix("_scores.npz")] = saved["scores"], saved["same"]
        run._drop_unresolved()
        run.facts = run._summarize(folder)
        return run

    def series(self, name: str) -> list[tuple[float, float]]:
        """(images seen, value) of every entry that holds ``name``."""
        return [(entry["images"], entry[name]) for entry in self.history if name in entry]

    def last(self, name: str) -> float | None:
        """The last value of ``name``."""
        return next((entry[name] for entry in reversed(self.history) if name in entry), None)

    @property
    def accuracies(self) -> list[str]:
        return sorted({name for entry in self.history for name in entry if name.endswith("accuracy")})

    @property
    def images_seen(self) -> float:
        return self.history[-1]["images"]

    @cached_property
    def speed(self) -> float | None:
        """Median of the logged images per second."""
        speeds = [value for _, value in self.series("images_per_second")]
        return float(np.median(speeds)) if speeds else None

    @cached_property
    def clock(self) -> tuple[np.ndarray, np.ndarray]:
        """Images seen, and the hours of training they took without verification, (n,) each; from the logged speeds."""
        points = [(images, speed) for images, speed in self.series("images_per_second") if speed > 0]
        images, speeds = np.array(points).reshape(-1, 2).T
        images = np.concatenate([[0], images])
        return images, np.concatenate([[0], np.cumsum(np.diff(images) / speeds) / 3600])

    def _drop_unresolved(self) -> None:
        """Version 0.1 has recorded TAR also where the pairs do not resolve it."""
        unresolved = {beside(name, "tar_at_far_1e-3") for name in self.accuracies
                      if (scores := self.scores.get(scores_of(name))) and tar_at_far(*scores, 1e-3) is None}
        self.history = [{name: value for name, value in entry.items() if name not in unresolved} for entry in self.history]

    def _summarize(self, folder: Path) -> dict[str, str]:
        facts = {"head": self.config.get("head", ""), "network": self.config.get("network", "")}
        accuracies = {scores_of(name): name for name in self.accuracies}
        for name in dict.fromkeys([*accuracies, *self.scores]):
            if accuracy := accuracies.get(name):
                values = [value for _, value in self.series(accuracy)]
                facts |= {f"{name}: last accuracy": f"{values[-1]:.2%}", f"{name}: best accuracy": f"{max(values):.2%}"}
            if name in self.scores:
                facts |= {f"{name}: TAR at FAR {far:g}": tar_text(tar_at_far(*self.scores[name], far)) for far in FARS}
            if accuracy:
                facts |= {f"{name}: {metric}": f"{value:.3f}" for metric in GEOMETRY
                          if (value := self.last(beside(accuracy, metric))) is not None}
        facts["images seen"] = f"{self.images_seen:,.0f}"
        if self.speed is not None:
            facts |= {"images/s (median)": f"{self.speed:,.0f}", "hours of training": f"{self.clock[1][-1]:.3g}"}
        file = folder / "report.json"
        if file.is_file():
            with _reading(file):
                summary = json.loads(file.read_text(encoding="utf-8"))
            facts |= {"hours with verification": f"{summary['seconds'] / 3600:.3g}"}
            if "peak_mb" in summary:
                facts["peak memory of rank 0, MB"] = f"{summary['peak_mb']:,}"
            facts["exported net"] = summary["exported"]
            if isinstance(cosine := summary.get("onnx_cosine"), float):
                facts["ONNX to PyTorch, smallest cosine"] = f"{cosine:.6f}"
        facts |= {f"pool: {label}": f"{value:{form}}" for name, (label, form) in _POOL.items()
                  if (value := self.last(name)) is not None}
        return facts


def scores_of(accuracy: str) -> str:
    """The name of a verification in its scores' file, "gallery_lfw", from that of its accuracy, "lfw/gallery_accuracy"."""
    name, metric = accuracy.rsplit("/", 1)
    return metric.removesuffix("accuracy") + name


def beside(accuracy: str, metric: str) -> str:
    """The name in the history of another metric of the verification that has this accuracy."""
    return accuracy.removesuffix("accuracy") + metric


def distinct_names(folders: Sequence[str | Path]) -> list[str]:
    """The folders' names without the end that all have, each with as many parent folders as make it unique."""
    paths = [Path(os.path.realpath(folder)).parts for folder in folders]
    while len(paths) > 1 and len({path[-1] for path in paths}) == 1 and min(map(len, paths)) > 2:
        paths = [path[:-1] for path in paths]

    def name(path: tuple[str, ...]) -> str:
        for depth in range(1, len(path)):
            end = path[-depth:]
            if [other[-depth:] for other in paths].count(end) == 1:
                return "/".join(end)
        return str(Path(*path))
    return [name(path) for path in paths]


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Keys of the configs whose values differ between the runs that have recorded one."""
    configs = [run.config for run in runs if run.config]
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if not NO_RESULT.fullmatch(key) and len({config.get(key) for config in configs}) > 1]


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, AttributeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ReportError(f"{file}: damaged: {error}") from error


def _since_the_last_start(lines: Sequence[str]) -> Sequence[str]:
    """Without the trainings before: arcface_torch appends to a log. Each start logs its config; resume=False begins anew."""
    begin = start = 0
    before = None
    for i, line in enumerate(lines):
        found = _CONFIG.match(line)
        if found and not before:
            start = i
        if found and found[1] == "resume" and found[3].strip() == "False":
            begin = start
        before = found
    return lines[begin:]


def _images_of_a_step(lines: Sequence[str]) -> int:
    """Of arcface_torch, whose speeds are those between two lines of its log; 1 if there are no two."""
    found = [(datetime.strptime(each[1], "%Y-%m-%d %H:%M:%S,%f"), int(each[5]), float(each[2]))
             for each in map(_TIMED_LOSS.match, lines) if each]
    images = [speed * (time - before).total_seconds() / (step - step_before)
              for (before, step_before, _), (time, step, speed) in pairwise(found) if step > step_before]
    return max(round(float(np.median(images))), 1) if images else 1


def _history_of_log(lines: Sequence[str], images_per_step: int) -> list[Entry]:
    """The entries of a run of arcface_torch, from the lines of its log."""
    entries: dict[int, Entry] = {}

    def entry(step: str) -> Entry:
        return entries.setdefault(int(step), {"step": int(step), "images": int(step) * images_per_step})
    for line in lines:
        if found := _LOSS.search(line):
            entry(found[4]).update(loss=float(found[2]), learning_rate=float(found[3]), images_per_second=float(found[1]))
        elif found := _ACCURACY.search(line):
            name = f"{found[2]}/{found[1] or ''}accuracy"
            entry(found[3])[name] = float(found[4])
            if found[5]:
                entry(found[3])[f"{name}_std"] = float(found[5])
            entry(found[3]).update({beside(name, metric): float(value) for metric, value in _GEOMETRY.findall(line)})
        elif found := _MONITOR.search(line):
            for name, value in re.findall(r"([a-zA-Z -]+?) (nan|-?[\d.]+)(?: steps)?(?:  |$)", found[2]):
                if value != "nan":
                    entry(found[1])["f2c/" + name.strip().replace(" ", "_").replace("-", "_")] = float(value)
    return [_current_names(entries[step]) for step in sorted(entries)]


def _current_names(entry: Entry) -> Entry:
    return {_OLD_NAMES.get(name, name): value for name, value in entry.items()}
