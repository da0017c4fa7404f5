"""The F²C head as published: probe net, gallery net, pool and loss put together (paper, algorithm 1)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from f2c_plugin.errors import InputError
from f2c_plugin.method.gallery import GalleryNet
from f2c_plugin.method.loss import HalfStep, default_hard_negatives, pool_loss
from f2c_plugin.method.margin import Margin
from f2c_plugin.method.pool import DynamicClassPool
from f2c_plugin.method.pool_head import PoolHead
from f2c_plugin.method.schedule import Schedule
from f2c_plugin.method.slots import NOT_IN_POOL
from f2c_plugin.utils.distributed import gather, gather_meanwhile, this_rank
from f2c_plugin.utils.inputs import ImageHook, check_batch, check_room, embeddings_in, identities_in
from f2c_plugin.utils.replay import Number
from f2c_plugin.utils.tensors import at_least_float32


class F2CHead(PoolHead):
    """The F²C loss of a batch. It takes the place of the classification layer and its loss.

    Called as ``head(embeddings, labels, images=images)``; or, with ``hook=True``, as
    ``head(embeddings, labels)``: the images then come from a forward pre-hook on the backbone, which is
    silent in eval mode. The hook embeds them by the gallery net before the probe net runs, so that the
    gallery net's working memory is free again when the probe net begins to keep activations.

    A batch is two halves x and y, with two images of each identity of the pairs, one in each half. The
    first half-step has y as gallery and x as probe, and the pool forgets it; the second has x as gallery
    and y as probe, and its gallery features stay. Without ``symmetric`` there is only the second, and
    with the hook the probe net sees y alone.

    Args:
        backbone, schedule, autocast: see ``PoolHead``.
        pool: the Dynamic Class Pool.
        symmetric: whether to do both half-steps.
        num_hard_negatives: h; None derives it from the pool's size.
        gradient_acc: batches per optimizer step. The gallery net follows once per optimizer step.
        hook: whether the images come from the backbone's forward pass.

    Attributes:
        gallery: the GalleryNet.
    Raises:
        ConfigError: the backbone already has a head with a hook, or a copy of it would run the original.
    """

    pool: DynamicClassPool

    def __init__(self, backbone: nn.Module, pool: DynamicClassPool, schedule: Schedule, symmetric: bool = True,
                 num_hard_negatives: int | None = None, gradient_acc: int = 1, autocast: bool = False,
                 hook: bool = True):
        super().__init__(backbone, pool, schedule, autocast)
        self.gallery = GalleryNet(self.probe_net)
        self.symmetric = symmetric
        self.num_hard_negatives = num_hard_negatives or default_hard_negatives(pool.num_slots)
        self.gradient_acc = gradient_acc
        self._last_followed: int = 0  # the step before which the gallery net last followed
        # Number of images, and what returns the gallery features of all ranks: they are gathered while the probe net runs.
        self._hooked: tuple[int, Callable[[], Tensor]] | None = None
        self._hook = ImageHook(backbone, self._take_images) if hook else None

    @property
    def nets(self) -> dict[str, nn.Module]:
        return super().nets | {"gallery": self.gallery}

    def forward(self, local_embeddings: Tensor, local_labels: Tensor, images: Tensor | None = None) -> Tensor:
        """Loss of a batch.

        Args:
            local_embeddings: (B, D) of this rank's batch; if not symmetric, its second half is used, or (B/2, D) taken.
            local_labels: int64 (B,) identities.
            images: (B, 3, H, W) the batch; None with the hook.
        Returns:
            Scalar, with gradient to the embeddings.
        Raises:
            InputError: no images, an odd batch, or embeddings or labels that do not fit them or the pool. Wrong
                labels are noticed on the CPU only: reading them from a GPU would stall the step.
            ConfigError: a pool with fewer slots than the gathered batch may hold identities.
        """
        num_images, gather_features = self._gallery_features(images)
        labels = identities_in(local_labels)
        probes = at_least_float32(embeddings_in(local_embeddings))
        if not self.symmetric and len(probes) == num_images:
            probes = probes.chunk(2)[1]
        check_batch(num_images, probes, labels, self.symmetric, self.pool.embedding_size, self.pool.num_identities)
        num_writes = num_images // 2 * this_rank()[1]
        check_room(num_writes, self.pool.num_identities, self.pool.num_slots)
        return self._loss_of_step((probes, labels, gather_features()), num_writes)

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

    def _take_images(self, images: Tensor) -> Tensor:
        """What the hook does with a batch: its gallery features are gathered, and the probe images returned."""
        if len(images) < 2:
            raise InputError(f"a batch of {len(images)} images: F²C needs an even batch, gallery and probe")
        self._hooked = len(images), gather_meanwhile(self._embed(images))
        return images if self.symmetric else images.chunk(2)[1]

    def _gallery_features(self, images: Tensor | None) -> tuple[int, Callable[[], Tensor]]:
        """(B, what returns the gallery features of all ranks), of the images given or of those that the hook saw."""
        if images is not None:
            if self._hook is not None:
                raise InputError("the head already takes the images from the backbone's forward pass: leave out images=, or "
                                 "build the head with hook=False")
            return len(images), gather_meanwhile(self._embed(images))
        if self._hooked is None:
            raise InputError("the F²C head has seen no images: " + (
                "pass them, head(embeddings, labels, images=images)" if self._hook is None else
                "call the backbone in training mode before the head, once for each call of the head"))
        hooked, self._hooked = self._hooked, None
        return hooked

    def _embed(self, images: Tensor) -> Tensor:
        """Gallery features of the images that gallery features are needed of, after the gallery net has followed."""
        if self.steps > self._last_followed and self.steps % self.gradient_acc == 0:
            self.gallery.follow(self.probe_net, self.schedule.momentum)
            self._last_followed = self.steps
        return at_least_float32(self.gallery(images if self.symmetric else images.chunk(2)[0]))

    def remove_hook(self):
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def continue_at(self, step: int):
        """Count on from ``step`` batches. The gallery net has yet to follow the last of them."""
        super().continue_at(step)
        self._last_followed = max(step - 1, 0)
