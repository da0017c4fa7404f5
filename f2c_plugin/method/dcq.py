"""Dynamic Class Queue (DCQ; Li, Wang, Che, Zhang, Cai, CVPR 2021): class weights made from images, first in, first out."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from f2c_plugin.errors import ConfigError
from f2c_plugin.method.gallery_head import GalleryHead
from f2c_plugin.method.margin import Margin
from f2c_plugin.method.schedule import Schedule
from f2c_plugin.method.slots import NOT_IN_POOL, SlotTable
from f2c_plugin.utils.distributed import gather, this_rank
from f2c_plugin.utils.replay import Number
from f2c_plugin.utils.tensors import all_finite


class ClassQueue(SlotTable):
    """The class weights made last, at most Q, with their identities, of which one may have several.

    Args: as of ``SlotTable``, with one row a slot. All ranks hold all of it.
    """

    size_key = "f2c_queue_size"

    def __init__(self, size: int, num_identities: int, embedding_size: int, seed: int = 0,
                 dtype: torch.dtype = torch.float32):
        super().__init__(1, size, num_identities, embedding_size, seed, dtype)

    def require_room(self, num_images: int) -> None:
        if num_images > self.num_slots:
            raise ConfigError(f"f2c_queue_size={self.num_slots}: a gathered batch brings {num_images} class weights: raise it, "
                              "or lower the batch size")

    def enqueue(self, identities: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Put the weights (B, D) of identities int64 (B,) in the place of the oldest.

        A weight that is not finite leaves what was there. Returns how many entries left the queue, and how many weights were
        not finite, both ().
        """
        order = torch.arange(len(identities), device=identities.device)
        slot = (self.clock + order) % self.num_slots
        finite = all_finite(weights)
        left = self.slot_identity[slot] != NOT_IN_POOL
        self.rows[0, slot] = torch.where(finite[:, None], weights.to(self.rows), self.rows[0, slot])
        self.slot_identity[slot] = torch.where(finite, identities, self.slot_identity[slot])
        self.last_used[slot] = torch.where(finite | left, self.clock + order, self.last_used[slot])
        self.clock += len(identities)
        return (left & finite).sum(), (~finite).sum()


class DCQHead(GalleryHead):
    """Margin softmax over the own class weight and a queue of others.

    The gallery net makes the class weight of each identity of a batch from its image in x. A probe in y is compared with its
    own, and with those in the queue that are not of its identity; then the weights enter the queue. Images without a
    partner have no class weight: those in x enter the queue, those in y have no loss.

    Args:
        backbone, schedule, gradient_acc, autocast, hook: see ``GalleryHead``.
        pool: the queue.
        gallery_images: of how many images the own class weight is the mean, at most: that in x, and those of the identity
            that entered the queue last.
    """

    pool: ClassQueue

    def __init__(self, backbone: nn.Module, pool: ClassQueue, schedule: Schedule, gradient_acc: int = 1,
                 autocast: bool = False, hook: bool = True, gallery_images: int = 1):
        super().__init__(backbone, pool, schedule, False, gradient_acc, autocast, hook)
        self.gallery_images = gallery_images

    def _step(self, tensors: Sequence[Tensor], margin: Margin, rate: Number, seed: Number) -> list[Tensor]:
        probes, labels, features = tensors  # (B/2, D), (B,), (W, B/2, D)
        label_x, label_y = labels.chunk(2)
        weights = normalize(features, dim=2)
        quality = self.quality(probes) if self.quality else None
        with torch.enable_grad():
            leaf = probes.detach().requires_grad_()
            unit = normalize(leaf)
            same = self.pool.slot_identity == label_y[:, None]
            own = (unit * self._with_earlier(weights[this_rank()[0]], same)).sum(1)
            # Few enough to be held at once, and not in the autocast type, in which small gradients would vanish.
            others = (unit @ self.pool.rows[0].to(unit).T).masked_fill(same, -torch.inf)  # (B/2, Q)
            losses = margin.loss(margin.target(own, quality), margin.total(others))
            paired = label_x == label_y
            loss = torch.where(paired, losses, 0).sum() / paired.sum().clamp_min(1)
            gradient, = torch.autograd.grad(loss, leaf)
        positive = own.detach().masked_fill(~paired, torch.nan)
        left, not_finite = self.pool.enqueue(gather(label_x).flatten(), weights.flatten(0, 1))
        return [loss.detach(), gradient, same.any(1).float().mean(), positive.nanmean(), others.detach().amax(1).mean(),
                left.float(), not_finite.float(), loss.detach().isfinite().float()]

    def _with_earlier(self, weights: Tensor, same: Tensor) -> Tensor:
        """The means of class weights (B/2, D) with earlier ones of their identities, which ``same`` (B/2, Q) finds."""
        earlier = min(self.gallery_images - 1, self.pool.num_slots)
        if not earlier:
            return weights
        entered, at = torch.where(same, self.pool.last_used, -1).topk(earlier, 1)
        found = self.pool.rows[0, at].to(weights) * (entered >= 0)[..., None]  # (B/2, G − 1, D)
        return normalize(weights + found.sum(1), dim=1)
