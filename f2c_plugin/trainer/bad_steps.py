"""Steps whose gradient is not finite: they change nothing, are counted, and end the training if they persist."""

import logging
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from f2c_plugin.errors import TrainingDiverged

log = logging.getLogger(__name__)


class BadSteps:
    """Counts bad steps and takes back what they did to BatchNorm statistics.

    Args:
        limit: bad steps in a row that end the training (``config.f2c_max_bad_steps``).
        nets: whose BatchNorm statistics such a step would spoil.
    """

    def __init__(self, limit: int, nets: Iterable[nn.Module]):
        self.limit, self.in_a_row, self.total = limit, 0, 0
        self.buffers = [buffer for net in nets for buffer in net.buffers() if buffer.is_floating_point()]
        self.good = [buffer.clone() for buffer in self.buffers]

    def keep(self) -> None:
        """Take the statistics as they are for good: after states were loaded."""
        _copy(self.buffers, self.good)

    def update(self, step: int, gradient_norm: Tensor) -> bool:
        """Whether the step is bad.

        Raises:
            TrainingDiverged: too many bad steps in a row.
        """
        if torch.isfinite(gradient_norm):
            self.in_a_row = 0
            self.keep()
            return False
        _copy(self.good, self.buffers)
        self.in_a_row += 1
        self.total += 1
        log.info("step %d is skipped because its gradient is not finite (%d so far)", step, self.total)
        if self.in_a_row >= self.limit:
            raise TrainingDiverged(f"the gradient was not finite in {self.in_a_row} steps in a row, up to step {step} "
                                   f"(f2c_max_bad_steps={self.limit}): try a smaller lr or fp16=False. The nets are as they "
                                   "were before, and checkpoints stay")
        return True


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]  # one kernel for all of them
