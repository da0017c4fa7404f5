"""What `accuracy.py` and `vectors.py` share: heads, runs in processes of their own, learning rates, tables.

Heads are compared at equal images and at equal compute. A forward pass counts 1 unit of compute an image, forward and backward
count 3. At equal compute, a head takes as many steps as cost what the full FC layer takes in the same number of passes; its
learning rate and its ramp end with its last step.

Each head has its own learning rate: of those in --lr the one with which it is best on the first seed, in TAR at FAR 1e-3; or,
where no unseen identities resolve it, in accuracy or AUC.

Results go into --work as they come, and none is measured again with the same settings and data, also by a later version:
each names the commit that it was measured with.
"""

import argparse
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from head_step import arcface_torch_modules

import f2c_plugin
from f2c_plugin.arcface_torch import patching
from f2c_plugin.build import margin_from
from f2c_plugin.config import DEFAULTS, MARGINS, TrainConfig, slots_for
from f2c_plugin.data.from_config import steps_per_epoch
from f2c_plugin.errors import F2CError
from f2c_plugin.evaluation.accuracy import tar_at_far
from f2c_plugin.method.schedule import Schedule
from f2c_plugin.trainer import build
from f2c_plugin.utils.atomic import written_whole

FARS = "1e-2", "1e-3", "1e-4"
FULL_FC, PARTIAL_FC, F2C, DCQ = "softmax", "partial_fc", "f2c_dcp", "dcq"  # heads
FORWARD, FORWARD_AND_BACKWARD = 1, 3  # units of compute an image

Keys = dict[str, Any]  # of a config
Result = dict[str, Any]


# What the neighbours of F²C add to a head; the first three also to the full FC layer.
METHODS: dict[str, Keys] = {
    "SFace": dict(f2c_margin="sface", margin_list=(1.0, 0.9, 1.2)), "sub-centres": dict(f2c_sub_centers=3),
    "low resolution": dict(f2c_low_resolution=0.5), "small loss": dict(f2c_forget_rate=0.2),
    "small loss, sub-centres": dict(f2c_forget_rate=0.2, f2c_sub_centers=3),
    "filter": dict(interclass_filtering_threshold=0.4), "distillation": dict(f2c_teacher="")}
OF_FULL_FC = list(METHODS)[:3]


def variants_at(rates: Iterable[float]) -> dict[str, Keys]:
    """Config keys of all variants, by name; of those with a pool or a sample rate, one for each rate."""
    ramped = dict(head=FULL_FC, softmax_ramp=True)
    variants: dict[str, Keys] = {"full FC": dict(head=FULL_FC), "full FC, with the ramp": ramped}
    for rate in rates:
        partial_fc, f2c = dict(head=PARTIAL_FC, sample_rate=rate), dict(head=F2C, f2c_pool_rate=rate)
        variants |= {
            f"Partial FC {rate:g}": partial_fc,
            f"Partial FC {rate:g}, with the ramp": partial_fc | dict(softmax_ramp=True),
            f"F²C {100 * rate:g} %": f2c | dict(f2c_recipe="resident"),
            f"F²C {100 * rate:g} %, as published": f2c | dict(f2c_recipe="paper"),
            f"F²C {100 * rate:g} %, as published, not symmetric": f2c | dict(f2c_recipe="paper", f2c_symmetric=False),
            **{f"F²C {100 * rate:g} %, {name}": f2c | keys for name, keys in METHODS.items()},
            f"DCQ {100 * rate:g} %": dict(head=DCQ, f2c_pool_rate=rate)}
    variants |= {f"full FC, with the ramp, {name}": ramped | METHODS[name] for name in OF_FULL_FC}
    return variants


def units(keys: Keys) -> float:
    """Compute of a variant's step over the images of its batch; without a teacher's, which is another net."""
    if keys["head"] == DCQ:
        return (FORWARD_AND_BACKWARD + FORWARD) / 2
    if keys.get("f2c_recipe") != "paper":
        twin = keys.get("f2c_forget_rate") or keys.get("f2c_low_resolution")
        return FORWARD_AND_BACKWARD + (FORWARD if twin else 0)
    # The gallery net embeds what the probe net embeds; if not symmetric, each of them one half of the batch.
    return (FORWARD_AND_BACKWARD + FORWARD) * (1 if keys.get("f2c_symmetric", True) else 1 / 2)


def steps_of(keys: Keys, passes: float, steps_per_pass: int, equal: str) -> int:
    """Steps of a variant that sees as many images, or takes as much compute, as the full FC layer in so many passes."""
    share = 1 if equal == "images" else FORWARD_AND_BACKWARD / units(keys)
    return max(1, round(passes * steps_per_pass * share))


class Run(NamedTuple):
    """A training."""

    variant: str
    steps: int
    lr: float
    seed: int


class Column(NamedTuple):
    """A column of the tables: key of the results, heading, and how to write the values of the seeds."""

    key: str
    heading: str
    text: Callable[[Sequence[float]], str]

    def values(self, runs: Iterable[Result]) -> list[float]:
        """The values of those runs that have one."""
        return [run[self.key] for run in runs if run.get(self.key) is not None]


def percent(values: Sequence[float]) -> str:
    spread = f" ± {100 * np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.2f} %{spread}"


def number(values: Sequence[float]) -> str:
    return f"{values[0]:,.10g}"


def about(values: Sequence[float]) -> str:
    return f"{values[0]:.3g}"


def median(values: Sequence[float]) -> str:
    return f"{np.median(values):,.0f}"


SETTING_COLUMNS = [Column("lr", "learning rate", number), Column("classes", "classes in a step", number),
                   Column("units", "units of compute an image", number), Column("passes", "passes", about)]
PAIR_COLUMNS = [*(Column(f"tar_{far}", f"TAR at FAR {far}", percent) for far in FARS), Column("auc", "AUC", percent)]
SPEED_COLUMN = Column("images_per_s", "images/s", median)


def pair_metrics(embeddings: torch.Tensor, identity: np.ndarray) -> Result:
    """TAR at fixed FAR, and AUC, over all pairs of images: unit embeddings float32 (n, D), identities (n,).

    A FAR that the different pairs do not resolve has None; so has the AUC if all pairs are same, or different.
    """
    scores, same = [np.empty(0, np.float32)], [np.empty(0, bool)]
    for i in range(len(embeddings) - 1):
        scores.append((embeddings[i + 1:] @ embeddings[i]).numpy())
        same.append(identity[i + 1:] == identity[i])
    all_scores, all_same = np.concatenate(scores), np.concatenate(same)
    return {f"tar_{far}": tar_at_far(all_scores, all_same, float(far)) for far in FARS} | {"auc": auc(all_scores, all_same)}


def auc(scores: np.ndarray, same: np.ndarray) -> float | None:
    """Probability that a same pair scores above a different one; equal scores count half."""
    if same.all() or not same.any():
        return None
    different = np.sort(scores[~same])
    below, up_to = (np.searchsorted(different, scores[same], side).mean() for side in ("left", "right"))
    return float((below + up_to) / 2 / len(different))


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all comparisons have."""
    made = argparse.ArgumentParser(description=description.split("\n")[0],
                                   formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--identities", type=int, default=1000, help="of the training set")
    made.add_argument("--images", type=int, default=20, help="of an identity")
    made.add_argument("--long-tail", action="store_true", help="so many images on average, but half of the identities have one "
                                                               "or two")
    made.add_argument("--wrong-labels", type=float, default=0.0, metavar="SHARE", help="of the labels, changed at random")
    made.add_argument("--split", type=float, default=0.0, metavar="SHARE", help="of the identities with several images, "
                                                                                "split in two")
    made.add_argument("--passes", type=float, nargs="+", default=[1.0], help="over the images")
    made.add_argument("--equal", nargs="+", default=["images", "compute"], choices=["images", "compute"], help="what is equal")
    made.add_argument("--seeds", type=int, default=1, help="runs of each head")
    made.add_argument("--variants", nargs="+", metavar="NAME", help='all, or some of those that "--variants list" prints')
    made.add_argument("--pool-rate", type=float, nargs="+", default=[1.0, 0.1],
                      help="slots as a share of the identities, and Partial FC's sample rate; a pool has room for a batch")
    made.add_argument("--batch-size", type=int, default=128, help="images a step")
    made.add_argument("--embedding-size", type=int, default=128, help="D")
    made.add_argument("--lr", type=float, nargs="+", default=[0.1], help="of several, each head has its own")
    made.add_argument("--scale", type=float, default=32.0, help="s")
    made.add_argument("--margin-list", type=float, nargs=3, default=[1.0, 0.0, 0.35], help="as in a config")
    made.add_argument("--margin", choices=MARGINS, help="another margin; its m is the list's third number")
    made.add_argument("--teacher", type=Path, metavar="MODEL", help="for distillation")
    made.add_argument("--jobs", type=int, default=1, help="runs at a time; 0 runs them in this process")
    made.add_argument("--work", type=Path, default=Path("work_dirs/comparisons"),
                      help="folder of all runs; what is finished there is not repeated")
    made.add_argument("--json", type=Path, metavar="FILE", help="to write every result into")
    made.add_argument("--child", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    return made


def parsed(made: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, dict[str, Keys]]:
    """The options, and the variants to compare. Ends the process after "--variants list", or if an option is wrong."""
    arguments = made.parse_args(argv)
    for option, values, valid, expected in (
            ("--wrong-labels", [arguments.wrong_labels], lambda v: 0 <= v <= 1, "from 0 to 1"),
            ("--split", [arguments.split], lambda v: 0 <= v <= 1, "from 0 to 1"),
            ("--pool-rate", arguments.pool_rate, lambda v: 0 < v <= 1, "above 0, up to 1"),
            ("--passes", arguments.passes, lambda v: v > 0, "above 0"),
            ("--lr", arguments.lr, lambda v: v > 0, "above 0"),
            ("--seeds", [arguments.seeds], lambda v: v >= 1, "at least 1"),
            ("--jobs", [arguments.jobs], lambda v: v >= 0, "at least 0"),
            ("--batch-size", [arguments.batch_size], lambda v: v >= 2, "at least 2")):
        if wrong := [value for value in values if not valid(value)]:
            made.error(f"{option} {wrong[0]}: must be {expected}")
    if arguments.teacher and not arguments.teacher.is_file():
        made.error(f"--teacher {arguments.teacher}: there is no such file")
    everything = variants_at(arguments.pool_rate)
    for keys in everything.values():
        if "f2c_teacher" in keys and arguments.teacher:  # what results depend on
            keys["f2c_teacher"] = hashlib.sha256(arguments.teacher.read_bytes()).hexdigest()
    if arguments.variants == ["list"]:
        print("\n".join(everything))
        raise SystemExit
    few = ["full FC, with the ramp", *(f"F²C {100 * rate:g} %" for rate in arguments.pool_rate)]
    possible = [name for name, keys in everything.items() if keys.get("f2c_teacher") != ""]
    names = possible if arguments.variants == ["all"] else arguments.variants or few
    for name in names:
        if name not in everything:
            made.error(f"--variants {name!r}: must be of {', '.join(everything)}")
        if name not in possible:
            made.error(f"--variants {name!r}: needs --teacher MODEL")
    if any(everything[name]["head"] == PARTIAL_FC for name in names):
        if arguments.margin:
            made.error(f"--margin {arguments.margin}: arcface_torch's Partial FC has no such margin; leave out its variants")
        try:
            patching.known_checkout()
        except patching.CheckoutError:
            print("without Partial FC: set ARCFACE_TORCH or run `f2c-plugin fetch-host`", file=sys.stderr)
            names = [name for name in names if everything[name]["head"] != PARTIAL_FC]
    return arguments, {name: everything[name] for name in names}


def config(arguments: argparse.Namespace, run: Run, num_classes: int, **others: Any) -> TrainConfig:
    """The config of a run, which is one epoch of ``run.steps`` steps, however many passes they are."""
    keys = variants_at(arguments.pool_rate)[run.variant]
    if "f2c_pool_rate" in keys:
        keys["f2c_pool_rate"] = min(1.0, max(keys["f2c_pool_rate"], arguments.batch_size / num_classes))
    if keys["head"] == DCQ:  # with as many class weights as a pool of this rate has
        keys["f2c_queue_size"] = slots_for(keys["f2c_pool_rate"], num_classes)
    if "f2c_teacher" in keys:
        keys["f2c_teacher"] = str(arguments.teacher)
    return TrainConfig(DEFAULTS | dict(
        num_classes=num_classes, num_image=run.steps * arguments.batch_size, num_epoch=1, batch_size=arguments.batch_size,
        embedding_size=arguments.embedding_size, lr=run.lr, seed=run.seed, scale=arguments.scale,
        margin_list=tuple(arguments.margin_list), f2c_margin=arguments.margin) | keys | others)


def setting_of(arguments: argparse.Namespace) -> Result:
    """What the results of all comparisons depend on, beside the run and its variant."""
    names = ["batch_size", "embedding_size", "scale", "margin_list", "long_tail", "wrong_labels", "split"]
    # Without another margin, the setting is that of results from before this option.
    return {name: getattr(arguments, name) for name in names + ["margin"] * bool(arguments.margin)}


def classes_in_a_step(cfg: TrainConfig) -> int:
    """Class weights, or slots, that the softmax of a step goes over."""
    share = {FULL_FC: 1.0, PARTIAL_FC: cfg.get("sample_rate")}.get(cfg.head) or cfg.f2c_pool_rate
    return slots_for(share, cfg.num_classes)


def partial_fc(cfg: Any, backbone: Any, margin_loss: Any) -> torch.nn.Module:
    """Head factory of arcface_torch's Partial FC, with the ramp if ``softmax_ramp``."""
    losses, partial_fc_v2 = arcface_torch_modules(patching.known_checkout())
    margin = losses.CombinedMarginLoss(margin_loss.s, margin_loss.m1, margin_loss.m2, margin_loss.m3)
    head = partial_fc_v2.PartialFC_V2(margin, cfg.embedding_size, cfg.num_classes, cfg.sample_rate, cfg.fp16)
    if cfg.softmax_ramp:
        schedule = Schedule.resident(margin_from(margin_loss), cfg.num_epoch * steps_per_epoch(cfg, 1))
        steps = itertools.count()

        def set_margin(*_: Any) -> None:
            now = schedule.margin_at(next(steps))
            margin.s, margin.m2, margin.m3 = now.scale, now.angular, now.additive
        head.register_forward_pre_hook(set_margin)
    return head.to(next(backbone.parameters()).device)


build.BUILT_IN_HEADS[PARTIAL_FC] = partial_fc


def score(result: Result) -> float:
    """What learning rates are chosen by."""
    if result.get("tar_1e-3") is not None:
        return result["tar_1e-3"]
    accuracies = [value for key, value in result.items() if key.startswith("accuracy_")]
    return float(np.mean(accuracies)) if accuracies else result["auc"] or 0.0


def on_device() -> Result:
    """The GPU that a run is trained on; nothing without one."""
    return {"device": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}


def provenance() -> Result:
    """The commit that is at work here, None outside a checkout, and the versions of what it works with."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    described = subprocess.run(command, capture_output=True, text=True) if shutil.which("git") else None
    return {"commit": described.stdout.strip() or None if described else None,
            "versions": {"f2c_plugin": f2c_plugin.__version__, "torch": torch.__version__, "numpy": np.__version__,
                         "python": platform.python_version()}}


class Comparison:
    """Runs of variants on one world.

    Args:
        arguments: of ``parsed``.
        variants: of ``parsed``.
        setting: what the results depend on beside the run, JSON; the same setting gives the same results.
        num_images: in a pass.
        train: from a run and a folder for its files to what it has measured.
        threads: of a run; None shares the CPUs among the jobs, unless OMP_NUM_THREADS is set.
    """

    def __init__(self, arguments: argparse.Namespace, variants: dict[str, Keys], setting: Result, num_images: int,
                 train: Callable[[Run, Path], Result], threads: int | None = None):
        self.arguments, self.variants, self.setting, self.train = arguments, variants, setting, train
        self.num_images = num_images
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.threads = threads or int(os.environ.get("OMP_NUM_THREADS", max(1, cpus // max(1, arguments.jobs))))
        self.failed: dict[Run, str] = {}
        self._results: dict[Run, Result] = {}

    def child(self, folder: Path) -> None:
        """Train the run that ``folder`` describes in this process, and write its result there."""
        torch.set_num_threads(self.threads)
        run = Run(**json.loads((folder / "run.json").read_text()))
        keys = self.variants[run.variant]
        result = run._asdict() | {
            "units": units(keys), "passes": round(run.steps * self.arguments.batch_size / self.num_images, 4),
            **self.train(run, folder), **on_device(), **provenance()}
        with written_whole(folder / "result.json") as file:
            file.write(json.dumps(result).encode())

    def folder(self, run: Run) -> Path:
        """A folder that runs of other settings do not share."""
        name = re.sub(r"\W+", "-", f"{run.variant} {run.steps} {run.lr:g} {run.seed}".replace("%", ""))
        settings = json.dumps([self.setting, self.variants[run.variant], run], sort_keys=True)
        digest = hashlib.sha256(settings.encode()).hexdigest()
        return self.arguments.work / f"{name}-{digest[:8]}"

    def results(self, runs: Iterable[Run]) -> None:
        """Have the results of these runs, or the reasons why there are none."""
        missing = [run for run in dict.fromkeys(runs) if run not in self._results and run not in self.failed]
        if not self.arguments.jobs:
            for run in missing:
                self._result(run)
            return
        with ThreadPoolExecutor(self.arguments.jobs) as pool:
            try:
                list(pool.map(self._result, missing))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _result(self, run: Run) -> None:
        folder = self.folder(run)
        if not (folder / "result.json").is_file():
            if folder.is_dir():
                shutil.rmtree(folder)  # of a run that was cut off, which begins anew, because its speed is measured, too
            folder.mkdir(parents=True)
            (folder / "run.json").write_text(json.dumps(run._asdict()))
            if error := self._train(run, folder):
                self.failed[run] = f"{folder}: {error}"
                print(f"{describe(run)}: failed: {self.failed[run]}", file=sys.stderr)
                return
        self._results[run] = result = json.loads((folder / "result.json").read_text())
        found = ", ".join(f"{key} {value:.2%}" for key, value in result.items()
                          if key.startswith(("accuracy_", "tar_")) and value is not None)
        print(f"{describe(run)}: {found}", file=sys.stderr)

    def _train(self, run: Run, folder: Path) -> str | None:
        """Train, in another process if there are jobs. Returns the error, if any."""
        if not self.arguments.jobs:
            try:
                return self.child(folder)
            except F2CError as error:
                return str(error)
        command = [sys.executable, *sys.argv, "--child", str(folder)]
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        with open(folder / "output.log", "w") as output:
            done = subprocess.run(command, stdout=output, stderr=output, env=environment)
        if not done.returncode:
            return None
        lines = (folder / "output.log").read_text(errors="replace").splitlines()
        return f"exit code {done.returncode}, output.log ends with: {lines[-1] if lines else ''}"

    def tables(self) -> list[Result]:
        """A table for each number of passes, at equal images and at equal compute.

        {"passes": of the full FC layer, "equal": "images" or "compute", "rows": {variant: {"by_lr": results of the first seed,
        "runs": results of all seeds with the learning rate that is best on the first}}}. Runs that failed are left out.
        """
        arguments = self.arguments
        steps_per_pass = self.num_images // arguments.batch_size
        cells = {(passes, equal, variant): steps_of(keys, passes, steps_per_pass, equal)
                 for passes in arguments.passes for equal in arguments.equal for variant, keys in self.variants.items()}
        self.results(Run(variant, steps, lr, 0) for (_, _, variant), steps in cells.items() for lr in arguments.lr)
        best: dict[tuple[str, int], float] = {}
        for (_, _, variant), steps in cells.items():
            tried = [found for lr in arguments.lr if (found := self._results.get(Run(variant, steps, lr, 0)))]
            if tried:
                best[variant, steps] = max(tried, key=score)["lr"]
        self.results(Run(*which, lr, seed) for which, lr in best.items() for seed in range(1, arguments.seeds))
        tables: list[Result] = [{"passes": passes, "equal": equal, "rows": {}}
                                for passes in arguments.passes for equal in arguments.equal]
        for table in tables:
            for variant in self.variants:
                steps = cells[table["passes"], table["equal"], variant]
                if (variant, steps) not in best:
                    continue
                by_lr = [self._results.get(Run(variant, steps, lr, 0)) for lr in arguments.lr]
                runs = [self._results.get(Run(variant, steps, best[variant, steps], seed)) for seed in range(arguments.seeds)]
                table["rows"][variant] = {"by_lr": [each for each in by_lr if each], "runs": [each for each in runs if each]}
        return tables


def describe(run: Run) -> str:
    return f"{run.variant}, {run.steps} steps, learning rate {run.lr:g}, seed {run.seed}"


def markdown(tables: Sequence[Result], columns: Sequence[Column], keep_empty: Sequence[Column] = ()) -> str:
    """The tables: means over the seeds ± standard deviations. Columns without a value are left out, unless kept."""
    lines: list[str] = []
    for (passes, rows), same in itertools.groupby(tables, lambda table: (table["passes"], table["rows"])):
        equal = " and ".join(f"equal {table['equal']}" for table in same)
        lines += [f"{passes:g} {'pass' if passes == 1 else 'passes'} of full FC, {equal}:", ""]
        runs = [run for row in rows.values() for run in row["runs"]]
        shown = [column for column in columns if column in keep_empty or column.values(runs)]
        lines += ["| head | " + " | ".join(column.heading for column in shown) + " |", "|---" * (len(shown) + 1) + "|"]
        for variant, row in rows.items():
            cells = [column.text(values) if (values := column.values(row["runs"])) else "" for column in shown]
            lines.append(f"| {variant} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main(comparison: Comparison, columns: Sequence[Column], keep_empty: Sequence[Column] = ()) -> list[Result]:
    """Compare, and ``report``."""
    tables = comparison.tables()
    report(comparison, tables, columns, keep_empty)
    return tables


def report(comparison: Comparison, tables: Sequence[Result], columns: Sequence[Column],
           keep_empty: Sequence[Column] = ()) -> None:
    """Print the tables, and write them to --json. Ends the process with an error if a run has failed."""
    arguments = comparison.arguments
    print(markdown(tables, columns, keep_empty))
    failed = [f"{describe(run)}: {error}" for run, error in comparison.failed.items()]
    if arguments.json:
        found = provenance() | {"setting": comparison.setting, "seeds": arguments.seeds, "failed": failed, "tables": tables}
        with written_whole(arguments.json) as file:
            file.write((json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())
    if failed:
        sys.exit("\n".join(["failed:", *failed]))
