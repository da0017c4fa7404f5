"""What the head tells of itself while it trains: a line in the log, scalars, and warnings that name the key to turn."""

import logging
import math
from pathlib import Path

import torch

from f2c_plugin.pool import NOT_IN_POOL, DynamicClassPool

SHORT_STAY = 3  # steps; identities should stay in the pool at least so long
STALE_SHARE, STALE_STEPS = 0.1, 100  # of the run, and steps; features in the pool older than both are stale
COSINE_FALL = 0.1  # what the positives' cosine may lose against its best before it is worth a word


class NotLearning(ValueError):
    """A training that has gone wrong and will not come right."""


class Health:
    """Averages what steps see; every ``frequent`` steps logs it, hands it to TensorBoard and judges it.

    That is when the host waits for the GPU; between, nothing is read.

    Args:
        frequent: steps between two lines (``config.frequent``).
        total_steps: length of the run in steps.
        folder: where the TensorBoard scalars go; None for nowhere.
        max_bad_steps: more steps in a row than this, whose loss is not finite, end the training
            (``config.f2c_max_bad_steps``; the built-in host, which looks at gradients, is sooner).

    Attributes:
        scalars: {name: value} of the last line; empty before the first.
    """

    def __init__(self, frequent: int, total_steps: int, folder: Path | None = None, max_bad_steps: int = 50):
        self.frequent, self.total_steps, self.max_bad_steps = frequent, total_steps, max_bad_steps
        self._bad_in_a_row = 0
        self.scalars: dict[str, float] = {}
        self._folder, self._writer = folder, None
        self._seen = []
        self._best_cosine = -1.0
        self._warned = set()

    def see(self, step: int, statistics, pool: DynamicClassPool, writes: int):
        """Take note of a step.

        Args:
            step: counted from 1.
            statistics: the StepStatistics.
            pool: after the step.
            writes: gallery features that the step has written, over all ranks.
        Raises:
            NotLearning: one bad step too many.
        """
        self._seen.append(statistics)
        if step % self.frequent:
            return
        self._count_bad_steps(step)
        told = self._read(pool, writes)
        self.scalars = {f"f2c/{name}": value for name, value in told.items()}
        self._seen = []
        logging.info("F²C step %d: pool fill %.3f  found %.3f  age %.1f steps  evictions %.1f  positive cosine %.3f  "
                     "hard-negative cosine %.3f  not finite %.0f  scale %.1f", step, told["pool_fill"], told["found"],
                     told["age"], told["evictions"], told["positive_cosine"], told["hard_negative_cosine"],
                     told["not_finite"], told["scale"])
        self._judge(told, pool)
        self.record(step, self.scalars)

    def record(self, step: int, scalars: dict[str, float]):
        """Hand scalars to TensorBoard."""
        if self._folder:
            self._writer, self._folder = tensorboard_writer(self._folder), None
        if self._writer:
            for name, value in scalars.items():
                if not math.isnan(value):  # TensorBoard draws none
                    self._writer.add_scalar(name, value, step)
            self._writer.flush()  # nobody tells when training ends

    def _count_bad_steps(self, step):
        for finite in torch.stack([each.finite for each in self._seen]).tolist():
            self._bad_in_a_row = 0 if finite else self._bad_in_a_row + 1
        if self._bad_in_a_row > self.max_bad_steps:
            raise NotLearning(f"the loss was not finite in {self._bad_in_a_row} steps in a row, up to step {step} "
                              f"(f2c_max_bad_steps={self.max_bad_steps}): go on from a checkpoint that was written before, with "
                              "a smaller lr, or fp16=False")

    def _read(self, pool, writes):
        names = [name for name in vars(self._seen[0]) if name != "finite"]
        device = pool.rows.device
        columns = [torch.stack([torch.as_tensor(getattr(each, name), dtype=torch.float32, device=device)
                                for each in self._seen]) for name in names]
        taken = pool.slot_identity != NOT_IN_POOL
        age = torch.where(taken, pool.clock - pool.last_used, 0).sum() / taken.sum() / writes
        averages = [column.sum() if name == "not_finite" else column.nanmean() for name, column in zip(names, columns)]
        values = torch.stack([*averages, pool.fill(), age]).tolist()  # waits for the GPU
        return dict(zip([*names, "pool_fill", "age"], values))

    def _judge(self, told, pool):
        if told["not_finite"]:
            logging.warning("%d gallery features were not finite and were not written into the pool: a smaller lr, or "
                            "fp16=False, may help", told["not_finite"])
        stay = pool.num_slots / max(told["evictions"], 1e-9)
        self._warn("stay", told["pool_fill"] == 1 and stay < SHORT_STAY,
                   f"identities stay in the pool for only {stay:.1f} steps before they are evicted: raise f2c_pool_rate")
        self._warn("age", told["age"] > max(STALE_SHARE * self.total_steps, STALE_STEPS),
                   f"the features in the pool are {told['age']:.0f} steps old on average, of {self.total_steps} in all, "
                   "and the net has moved on since: lower f2c_pool_rate")
        if not math.isnan(told["positive_cosine"]):
            self._best_cosine = max(self._best_cosine, told["positive_cosine"])
            self._warn("cosine", told["positive_cosine"] < self._best_cosine - COSINE_FALL,
                       f"the positives' cosine has fallen from {self._best_cosine:.2f} to {told['positive_cosine']:.2f}: "
                       "the gallery net may follow too slowly (lower f2c_momentum) or the net be diverging (lower lr)")

    def _warn(self, what, wrong, message):
        """Once each time it goes wrong."""
        if wrong and what not in self._warned:
            logging.warning("%s", message)
        (self._warned.add if wrong else self._warned.discard)(what)


def tensorboard_writer(folder: Path, step: int = 0):
    """A SummaryWriter into ``folder``; None, with a warning, where TensorBoard is not installed.

    Args:
        step: that the training goes on from; TensorBoard drops what was written of later ones.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logging.warning("no TensorBoard scalars: pip install f2c-plugin[tensorboard]")
        return None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
