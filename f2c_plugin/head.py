"""The F²C head: probe net, gallery net, pool and loss put together (paper, algorithm 1)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from f2c_plugin.gallery import GalleryNet
from f2c_plugin.health import Health
from f2c_plugin.loss import HalfStep, default_hard_negatives, pool_loss
from f2c_plugin.pool import NOT_IN_POOL, DynamicClassPool, at_least_float32
from f2c_plugin.ranks import gather
from f2c_plugin.recipe import Recipe


@dataclass
class StepStatistics:
    """What a step saw on this rank; float () tensors on the device, so that keeping them costs no wait.

    Attributes:
        found, positive_cosine, hard_negative_cosine: as in PoolLoss.
        evictions: identities that lost their slots to the write that stays, over all ranks.
        not_finite: gallery features, over all ranks, that were not finite and so not written.
        finite: whether the loss is, 0 or 1.
        scale: s of this step, a number.
    """

    found: Tensor
    positive_cosine: Tensor
    hard_negative_cosine: Tensor
    evictions: Tensor
    not_finite: Tensor
    finite: Tensor
    scale: float


class F2CHead(nn.Module):
    """The loss of a batch by F²C, in the place of arcface_torch's ``PartialFC_V2``.

    Called as ``head(local_embeddings, local_labels)`` after the backbone has embedded the batch.
    The images, which the gallery net needs, come from a forward pre-hook on the backbone; in eval
    mode the hook does nothing. With ``symmetric=False`` the hook hands only the second half of the
    batch on to the backbone, for only these are probes.

    A batch is two halves x and y. The first half-step has y as gallery and x as probe, its pool
    write is undone; the second has x as gallery and y as probe, and its write stays.

    Args:
        backbone: the probe net as the training loop calls it, in DDP or not.
        pool: the Dynamic Class Pool.
        recipe: margin and loss weight of each step.
        momentum: m of the gallery net, which the recipe may start lower.
        symmetric: whether to do both half-steps.
        num_hard_negatives: h; None takes it from the pool's size.
        gradient_acc: batches per optimizer step; the gallery net follows once for all of them.
        autocast: whether the matrix products with the pool run in the autocast type.

    Attributes:
        steps: batches seen.
        statistics: StepStatistics of the last batch, or None.
        health: is told of every step, if set.
    """

    def __init__(self, backbone: nn.Module, pool: DynamicClassPool, recipe: Recipe, momentum: float = 0.99,
                 symmetric: bool = True, num_hard_negatives: int | None = None, gradient_acc: int = 1,
                 autocast: bool = False):
        super().__init__()
        # In a tuple, for as a submodule the probe net would enter parameters() and state_dict().
        self._probe_net = (getattr(backbone, "module", backbone),)
        self.gallery = GalleryNet(self._probe_net[0])
        self.pool = pool
        self.recipe = recipe
        self.momentum = momentum
        self.symmetric = symmetric
        self.num_hard_negatives = num_hard_negatives or default_hard_negatives(pool.num_slots)
        self.gradient_acc = gradient_acc
        self.autocast = autocast
        self.steps = 0
        self.statistics: StepStatistics | None = None
        self.health: Health | None = None
        self._seen: tuple[int, Tensor] | None = None  # number of images, their gallery features
        self._followed = 0  # the step that the gallery net last followed before
        backbone.register_forward_pre_hook(self._see_images)

    def _see_images(self, backbone, args):
        """Embed the images by the gallery net before the probe net sees them.

        That way the memory it needs is free again when the probe net begins to keep activations.
        """
        if not backbone.training:
            return None
        images, *rest = args
        if len(images) < 2:
            raise ValueError(f"a batch of {len(images)} images: F²C needs an even batch, gallery and probe")
        if self.steps > self._followed and self.steps % self.gradient_acc == 0:
            self.gallery.follow(self._probe_net[0], self.recipe.momentum_at(self.steps, self.momentum))
            self._followed = self.steps
        self._seen = len(images), at_least_float32(self.gallery(images if self.symmetric else images.chunk(2)[0]))
        return None if self.symmetric else (images.chunk(2)[1], *rest)

    def forward(self, local_embeddings: Tensor, local_labels: Tensor) -> Tensor:
        """Loss of a batch.

        Args:
            local_embeddings: (B, D) of the images that the backbone was just called with on this
                rank; (B/2, D) of the second half if not symmetric.
            local_labels: int64 (B,) their identities.
        Returns:
            Scalar, with gradient to the embeddings.
        Raises:
            RuntimeError: the backbone was not called in training mode since the last call.
            ValueError: an odd batch, embeddings that are not the batch's or of another size than the pool's, or labels beyond
                num_classes (looked at on CPU only: on a GPU it would stall the step, and the loader
                has checked the pack).
        """
        if self._seen is None:
            raise RuntimeError("the F²C head has seen no images: call the backbone in training mode before the head, "
                               "once for each call of the head")
        (num_images, gallery), self._seen = self._seen, None
        labels = local_labels.reshape(-1).long()
        self._check(num_images, local_embeddings, labels)
        margin = self.recipe.margin_at(self.steps)
        embeddings = at_least_float32(local_embeddings)

        label_x, label_y = labels.chunk(2)  # (B/2,)
        all_x, all_y = gather(labels).chunk(2, dim=1)  # (W, B/2)
        # The gallery features of the probes' own images: there are none of y if not symmetric.
        twins = gallery.chunk(2) if self.symmetric and self.recipe.twins else (None, None)  # (B/2, D) each
        gallery = gather(gallery)  # (W, B, D), or of x alone (W, B/2, D)
        if self.symmetric:
            gallery_x, gallery_y = gallery.chunk(2, dim=1)  # (W, B/2, D)
            probe_x, probe_y = embeddings.chunk(2)  # (B/2, D)
            half_steps = [(all_y, gallery_y, label_x, probe_x), (all_x, gallery_x, label_y, probe_y)]
        else:
            half_steps = [(all_x, gallery, label_y, embeddings)]

        # Every half-step begins with the same pool, so all of them can be placed before any is written.
        placements = [self.pool.place(gallery_labels.flatten()) for gallery_labels, *_ in half_steps]
        own = self.pool.lookup(self.pool.shard.gather(labels).flatten())
        apart = torch.cat([own, *(placement.slot for placement in placements)])  # (A,)
        compared, write, not_finite = [], None, 0
        for placement, (_, gallery, probe_labels, probes), twin in zip(placements, half_steps, twins):
            if write:
                self.pool.undo(write)
            write = self.pool.write(placement, gallery.flatten(0, 1))
            not_finite = not_finite + write.num_skipped
            compared.append(HalfStep(probes, self.pool.lookup(probe_labels), self.pool.rows_at(apart),
                                     self.pool.renewed_at(apart, placement), twin))
        result = pool_loss(compared, apart, self.pool, margin, self.num_hard_negatives, self.autocast,
                           self.recipe.outside_weight)

        self.steps += 1
        self.statistics = StepStatistics(*result[1:], evictions=(write.placement.evicted != NOT_IN_POOL).sum().float(),
                                         not_finite=not_finite.float(),
                                         finite=result.loss.detach().isfinite().float(), scale=margin.scale)
        if self.health:
            self.health.see(self.steps, self.statistics, self.pool, len(write.placement.slot))
        return result.loss * self.recipe.loss_weight(2 * len(half_steps))

    def _check(self, num_images, embeddings, labels):
        if num_images % 2 or len(labels) != num_images:
            raise ValueError(f"a batch of {num_images} images and {len(labels)} labels: "
                             "F²C needs an even batch with a label for each image")
        if len(embeddings) != num_images // (1 if self.symmetric else 2):
            raise ValueError(f"{len(embeddings)} embeddings for {num_images} images with symmetric={self.symmetric}: "
                             "the head takes what the backbone made of the batch it saw last")
        if embeddings.size(1) != self.pool.rows.size(2):
            raise ValueError(f"embeddings of {embeddings.size(1)} numbers for a pool of {self.pool.rows.size(2)}: set "
                             "embedding_size to what the backbone gives")
        num_identities = self.pool.num_identities
        if labels.device.type == "cpu" and not 0 <= labels.min() <= labels.max() < num_identities:
            raise ValueError(f"labels from {labels.min()} to {labels.max()}, but num_classes={num_identities}: "
                             "identities are numbered from 0")

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor):
        if state < 0:
            raise ValueError(f"the head cannot have seen {int(state)} batches")
        self.continue_at(int(state))

    def continue_at(self, step: int):
        """Count on from ``step`` batches seen, of which the last is yet to be followed by the gallery net."""
        self.steps = step
        self._followed = max(step - 1, 0)
