"""What every head with a pool is to a training loop: a loss, a count of steps, statistics, a state."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from f2c_plugin.errors import InputError
from f2c_plugin.method.margin import ImageQuality
from f2c_plugin.method.schedule import Schedule
from f2c_plugin.method.slots import Slots
from f2c_plugin.utils.inputs import unwrapped


@dataclass(frozen=True)
class StepStatistics:
    """Statistics of one step on this rank; float () tensors on the device, which cost no wait.

    Attributes:
        pool_hit_rate: share of the images whose identity was in the pool.
        positive_cosine: mean cosine of images to their identity's slot.
        hard_negative_cosine: mean cosine of images to the slots most like them; in F2CHead of images without a slot.
        evictions: identities that lost their slots, over all ranks.
        not_finite: features that were not finite and so not written, over all ranks.
        finite: whether the loss is finite, 0 or 1.
        scale: s of this step, a number.
    """

    pool_hit_rate: Tensor
    positive_cosine: Tensor
    hard_negative_cosine: Tensor
    evictions: Tensor
    not_finite: Tensor
    finite: Tensor
    scale: float


class StepObserver(Protocol):
    """Receives the statistics of every step, as ``Monitor`` does."""

    def update(self, step: int, statistics: StepStatistics, pool: Slots, num_writes: int) -> None: ...


class PoolHead(nn.Module):
    """A head that takes the place of the classification layer and its loss.

    Args:
        backbone: the probe net as the training loop calls it, wrapped in DDP or not.
        pool: its slots.
        schedule: what changes from step to step.

    Attributes:
        quality: of images, if the margin follows it.
        steps: batches seen.
        statistics: StepStatistics of the last batch, or None.
        monitor: receives the statistics of every step, if set.
    """

    def __init__(self, backbone: nn.Module, pool: Slots, schedule: Schedule):
        super().__init__()
        # Kept in a tuple so that the probe net is not registered as a submodule.
        self._probe_net = (unwrapped(backbone),)
        self.pool = pool
        self.schedule = schedule
        self.quality = ImageQuality() if schedule.margin.adaptive else None
        self.steps: int = 0
        self.statistics: StepStatistics | None = None
        self.monitor: StepObserver | None = None

    @property
    def probe_net(self) -> nn.Module:
        return self._probe_net[0]

    @property
    def nets(self) -> dict[str, nn.Module]:
        """The nets that can be verified and exported, by name."""
        return {"probe": self.probe_net}

    def report(self, statistics: StepStatistics, num_writes: int):
        """Keep the statistics of a step that wrote ``num_writes`` features over all ranks, and show them to the monitor."""
        self.statistics = statistics
        if self.monitor:
            self.monitor.update(self.steps, statistics, self.pool, num_writes)

    def remove_hook(self):
        """Let go of the backbone, so that another head can be built on it."""

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor):
        if state < 0:
            raise InputError(f"the head cannot have seen {int(state)} batches")
        self.continue_at(int(state))

    def continue_at(self, step: int):
        """Count on from ``step`` batches."""
        self.steps = step
