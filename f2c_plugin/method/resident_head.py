"""The head of the recipe "resident": class weights in the pool, plain shuffled batches, no gallery net."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from f2c_plugin.errors import InputError
from f2c_plugin.method.pool_head import PoolHead, StepStatistics
from f2c_plugin.method.resident import ResidentPool, resident_loss
from f2c_plugin.method.schedule import Schedule
from f2c_plugin.method.slots import NOT_IN_POOL
from f2c_plugin.utils.distributed import gather, this_rank
from f2c_plugin.utils.inputs import check_numbers, check_room, embeddings_in, identities_in
from f2c_plugin.utils.replay import Number, Replay
from f2c_plugin.utils.tensors import all_finite, at_least_float32, with_gradient, without_autocast


class ResidentHead(PoolHead):
    """Margin softmax over the identities seen last, each with a class weight that learns.

    Called as ``head(embeddings, labels)``. Batches are of any kind; plain shuffled ones learn best. The class weights
    take their steps during the call: the head has no parameters, and needs no optimizer.

    Args:
        backbone, schedule: see ``PoolHead``.
        pool: class weights; split over the ranks, if there are several.
        autocast: whether matrix products with the pool run in the autocast type.
    """

    pool: ResidentPool

    def __init__(self, backbone: nn.Module, pool: ResidentPool, schedule: Schedule, autocast: bool = False):
        super().__init__(backbone, pool, schedule)
        self.autocast = autocast
        self._replay = Replay(self._step)

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
        world_size = this_rank()[1]
        check_room(len(labels) * world_size, self.pool.num_identities, self.pool.num_slots)
        margin = self.schedule.margin_at(self.steps)
        numbers = *margin.numbers, self.schedule.slot_rate_at(self.steps), self.steps
        with without_autocast(embeddings.device.type):  # ``self.autocast`` alone decides
            # Kernels get the threshold of a filter as a number, which moves with the scale.
            if self.pool.fused and not margin.filter_threshold:
                loss, gradient, *statistics = self._replay((embeddings.detach(), labels), numbers, list(self.buffers()),
                                                          (self.autocast, world_size, self.schedule.margin))
            else:
                loss, gradient, *statistics = self._step(embeddings.detach(), labels, *numbers)
        self.steps += 1
        self.report(StepStatistics(*statistics, scale=numbers[0]), len(labels) * world_size)
        return with_gradient(embeddings, loss, gradient)

    def _step(self, embeddings: Tensor, labels: Tensor, scale: Number, angular: Number, additive: Number, rate: Number,
              seed: Number) -> list[Tensor]:
        """The loss (), its gradient to the embeddings (B, D), and the tensors of StepStatistics."""
        rank = this_rank()[0]
        whole = self.schedule.margin
        margin = replace(whole, scale=scale, angular=angular if whole.angular else 0.0, additive=additive)
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
