"""The F²C head as published: probe net, gallery net, pool and loss put together (paper, algorithm 1)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from f2c_plugin.method.gallery_head import GalleryHead
from f2c_plugin.method.loss import HalfStep, default_hard_negatives, pool_loss
from f2c_plugin.method.margin import Margin
from f2c_plugin.method.pool import DynamicClassPool
from f2c_plugin.method.schedule import Schedule
from f2c_plugin.method.slots import NOT_IN_POOL
from f2c_plugin.utils.distributed import gather
from f2c_plugin.utils.replay import Number


class F2CHead(GalleryHead):
    """The F²C loss of a batch. It takes the place of the classification layer and its loss.

    The first half-step has y as gallery and x as probe, and the pool forgets it; the second has x as gallery
    and y as probe, and its gallery features stay. Without ``symmetric`` there is only the second.

    Args:
        backbone, schedule, symmetric, gradient_acc, autocast, hook: see ``GalleryHead``.
        pool: the Dynamic Class Pool.
        num_hard_negatives: h; None derives it from the pool's size.
    Raises:
        ConfigError: as ``GalleryHead``.
    """

    pool: DynamicClassPool

    def __init__(self, backbone: nn.Module, pool: DynamicClassPool, schedule: Schedule, symmetric: bool = True,
                 num_hard_negatives: int | None = None, gradient_acc: int = 1, autocast: bool = False,
                 hook: bool = True):
        super().__init__(backbone, pool, schedule, symmetric, gradient_acc, autocast, hook)
        self.num_hard_negatives = num_hard_negatives or default_hard_negatives(pool.num_slots)

    def _step(self, tensors: Sequence[Tensor], margin: Margin, rate: Number, seed: Number) -> list[Tensor]:
        probes, labels, features = tensors
        quality = self.quality(probes) if self.quality else None
        with torch.enable_grad():
            leaf = probes.detach().requires_grad_()
            half_steps = self._half_steps(leaf, labels, features)
            result = pool_loss(half_steps, self.pool, margin, self.num_hard_negatives, self.autocast, quality)
            gradient, = torch.autograd.grad(result.loss, leaf)
        views = [each.view for each in half_steps]
        self.pool.commit(views[-1])
        loss = result.loss.detach()
        return [loss, gradient, result.pool_hit_rate, result.positive_cosine, result.hard_negative_cosine,
                (views[-1].assignment.evicted != NOT_IN_POOL).sum().float(),
                torch.stack([view.num_not_finite for view in views]).sum().float(), loss.isfinite().float()]

    def _half_steps(self, probes: Tensor, labels: Tensor, features: Tensor) -> list[HalfStep]:
        """The half-steps of a batch: all of them start from the pool as it is.

        ``features`` are those of the gallery net, (W, B, D), or of x alone (W, B/2, D).
        """
        label_x, label_y = labels.chunk(2)  # (B/2,)
        all_x, all_y = (half.flatten() for half in gather(labels).chunk(2, dim=1))  # (W·B/2,)
        if not self.symmetric:
            return [HalfStep(probes, label_y, all_y, self.pool.preview(all_x, features.flatten(0, 1)))]
        features_x, features_y = (half.flatten(0, 1) for half in features.chunk(2, dim=1))  # (W·B/2, D)
        probe_x, probe_y = probes.chunk(2)  # (B/2, D)
        return [HalfStep(probe_x, label_x, all_x, self.pool.preview(all_y, features_y)),
                HalfStep(probe_y, label_y, all_y, self.pool.preview(all_x, features_x))]
