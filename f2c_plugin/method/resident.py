"""Resident classes: slots that learn (ours; the paper's slots hold features and do not learn).

A slot is the class weight of the identity that it belongs to, and takes gradient steps while the identity is in the pool.
With several sub-centres (Deng et al., ECCV 2020) it is several class weights, of which the one nearest to an image counts.
Weights of evicted identities are kept outside the GPU and come back with their identity. So the loss is that of a full FC
layer whose negatives are the K identities seen last.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from f2c_plugin.method.kept_weights import KeptWeights
from f2c_plugin.method.margin import Margin
from f2c_plugin.method.pool_softmax import PoolSoftmax, learn, pool_softmax
from f2c_plugin.method.slots import NOT_IN_POOL, Slots
from f2c_plugin.utils.distributed import WHOLE, Shard
from f2c_plugin.utils.replay import Number
from f2c_plugin.utils.sharded_rows import ShardedRows, all_rows_at
from f2c_plugin.utils.tensors import all_finite, at_least_float32, lengths, true_of_all

# Norm of a class weight that enters. Its first steps are large, as those of a full FC layer's weights, which begin with a
# norm of 0.01 · √D = 0.11 to 0.23; steps at right angles let the norm grow, so later ones are smaller.
FIRST_NORM = 0.2


class Arrival(NamedTuple):
    """What a batch of B images found in the pool.

    Attributes:
        slot: int64 (B,) the slot of each image's identity.
        rows: (B, C, D) the directions of its class weights, at least float32; 0 for sub-centres that it does not have yet.
        was_in_pool: bool (B,) whether the identity had a slot before.
        is_first: bool (B,) whether the image is the first that the pool has ever seen of its identity: the class weight is
            this image's own embedding.
        first: int64 (B,) the first entry of the same identity.
        evicted: int64 (B,) the identities that have lost their slots, and NOT_IN_POOL.
        num_not_finite: float32 () embeddings that are not finite.
    """

    slot: Tensor
    rows: Tensor
    was_in_pool: Tensor
    is_first: Tensor
    first: Tensor
    evicted: Tensor
    num_not_finite: Tensor


class _Lengths(ShardedRows):
    """Lengths of class weights: FIRST_NORM to begin with; infinite, so that it takes no steps, for one that is not there."""

    def _first_rows(self, num_rows: int, size: int, seed: int, dtype: torch.dtype) -> Tensor:
        made = torch.full((num_rows, self.end - self.first, size), FIRST_NORM, dtype=dtype)
        made[1:] = torch.inf
        return made

    def _are_valid(self, rows: Tensor) -> Tensor | bool:
        return true_of_all(rows, lambda found: found > 0)


class ResidentPool(Slots):
    """K slots, each the class weight of an identity, or several; assigned by exact LRU.

    Args: as of ``Slots``; and
        sub_centers: C, class weights of an identity. The first begins with its first image, each other one with the first
            image of a later batch.
        folder: of the file for the weights of the other identities; None keeps them in main memory. See ``KeptWeights``.

    Attributes:
        rows: (C, K', D) directions of the class weights, unit vectors, which are all that the loss uses.
        lengths: of the class weights, which make their steps small or large; infinite where there is none yet.
        kept: class weights of the identities that are not in the pool.
    """

    def __init__(self, num_slots: int, num_identities: int, embedding_size: int, seed: int = 0,
                 dtype: torch.dtype = torch.float32, shard: Shard = WHOLE, folder: Path | None = None,
                 sub_centers: int = 1):
        super().__init__(sub_centers, num_slots, num_identities, embedding_size, seed, dtype, shard)
        self.lengths = _Lengths(sub_centers, num_slots, 1, dtype=torch.promote_types(dtype, torch.float32), shard=shard)
        self.kept = KeptWeights(num_identities, sub_centers * embedding_size, dtype, shard, folder)

    @property
    def sub_centers(self) -> int:
        return len(self.rows)

    @property
    def absent(self) -> Tensor | None:
        """Which class weights are not there, bool (C, K'); None if there is one for each slot."""
        return self.lengths.rows[:, :, 0].isinf() if self.sub_centers > 1 else None

    @torch.no_grad()
    def admit(self, identities: Tensor, embeddings: Tensor) -> Arrival:
        """Give every identity of a batch a slot.

        One that comes back takes its old weight along; a new one begins with the embedding of its first image.

        Args:
            identities: int64 (B,) of all ranks, at most K different ones.
            embeddings: (B, D) unit vectors.
        """
        slot, was_in_pool, evicted, first, is_first = self.places(identities)
        # What the slots hold, and what is kept of the identities: (B, C, D), lengths (B, C, 1).
        shape, several = (len(identities), self.sub_centers, self.embedding_size), self.sub_centers > 1
        before, length_before, kept = all_rows_at((self, slot), (self.lengths, slot), (self.kept, identities))
        before, length_before, kept = before.view(shape), length_before[:, :, None], kept.view(shape)
        weight_before = length_before * before
        if several:
            weight_before.masked_fill_(length_before.isinf(), 0)
        # Where none is evicted, what is kept of the entry's own identity is written as it is.
        no_loss = evicted == NOT_IN_POOL
        self.kept.write(torch.where(no_loss, identities, evicted),
                        torch.where(no_loss[:, None, None], kept, weight_before).flatten(1))

        was_kept = kept.flatten(1).any(1)
        finite = all_finite(embeddings)
        # An embedding that is not finite leaves what the slot held, which is at least a direction.
        begin = torch.where(finite[:, None], embeddings, before[:, 0])[first]
        new = FIRST_NORM * begin[:, None]
        weight = torch.where(was_kept[:, None, None], kept, pad(new, (0, 0, 0, self.sub_centers - 1)) if several else new)
        length = lengths(weight)[..., None]
        direction = weight / length
        if several:
            absent = length == 0
            length, direction = length.masked_fill(absent, torch.inf), torch.where(absent, before, direction)
        stays = was_in_pool[:, None, None]
        length = torch.where(stays, length_before, length)
        rows = torch.where(stays, before, direction).to(self.rows.dtype)
        self.write(slot, rows.movedim(0, 1))
        self.lengths.write(slot, length.movedim(0, 1))
        self.occupy(identities, slot, evicted)
        rows = at_least_float32(rows)
        if several:
            rows = rows.masked_fill(length.isinf(), 0)
        return Arrival(slot, rows, was_in_pool, is_first & ~(was_in_pool | was_kept), first, evicted,
                       (~finite).sum(dtype=torch.float32))

    @torch.no_grad()
    def add_sub_centers(self, arrival: Arrival, embeddings: Tensor) -> None:
        """Give identities that lack a sub-centre one that begins with their first image in the batch, after its step.

        Args:
            arrival: of the batch.
            embeddings: (B, D) unit vectors.
        """
        has = arrival.rows.any(2)  # (B, C)
        which = has.sum(1)
        lacks = (which < self.sub_centers) & ~arrival.is_first[arrival.first] & all_finite(embeddings)
        entry, index, any_own = self.own_entries(arrival.slot)
        entry = arrival.first[entry]
        row = which[entry].clamp(max=self.sub_centers - 1)
        stays = ~(lacks[entry] & any_own)[:, None]
        self.rows[row, index] = torch.where(stays, self.rows[row, index], embeddings[entry].to(self.rows))
        self.lengths.rows[row, index] = torch.where(stays, self.lengths.rows[row, index], FIRST_NORM)

    def weights_at(self, slots: Tensor) -> Tensor:
        """Class weights of slots (A,), one after the other, (A, C·D), at least float32; 0 for those that are not there.

        All ranks call this together with the same slots.
        """
        directions, length = all_rows_at((self, slots), (self.lengths, slots))
        directions = directions.view(len(slots), self.sub_centers, -1)
        return torch.where(length.isinf()[:, :, None], 0, directions * length[:, :, None]).flatten(1)

    def invariants(self) -> dict[str, Tensor | bool]:
        return super().invariants() | {
            "class weights have a direction": true_of_all(self.rows, lambda rows: lengths(rows.float()) > 0.5),
            "lengths of class weights are finite and above 0": true_of_all(
                self.lengths.rows[0], lambda found: (found > 0) & found.isfinite()) and true_of_all(
                self.lengths.rows[1:], lambda found: found > 0)}


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
                  rate: Number, autocast: bool = False, quality: Tensor | None = None, seed: Number = 0,
                  judges: Tensor | None = None, left_out: Number = 0.0) -> ResidentLoss:
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
        judges: (P, D) other embeddings of the same images, unit vectors, whose losses decide which images have one.
        left_out: share of the images that have none, those whose judges' losses are the largest.
    """
    dtype = torch.get_autocast_dtype(probes.device.type) if autocast else probes.dtype
    is_first = arrival.is_first[own]
    ratio = (pool.num_identities - 1) / (pool.num_slots - 1) if pool.num_slots > 1 else 1.0

    def losses_of(embeddings: Tensor, others: PoolSoftmax) -> tuple[Tensor, Tensor]:
        """Losses (P,), and cosines to the own class weight (P,)."""
        rows = arrival.rows[own].to(embeddings.dtype)
        if pool.sub_centers == 1:
            positive = (embeddings * rows[:, 0]).sum(1)
        else:
            positive = (embeddings[:, None] * rows).sum(2).masked_fill(~rows.any(2), -torch.inf).amax(1)
        # The first image's target is that of itself, and has no gradient.
        target = margin.target(positive, quality).masked_fill(is_first, margin.own_target)
        return margin.loss(target, margin.standing_for(others.total, ratio)), positive

    def against_others(embeddings: Tensor, all_embeddings: Tensor | None, keep_logits: bool) -> PoolSoftmax:
        return pool_softmax(embeddings, pool.rows, pool.absent, margin.scale, 1, margin.filter_threshold, dtype, pool.shard,
                            pool.first, arrival.slot, pool.fused, all_embeddings, keep_logits, margin.weigh)

    share = torch.ones_like(probes[:, 0])  # of each image in the loss
    if judges is not None:
        judged, _ = losses_of(judges, against_others(judges, None, False))
        share = (judged.argsort().argsort() < (1 - left_out) * len(judged)).to(probes.dtype)
        share *= len(share) / share.sum()
    with torch.enable_grad():
        leaf = probes.detach().requires_grad_()
        others = against_others(leaf, all_probes, True)
        losses, positive = losses_of(leaf, others)
        gradient, to_positive, to_total = torch.autograd.grad(losses, [leaf, positive, others.total], share)
    with torch.no_grad():
        loss = (losses if judges is None else losses * share).mean()
        # What a slot weighs is what it weighs in the total times what the total does in the loss.
        log_denominator = -to_total.log() if margin.weigh else others.total - to_total.log()
        learn(pool.rows, pool.lengths.rows, all_probes, log_denominator, arrival.slot, to_positive / margin.scale, margin.scale,
              rate, margin.filter_threshold, dtype, pool.shard, pool.first, pool.fused, seed, others.logits, margin.weigh,
              pool.absent)
        if pool.sub_centers > 1:
            pool.add_sub_centers(arrival, all_probes)
        positive_cosine = positive.masked_fill(is_first, 0).sum() / (~is_first).sum()
    return ResidentLoss(loss, gradient / len(probes), positive_cosine, others.hardest_cosine.mean())
