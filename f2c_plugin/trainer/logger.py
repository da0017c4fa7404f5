"""The log of a training: progress bar, training.log, TensorBoard, history.jsonl and what else the config asks for."""

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TextIO, cast

import numpy as np
import torch
from torch import Tensor, distributed, nn
from tqdm import tqdm

from f2c_plugin.config import TrainConfig
from f2c_plugin.evaluation.model_selection import PREFIX, Results, verify
from f2c_plugin.evaluation.verification import VerificationSet
from f2c_plugin.trainer.output import PatientFile, checkpoints_in
from f2c_plugin.trainer.trackers import Trackers
from f2c_plugin.utils.atomic import written_whole
from f2c_plugin.utils.tensorboard import ScalarWriter

log = logging.getLogger(__name__)


class TrainingLog:
    """What rank 0 writes during a training. What an earlier one has left in the folder stays until the first step is done.

    Args:
        cfg: the config.
        total_steps: of the training.
        step: that it resumes from, or 0.
    """

    def __init__(self, cfg: TrainConfig, total_steps: int, step: int):
        self.cfg = cfg
        self.total_steps = total_steps
        self.images_per_step = cfg.batch_size * distributed.get_world_size()
        self.folder = Path(cfg.output)
        self.trackers = Trackers(cfg, step)
        if step:
            self._keep_history(step * self.images_per_step)
        self.history = PatientFile(self.folder / "history.jsonl", replaces=not step)
        self._scalars = self.folder / "tensorboard"
        replaced = not step and not self._scalars.is_symlink()  # a run's scalars do not mix with those of the run it replaces
        self._replaced = list(self._scalars.glob("events.out.tfevents.*")) if replaced else []
        self._resumed_at = step
        self.writer: ScalarWriter | None = None
        self._seconds_of_verification: float | None = None
        self.bar = tqdm(total=total_steps, initial=step, unit="step", disable=None, file=sys.stdout)
        self._start_interval(step)

    def _keep_history(self, images: int) -> None:
        """Keep the entries up to ``images``; later ones will be written again. A line that is none was torn by a kill."""
        file = self.folder / "history.jsonl"
        lines = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
        with written_whole(file) as new:
            for line in lines:
                with suppress(ValueError, KeyError, TypeError):
                    if line.endswith(b"\n") and json.loads(line)["images"] <= images:
                        new.write(line)

    def _begin(self) -> None:
        """Replace what an earlier training has left, once."""
        if self.writer:
            return
        for events in self._replaced:
            with suppress(IsADirectoryError, FileNotFoundError):
                events.unlink()
        self.writer = ScalarWriter(self._scalars, self._resumed_at)
        self.history.begin()
        for handler in logging.getLogger().handlers:
            if isinstance(handler, _LogFile):
                handler.lines.begin()

    def _start_interval(self, step: int) -> None:
        self.losses: list[Tensor] = []
        self.first_step, self.start = step, time.perf_counter()

    def update(self, step: int, loss: Tensor, learning_rate: float, head: nn.Module) -> None:
        """Take note of a step; every ``config.frequent`` steps log it."""
        self._begin()
        self.losses.append(loss)
        self.bar.update()
        if step % self.cfg.frequent:
            return
        seconds = time.perf_counter() - self.start
        scalars = {"loss": torch.stack(self.losses).mean().item(), "learning_rate": learning_rate,
                   "images_per_second": (step - self.first_step) * self.images_per_step / seconds}
        if not np.isfinite(scalars["loss"]):
            log.warning("the loss is %s at step %d: try a smaller lr or fp16=False", scalars["loss"], step)
        monitor = getattr(head, "monitor", None)
        self._record(step, scalars, monitor.scalars if monitor else {})
        self.bar.set_postfix(loss=f"{scalars['loss']:.3f}")
        left = self._left(step, seconds / (step - self.first_step))
        log.info("step %d: %s  left %s", step, "  ".join(f"{name} {value:.4g}" for name, value in scalars.items()), left)
        self._start_interval(step)

    def _left(self, step: int, seconds_a_step: float) -> str:
        """The time that is left. How long a verification takes is known after the first."""
        seconds = (self.total_steps - step) * seconds_a_step
        if not self.cfg.val_targets:
            return str(timedelta(seconds=round(seconds)))
        # The last comes after the last step; that of this step, if there is one, is yet to come.
        every = self.cfg.verbose
        verifications = (self.total_steps - 1) // every - (step - 1) // every + 1
        if self._seconds_of_verification is None:
            return f"{timedelta(seconds=round(seconds))} and {verifications} verification{'s' * (verifications > 1)}"
        return str(timedelta(seconds=round(seconds + verifications * self._seconds_of_verification)))

    def verify(self, step: int, nets: Mapping[str, nn.Module], sets: Mapping[str, VerificationSet]) -> Results:
        """Verify every net on every set, and log it."""
        self._begin()
        begin = time.perf_counter()
        results = verify(nets, sets, step, self.folder)
        for name in sets:
            scalars: dict[str, float] = {}
            for which, of_net in results.items():
                metrics = of_net[name].scalars() | of_net[name].geometry()
                scalars |= {f"{name}/{PREFIX[which]}{metric}": value for metric, value in metrics.items()}
            self._record(step, scalars)
        self._seconds_of_verification = time.perf_counter() - begin
        self.start += self._seconds_of_verification  # verification is not training
        return results

    def _record(self, step: int, scalars: Mapping[str, float], of_monitor: Mapping[str, float] | None = None) -> None:
        """Into the history; and into TensorBoard, unless the monitor has written it there itself."""
        finite = {name: value for name, value in {**scalars, **(of_monitor or {})}.items() if np.isfinite(value)}
        self.history.write(json.dumps({"step": step, "images": step * self.images_per_step, **finite}) + "\n")
        if self.writer:
            self.writer.write(step, scalars)
        self.trackers.write(step, finite)

    def close(self) -> None:
        """Raise OSError if the history could not be written."""
        self.bar.close()
        self.trackers.close()
        self.history.close()


class _TerminalHandler(logging.Handler):
    """Writes log lines above the progress bar instead of through it, for as long as there is a terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except OSError:  # a closed pipe, or a full disk behind it; training.log goes on
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _LogFile(logging.StreamHandler):
    """Writes log lines into a file."""

    def __init__(self, lines: PatientFile):
        super().__init__(cast(TextIO, lines))
        self.lines = lines


@contextmanager
def logging_to(folder: Path, resume: bool | str) -> Iterator[None]:
    """Log to the terminal and to ``training.log`` in ``folder``, which is continued if a training may go on there.

    An earlier log is replaced once the first step is done. Raises OSError if training.log could not be written.
    """
    lines = PatientFile(folder / "training.log", replaces=not (resume or checkpoints_in(folder)))
    handlers = [_TerminalHandler(), _LogFile(lines)]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers, force=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # that there is no room is the smaller trouble
            lines.close()
        raise
    else:
        lines.close()
    finally:
        for handler in handlers:
            logging.getLogger().removeHandler(handler)
