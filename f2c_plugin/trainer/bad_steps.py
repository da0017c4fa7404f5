"""Steps whose gradient is not finite: they change nothing, are counted, and end the training if they persist."""

import logging
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from f2c_plugin.errors import TrainingDiverged
from f2c_plugin.utils.host_memory import left_behind

log = logging.getLogger(__name__)


class BadSteps:
    """Counts bad steps and takes back what they did to BatchNorm statistics.

    On a GPU a step is known to be bad when the next one ends, because to know it at once the CPU would have to wait. The
    statistics then go back to those before it, without what the next step has seen.

    Args:
        limit: bad steps in a row that end the training (``config.f2c_max_bad_steps``).
        nets: whose BatchNorm statistics such a step would spoil.
    """

    def __init__(self, limit: int, nets: Iterable[nn.Module]):
        self.limit, self.in_a_row, self.total = limit, 0, 0
        self.buffers = [buffer for net in nets for buffer in net.buffers() if buffer.is_floating_point()]
        self.good, self.last = ([buffer.clone() for buffer in self.buffers] for _ in range(2))
        self._unsettled: tuple[int, Callable[[], float]] | None = None  # a step, and whether it is bad

    def keep(self) -> None:
        """Take the statistics as they are for good: after states were loaded."""
        _copy(self.buffers, self.good)

    def update(self, step: int, gradient_norm: Tensor) -> Tensor:
        """Note a step after its backward pass. Returns whether it is bad, float32 () 0 or 1, on the device.

        Raises:
            TrainingDiverged: too many bad steps in a row.
        """
        bad = (~torch.isfinite(gradient_norm)).float()
        self.settle()
        _copy(self.buffers, self.last)
        self._unsettled = step, left_behind(bad)
        if not bad.is_cuda:
            self.settle()
        return bad

    def settle(self) -> None:
        """Count the last step, if it is yet to be, and take back what it did if it was bad. Raises TrainingDiverged."""
        if self._unsettled is None:
            return
        (step, is_bad), self._unsettled = self._unsettled, None
        if not is_bad():
            self.in_a_row = 0
            self.good, self.last = self.last, self.good
            return
        _copy(self.good, self.buffers)
        self.in_a_row += 1
        self.total += 1
        log.info("step %d is skipped because its gradient is not finite (%d so far)", step, self.total)
        if self.in_a_row >= self.limit:
            raise TrainingDiverged(f"the gradient was not finite in {self.in_a_row} steps in a row, up to step {step} "
                                   f"(f2c_max_bad_steps={self.limit}): try a smaller lr or fp16=False. The nets are as they "
                                   "were before, and checkpoints stay")


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    if sources:  # a net may have no buffers
        torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]  # one kernel for all of them
