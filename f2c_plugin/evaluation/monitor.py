"""Monitors the head during training: pool statistics, TensorBoard scalars, warnings that name the key to change."""

import logging
import math
from pathlib import Path

import torch

from f2c_plugin.errors import TrainingDiverged
from f2c_plugin.method.pool_head import StepStatistics
from f2c_plugin.method.resident import ResidentPool
from f2c_plugin.method.slots import NOT_IN_POOL, SlotTable
from f2c_plugin.utils.tensorboard import ScalarWriter

log = logging.getLogger(__name__)
SHORT_STAY = 3  # identities should stay in the pool for at least this many steps
STALE_SHARE, STALE_STEPS = 0.1, 100  # features older than both this share of the run and this many steps are stale
COSINE_FALL = 0.1  # a drop of the positive cosine below its best that is worth a warning


class Monitor:
    """Averages the statistics of steps. Every ``frequent`` steps it logs them, writes them to TensorBoard and checks them.

    The CPU waits for the GPU only then; nothing is read in between. Without a folder, TensorBoard gets nothing. Training
    ends after more than ``max_bad_steps`` steps in a row with a loss that is not finite (``config.f2c_max_bad_steps``);
    the built-in trainer checks gradients and ends earlier.
    """

    def __init__(self, frequent: int, total_steps: int, folder: Path | None = None, max_bad_steps: int = 50):
        self.frequent, self.total_steps, self.max_bad_steps = frequent, total_steps, max_bad_steps
        self.scalars: dict[str, float] = {}  # of the last log line
        self._bad_in_a_row = 0
        self._folder, self._writer = folder, None
        self._steps: list[StepStatistics] = []
        self._best_cosine = -1.0
        self._warned: set[str] = set()

    def update(self, step: int, statistics: StepStatistics, pool: SlotTable, num_writes: int) -> None:
        """Record a step, counted from 1, that wrote ``num_writes`` features over all ranks. Raises TrainingDiverged."""
        self._steps.append(statistics)
        if step % self.frequent:
            return
        self._count_bad_steps(step)
        values = self._read(pool, num_writes)
        self.scalars = {f"f2c/{name}": value for name, value in values.items()}
        self._steps = []
        log.info("F²C step %d: pool fill %.3f  pool hit rate %.3f  age %.1f steps  evictions %.1f  positive cosine %.3f  "
                 "hard-negative cosine %.3f  not finite %.0f  scale %.1f", step, values["pool_fill"], values["pool_hit_rate"],
                 values["age"], values["evictions"], values["positive_cosine"], values["hard_negative_cosine"],
                 values["not_finite"], values["scale"])
        self._judge(values, pool)
        self.record(step, self.scalars)

    def record(self, step: int, scalars: dict[str, float]) -> None:
        """Write scalars to TensorBoard."""
        if self._folder:
            self._writer, self._folder = ScalarWriter(self._folder), None
        if self._writer:
            self._writer.write(step, scalars)

    def _count_bad_steps(self, step: int) -> None:
        for finite in torch.stack([each.finite for each in self._steps]).tolist():
            self._bad_in_a_row = 0 if finite else self._bad_in_a_row + 1
        if self._bad_in_a_row > self.max_bad_steps:
            raise TrainingDiverged(f"the loss was not finite in {self._bad_in_a_row} steps in a row, up to step {step} "
                                   f"(f2c_max_bad_steps={self.max_bad_steps}): resume from an earlier checkpoint with a "
                                   "smaller lr or fp16=False")

    def _read(self, pool: SlotTable, num_writes: int) -> dict[str, float]:
        names = [name for name in vars(self._steps[0]) if name != "finite"]
        taken = pool.slot_identity != NOT_IN_POOL
        age = torch.where(taken, pool.clock - pool.last_used, 0).sum() / taken.sum() / num_writes
        averages: list[torch.Tensor] = []
        for name in names:
            column = torch.stack([torch.as_tensor(getattr(each, name), dtype=torch.float32, device=pool.rows.device)
                                  for each in self._steps])
            averages.append(column.sum() if name == "not_finite" else column.nanmean())
        values = torch.stack([*averages, pool.fill(), age]).tolist()  # waits for the GPU
        return dict(zip([*names, "pool_fill", "age"], values, strict=True))

    def _judge(self, values: dict[str, float], pool: SlotTable) -> None:
        if values["not_finite"]:
            log.warning("%d features were not finite and were not written into the pool: try a smaller lr or "
                        "fp16=False", values["not_finite"])
        slots_learn = isinstance(pool, ResidentPool)
        if not slots_learn:
            stay = pool.num_slots / max(values["evictions"], 1e-9)
            self._warn("stay", values["pool_fill"] == 1 and stay < SHORT_STAY,
                       f"identities stay in the pool for only {stay:.1f} steps before they are evicted: raise {pool.size_key}")
            self._warn("age", values["age"] > max(STALE_SHARE * self.total_steps, STALE_STEPS),
                       f"the features in the pool are {values['age']:.0f} steps old on average, of {self.total_steps} in all, "
                       f"and the net has changed since: lower {pool.size_key}")
        if not math.isnan(values["positive_cosine"]):
            self._best_cosine = max(self._best_cosine, values["positive_cosine"])
            self._warn("cosine", values["positive_cosine"] < self._best_cosine - COSINE_FALL,
                       f"the positive cosine has fallen from {self._best_cosine:.2f} to {values['positive_cosine']:.2f}: "
                       + ("the net may be diverging (lower lr)" if slots_learn else
                          "the gallery net may follow too slowly (lower f2c_momentum), or the net may be diverging (lower lr)"))

    def _warn(self, what: str, wrong: bool, message: str) -> None:
        """Warn once each time a value goes wrong."""
        if wrong and what not in self._warned:
            log.warning("%s", message)
        (self._warned.add if wrong else self._warned.discard)(what)
