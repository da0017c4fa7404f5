"""Resident classes: slots that learn (ours; the paper's slots hold features and do not learn).

A slot is the class weight of the identity that it belongs to, and takes gradient steps while the identity is in the pool.
Weights of evicted identities are kept outside the GPU and come back with their identity. So the loss is that of a full FC
layer whose negatives are the K identities seen last.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from f2c_plugin.method.kept_weights import KeptWeights
from f2c_plugin.method.margin import Margin
from f2c_plugin.method.pool_softmax import learn, pool_softmax
from f2c_plugin.method.slots import NOT_IN_POOL, Slots
from f2c_plugin.utils.distributed import WHOLE, Shard
from f2c_plugin.utils.replay import Number
from f2c_plugin.utils.sharded_rows import ShardedRows, first_rows_at
from f2c_plugin.utils.tensors import all_finite, at_least_float32, lengths, true_of_all

# Norm of a class weight that enters. Its first steps are large, as those of a full FC layer's weights, which begin with a
# norm of 0.01 · √D = 0.11 to 0.23; steps at right angles let the norm grow, so later ones are smaller.
FIRST_NORM = 0.2


class Arrival(NamedTuple):
    """What a batch of B images found in the pool.

    Attributes:
        slot: int64 (B,) the slot of each image's identity.
        rows: (B, D) the direction of its class weight, at least float32.
        was_in_pool: bool (B,) whether the identity had a slot before.
        is_first: bool (B,) whether the image is the first that the pool has ever seen of its identity: the class weight is
            this image's own embedding.
        evicted: int64 (B,) the identities that have lost their slots, and NOT_IN_POOL.
        num_not_finite: float32 () embeddings that are not finite.
    """

    slot: Tensor
    rows: Tensor
    was_in_pool: Tensor
    is_first: Tensor
    evicted: Tensor
    num_not_finite: Tensor


class _Lengths(ShardedRows):
    """Lengths of class weights, which all begin with FIRST_NORM."""

    def _first_rows(self, num_rows: int, size: int, seed: int, dtype: torch.dtype) -> Tensor:
        return torch.full((num_rows, self.end - self.first, size), FIRST_NORM, dtype=dtype)


class ResidentPool(Slots):
    """K slots, each the class weight of an identity; assigned by exact LRU.

    Args: as of ``Slots``; and
        folder: of the file for the weights of the other identities; None keeps them in main memory. See ``KeptWeights``.

    Attributes:
        rows: (1, K', D) directions of the class weights, unit vectors, which are all that the loss uses.
        lengths: of the class weights, which make their steps small or large.
        kept: class weights of the identities that are not in the pool.
    """

    def __init__(self, num_slots: int, num_identities: int, embedding_size: int, seed: int = 0,
                 dtype: torch.dtype = torch.float32, shard: Shard = WHOLE, folder: Path | None = None):
        super().__init__(1, num_slots, num_identities, embedding_size, seed, dtype, shard)
        self.lengths = _Lengths(1, num_slots, 1, dtype=torch.promote_types(dtype, torch.float32), shard=shard)
        self.kept = KeptWeights(num_identities, embedding_size, dtype, shard, folder)

    @torch.no_grad()
    def admit(self, identities: Tensor, embeddings: Tensor) -> Arrival:
        """Give every identity of a batch a slot.

        One that comes back takes its old weight along; a new one begins with the embedding of its first image.

        Args:
            identities: int64 (B,) of all ranks, at most K different ones.
            embeddings: (B, D) unit vectors.
        """
        slot, was_in_pool, evicted, first, is_first = self.places(identities)
        # What the slots hold, and what is kept of the identities.
        before, length_before, kept = first_rows_at((self, slot), (self.lengths, slot), (self.kept, identities))
        # Where none is evicted, what is kept of the entry's own identity is written as it is.
        no_loss = evicted == NOT_IN_POOL
        self.kept.write(torch.where(no_loss, identities, evicted), torch.where(no_loss[:, None], kept, length_before * before))

        was_kept = kept.any(1)
        finite = all_finite(embeddings)
        # An embedding that is not finite leaves what the slot held, which is at least a direction.
        begin = torch.where(finite[:, None], embeddings, before)[first]
        weight = torch.where(was_kept[:, None], kept, FIRST_NORM * begin)
        length = lengths(weight)[:, None]
        rows = torch.where(was_in_pool[:, None], before, weight / length).to(self.rows.dtype)
        self.write(slot, rows)
        self.lengths.write(slot, torch.where(was_in_pool[:, None], length_before, length))
        self.occupy(identities, slot, evicted)
        return Arrival(slot, at_least_float32(rows), was_in_pool, is_first & ~(was_in_pool | was_kept), evicted,
                       (~finite).sum(dtype=torch.float32))

    def weights_at(self, slots: Tensor) -> Tensor:
        """Class weights of slots (A,), (A, D), at least float32. All ranks call this together with the same slots."""
        directions, length = first_rows_at((self, slots), (self.lengths, slots))
        return directions * length

    def invariants(self) -> dict[str, Tensor | bool]:
        return super().invariants() | {
            "class weights have a direction": true_of_all(self.rows, lambda rows: lengths(rows.float()) > 0.5),
            "lengths of class weights are finite and above 0": true_of_all(
                self.lengths.rows, lambda found: (found > 0) & found.isfinite())}


class ResidentLoss(NamedTuple):
    """Loss of a step, and statistics over this rank's images. All float ().

    Attributes:
        loss: mean.
        gradient: (P, D) of the loss to the probes.
        positive_cosine: mean cosine to the own class weight, of images that are not the first of their identity; NaN if
            there are none.
        hard_negative_cosine: mean of the largest cosines to other class weights.
    """

    loss: Tensor
    gradient: Tensor
    positive_cosine: Tensor
    hard_negative_cosine: Tensor


def resident_loss(probes: Tensor, all_probes: Tensor, own: slice, arrival: Arrival, pool: ResidentPool, margin: Margin,
                  rate: Number, autocast: bool = False, quality: Tensor | None = None, seed: Number = 0) -> ResidentLoss:
    """Margin softmax of a rank's embeddings over the K slots; and a step of plain SGD of the class weights.

    The first image of an identity is its own target, without margin. Logits of other identities count log((N − 1) / (K − 1))
    more, so that the K slots stand for all N identities (as sampled softmax does; Jean et al., arXiv 1412.2007, section 3).

    A pass over the slots makes the denominators; a second one, once they are known, the steps of the class weights.

    Args:
        probes: (P, D) embeddings of this rank, unit vectors.
        all_probes: (W·P, D) of all ranks, without gradient.
        own: which of all are this rank's.
        arrival: of the batch of all ranks.
        pool: after ``admit``. Its class weights change.
        margin: of this step.
        rate: of the step of the class weights; that of a full FC layer's is the learning rate over (1 − momentum).
        autocast: whether matrix products run in the autocast type of the device.
        quality: (P,) of the images, for an adaptive margin.
        seed: another one in each step.
    """
    dtype = torch.get_autocast_dtype(probes.device.type) if autocast else probes.dtype
    is_first = arrival.is_first[own]
    ratio = (pool.num_identities - 1) / (pool.num_slots - 1) if pool.num_slots > 1 else 1.0

    with torch.enable_grad():
        leaf = probes.detach().requires_grad_()
        others = pool_softmax(leaf, pool.rows[0], None, margin.scale, 1, margin.filter_threshold, dtype, pool.shard,
                              pool.first, arrival.slot, pool.fused, all_probes, keep_logits=True, weigh=margin.weigh)
        positive = (leaf * arrival.rows[own].to(leaf.dtype)).sum(1)
        # The first image's is that of itself, and has no gradient.
        target = margin.target(positive, quality).masked_fill(is_first, margin.own_target)
        loss = margin.loss(target, margin.standing_for(others.total, ratio)).mean()
        gradient, to_positive, to_total = torch.autograd.grad(loss, [leaf, positive, others.total])
    with torch.no_grad():
        own_gradient = len(probes) / margin.scale * to_positive
        # What a slot weighs is what it weighs in the total times what the total does in the loss.
        log_denominator = -(len(probes) * to_total).log()
        if margin.weigh is None:
            log_denominator += others.total
        learn(pool.rows[0], pool.lengths.rows[0], all_probes, log_denominator, arrival.slot, own_gradient, margin.scale, rate,
              margin.filter_threshold, dtype, pool.shard, pool.first, pool.fused, seed, others.logits, margin.weigh)
        positive_cosine = positive.masked_fill(is_first, 0).sum() / (~is_first).sum()
    return ResidentLoss(loss.detach(), gradient, positive_cosine, others.hardest_cosine.mean())
