"""What every head with a pool is to a training loop: a loss, a count of steps, statistics, a state."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from f2c_plugin.errors import InputError
from f2c_plugin.method.gallery import GalleryNet
from f2c_plugin.method.margin import ImageQuality, Margin
from f2c_plugin.method.schedule import Schedule
from f2c_plugin.method.slots import SlotTable
from f2c_plugin.utils.distributed import this_rank
from f2c_plugin.utils.inputs import ImageHook, unwrapped
from f2c_plugin.utils.replay import Number, Replay
from f2c_plugin.utils.tensors import with_gradient, without_autocast


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

    def update(self, step: int, statistics: StepStatistics, pool: SlotTable, num_writes: int) -> None: ...


class PoolHead(nn.Module):
    """A head that takes the place of the classification layer and its loss.

    Args:
        backbone: the probe net as the training loop calls it, wrapped in DDP or not.
        pool: its slots.
        schedule: what changes from step to step.
        autocast: whether matrix products with the pool run in the autocast type.

    Attributes:
        quality: of images, if the margin follows it.
        gallery: the GalleryNet of a head that has one.
        steps: batches seen.
        statistics: StepStatistics of the last batch, or None.
        monitor: receives the statistics of every step, if set.
    """

    def __init__(self, backbone: nn.Module, pool: SlotTable, schedule: Schedule, autocast: bool = False):
        super().__init__()
        # Kept in a tuple so that the probe net is not registered as a submodule.
        self._probe_net = (unwrapped(backbone),)
        self.pool = pool
        self.schedule = schedule
        self.autocast = autocast
        self.quality = ImageQuality() if schedule.margin.adaptive else None
        self.steps: int = 0
        self.statistics: StepStatistics | None = None
        self.monitor: StepObserver | None = None
        self.gallery: GalleryNet | None = None
        self._hook: ImageHook | None = None  # takes images from the backbone's forward pass
        self._replay = Replay(self._step_with)

    @property
    def probe_net(self) -> nn.Module:
        return self._probe_net[0]

    @property
    def nets(self) -> dict[str, nn.Module]:
        """The nets that can be verified and exported, by name."""
        return {"probe": self.probe_net} | ({"gallery": self.gallery} if self.gallery else {})

    @abstractmethod
    def _step(self, tensors: Sequence[Tensor], margin: Margin, rate: Number, seed: Number) -> list[Tensor]:
        """What a step computes and changes: work of fixed shapes without a wait, so that a GPU can repeat it by itself.

        Args:
            tensors: embeddings (B, D), labels int64 (B,), and what else the head was given.
            margin, rate: of this step; see ``Schedule``.
            seed: another one in each step.
        Returns:
            The loss (), its gradient to the embeddings (B, D), and the tensors of StepStatistics in their order.
        """

    def _loss_of_step(self, tensors: Sequence[Tensor], num_writes: int) -> Tensor:
        """The loss of this step, with gradient to the first of ``tensors``; the step is counted and reported."""
        margin = self.schedule.margin_at(self.steps)
        numbers = *margin.numbers, self.schedule.slot_rate_at(self.steps), self.steps
        embeddings, *others = tensors
        inputs = embeddings.detach(), *others
        with without_autocast(embeddings.device.type):  # ``self.autocast`` alone decides
            # Kernels get the threshold of a filter as a number, which moves with the scale.
            if self.pool.fused and not margin.filter_threshold:
                state = [each for module in (self.pool, self.quality) if module for each in module.buffers()]
                constants = self.autocast, this_rank()[1], self.schedule.margin
                loss, gradient, *statistics = self._replay(inputs, numbers, state, constants)
            else:
                loss, gradient, *statistics = self._step_with(*inputs, *numbers)
        self.steps += 1
        self.report(StepStatistics(*statistics, scale=numbers[0]), num_writes)
        return with_gradient(embeddings, loss, gradient)

    def _step_with(self, *tensors_and_numbers: Any) -> list[Tensor]:
        *tensors, scale, angular, additive, rate, seed = tensors_and_numbers
        whole = self.schedule.margin
        margin = replace(whole, scale=scale, angular=angular if whole.angular else 0.0, additive=additive)
        return self._step(tensors, margin, rate, seed)

    def report(self, statistics: StepStatistics, num_writes: int):
        """Keep the statistics of a step that wrote ``num_writes`` features over all ranks, and show them to the monitor."""
        self.statistics = statistics
        if self.monitor:
            self.monitor.update(self.steps, statistics, self.pool, num_writes)

    def remove_hook(self):
        """Let go of the backbone, so that another head can be built on it."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor):
        if state < 0:
            raise InputError(f"the head cannot have seen {int(state)} batches")
        self.continue_at(int(state))

    def continue_at(self, step: int):
        """Count on from ``step`` batches. The gallery net has yet to follow the last of them."""
        self.steps = step
        if self.gallery:
            self.gallery.last_followed = max(step - 1, 0)
