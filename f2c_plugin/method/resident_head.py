"""The head of the recipe "resident": class weights in the pool, plain shuffled batches, no gallery net."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from f2c_plugin.errors import InputError
from f2c_plugin.method.gallery import GalleryNet
from f2c_plugin.method.margin import Margin
from f2c_plugin.method.pool_head import PoolHead
from f2c_plugin.method.resident import ResidentPool, resident_loss
from f2c_plugin.method.schedule import Schedule
from f2c_plugin.method.slots import NOT_IN_POOL
from f2c_plugin.utils.distributed import gather, this_rank
from f2c_plugin.utils.inputs import ImageHook, check_numbers, embeddings_in, identities_in
from f2c_plugin.utils.replay import Number
from f2c_plugin.utils.tensors import all_finite, at_least_float32


class ResidentHead(PoolHead):
    """Margin softmax over the identities seen last, each with a class weight that learns.

    Called as ``head(embeddings, labels)``. Batches are of any kind; plain shuffled ones learn best. The class weights
    take their steps during the call: the head has no parameters, and needs no optimizer.

    With a ``forget_rate`` it leaves out images whose labels may be wrong (model and data agreement, arXiv 2212.01054): those of
    which the gallery net, the mean of the probe nets so far, makes the largest losses when it sees them mirrored. The images
    then come from the backbone's forward pass, or with ``images=``.

    Args:
        backbone, schedule, autocast: see ``PoolHead``.
        pool: class weights; split over the ranks, if there are several.
        forget_rate: share of a rank's batch that has no loss. It grows from 0 with the margin.
        gradient_acc, hook: see ``GalleryHead``; with a forget rate.
    """

    pool: ResidentPool

    def __init__(self, backbone: nn.Module, pool: ResidentPool, schedule: Schedule, autocast: bool = False,
                 forget_rate: float = 0.0, gradient_acc: int = 1, hook: bool = False):
        super().__init__(backbone, pool, schedule, autocast)
        self.forget_rate, self.gradient_acc = forget_rate, gradient_acc
        self._judges: Tensor | None = None
        if forget_rate:
            self.gallery = GalleryNet(self.probe_net)
            self._hook = ImageHook(backbone, self._take_images) if hook else None

    def forward(self, local_embeddings: Tensor, local_labels: Tensor, images: Tensor | None = None) -> Tensor:
        """Loss of a batch, and a step of the class weights.

        Args:
            local_embeddings: (B, D) of this rank's batch.
            local_labels: int64 (B,) identities.
            images: (B, 3, H, W), with a forget rate and without a hook; else not needed.
        Returns:
            Scalar, with gradient to the embeddings.
        Raises:
            InputError: embeddings or labels that do not fit each other or the pool. Wrong labels are noticed on the CPU
                only: reading them from a GPU would stall the step.
            ConfigError: a pool with fewer slots than the gathered batch may hold identities.
        """
        labels = identities_in(local_labels)
        embeddings = at_least_float32(embeddings_in(local_embeddings))
        if len(embeddings) != len(labels) or not len(labels):
            raise InputError(f"{len(embeddings)} embeddings and {len(labels)} labels: the head takes what the backbone made of "
                             "a batch, and a label for each image")
        check_numbers(embeddings, labels, self.pool.embedding_size, self.pool.num_identities)
        num_writes = len(labels) * this_rank()[1]
        self.pool.require_room(num_writes)
        return self._loss_of_step((embeddings, labels, *self._judging(images, len(labels))), num_writes)

    def _judging(self, images: Tensor | None, count: int) -> list[Tensor]:
        """[the gallery net's embeddings (B, D) of the mirrored images], with a forget rate; else []."""
        if self.gallery is None:
            return []
        if images is not None and self._hook is None:
            self._take_images(images)
        judges, self._judges = self._judges, None
        if judges is None or len(judges) != count:
            raise InputError(f"the head has seen {0 if judges is None else len(judges)} images for {count} labels: with a "
                             "forget rate it needs those that the backbone saw: images=images, or build it with hook=True "
                             "and call the backbone in training mode before it")
        return [judges]

    def _take_images(self, images: Tensor) -> Tensor:
        assert self.gallery
        self.gallery.follow_at(self.steps, self.probe_net, self.schedule.momentum, self.gradient_acc)
        self._judges = at_least_float32(self.gallery(images.flip(-1)))
        return images

    def _step(self, tensors: Sequence[Tensor], margin: Margin, rate: Number, seed: Number) -> list[Tensor]:
        embeddings, labels, *judges = tensors
        rank = this_rank()[0]
        with torch.enable_grad():
            leaf = embeddings.detach().requires_grad_()
            probes = normalize(leaf)
        features = gather(probes.detach()).flatten(0, 1)  # (W·B, D)
        arrival = self.pool.admit(gather(labels).flatten(), features)
        own = slice(rank * len(labels), (rank + 1) * len(labels))
        quality = self.quality(embeddings) if self.quality else None
        left_out = self.forget_rate * self.schedule.share_of(margin.scale) if judges else 0.0
        result = resident_loss(probes, features, own, arrival, self.pool, margin, rate, self.autocast, quality, seed,
                               *(normalize(each) for each in judges), left_out=left_out)
        gradient, = torch.autograd.grad(probes, leaf, result.gradient)
        return [result.loss, gradient, arrival.was_in_pool[own].mean(dtype=torch.float32), result.positive_cosine,
                result.hard_negative_cosine, (arrival.evicted != NOT_IN_POOL).sum(dtype=torch.float32),
                arrival.num_not_finite, all_finite(result.loss).float()]

    def put_class_weights(self, identities: Tensor, weights: Tensor) -> None:
        """Start from the weights (n, D) of identities int64 (n,), as their first sub-centres, before the first batch.

        All ranks call this.
        """
        self.pool.kept.write(identities, pad(weights, (0, self.pool.kept.rows.size(2) - weights.size(1))))
