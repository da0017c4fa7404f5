"""The head of the recipe "resident": class weights in the pool, plain shuffled batches, no gallery net."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from f2c_plugin.errors import InputError
from f2c_plugin.method.margin import Margin
from f2c_plugin.method.pool_head import PoolHead
from f2c_plugin.method.resident import ResidentPool, resident_loss
from f2c_plugin.method.slots import NOT_IN_POOL
from f2c_plugin.utils.distributed import gather, this_rank
from f2c_plugin.utils.inputs import check_numbers, check_room, embeddings_in, identities_in
from f2c_plugin.utils.replay import Number
from f2c_plugin.utils.tensors import all_finite, at_least_float32


class ResidentHead(PoolHead):
    """Margin softmax over the identities seen last, each with a class weight that learns.

    Called as ``head(embeddings, labels)``. Batches are of any kind; plain shuffled ones learn best. The class weights
    take their steps during the call: the head has no parameters, and needs no optimizer.

    Args:
        backbone, schedule, autocast: see ``PoolHead``.
        pool: class weights; split over the ranks, if there are several.
    """

    pool: ResidentPool

    def forward(self, local_embeddings: Tensor, local_labels: Tensor, images: Tensor | None = None) -> Tensor:
        """Loss of a batch, and a step of the class weights.

        Args:
            local_embeddings: (B, D) of this rank's batch.
            local_labels: int64 (B,) identities.
            images: not needed; taken because other heads need them.
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
        check_room(num_writes, self.pool.num_identities, self.pool.num_slots)
        return self._loss_of_step((embeddings, labels), num_writes)

    def _step(self, tensors: Sequence[Tensor], margin: Margin, rate: Number, seed: Number) -> list[Tensor]:
        embeddings, labels = tensors
        rank = this_rank()[0]
        with torch.enable_grad():
            leaf = embeddings.detach().requires_grad_()
            probes = normalize(leaf)
        features = gather(probes.detach()).flatten(0, 1)  # (W·B, D)
        arrival = self.pool.admit(gather(labels).flatten(), features)
        own = slice(rank * len(labels), (rank + 1) * len(labels))
        quality = self.quality(embeddings) if self.quality else None
        result = resident_loss(probes, features, own, arrival, self.pool, margin, rate, self.autocast, quality, seed)
        gradient, = torch.autograd.grad(probes, leaf, result.gradient)
        return [result.loss, gradient, arrival.was_in_pool[own].mean(dtype=torch.float32), result.positive_cosine,
                result.hard_negative_cosine, (arrival.evicted != NOT_IN_POOL).sum(dtype=torch.float32),
                arrival.num_not_finite, all_finite(result.loss).float()]

    def put_class_weights(self, identities: Tensor, weights: Tensor) -> None:
        """Start from the weights (n, D) of identities int64 (n,), before the first batch. All ranks call this."""
        self.pool.kept.write(identities, weights)
