"""Resident classes: slots that learn (ours; the paper's slots hold features and do not learn).

A slot is the class weight of the identity that it belongs to, and takes gradient steps while the identity is in the pool.
Weights of evicted identities are kept outside the GPU and come back with their identity. So the loss is that of a full FC
layer whose negatives are the K identities seen last.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from f2c_plugin.method.kept_weights import KeptWeights
from f2c_plugin.method.margin import Margin
from f2c_plugin.method.pool_softmax import learn, pool_softmax
from f2c_plugin.method.slots import NOT_IN_POOL, Slots
from f2c_plugin.utils.distributed import WHOLE, Shard
from f2c_plugin.utils.sharded_rows import ShardedRows
from f2c_plugin.utils.tensors import lengths, occurrences, rounded_at_random, true_of_all

# Norm of a class weight that enters. Its first steps are large, as those of a full FC layer's weights, which begin with a
# norm of 0.01 · √D = 0.11 to 0.23; steps at right angles let the norm grow, so later ones are smaller.
FIRST_NORM = 0.2


class Arrival(NamedTuple):
    """What a batch of B images found in the pool.

    Attributes:
        slot: int64 (B,) the slot of each image's identity.
        was_in_pool: bool (B,) whether the identity had a slot before.
        is_first: bool (B,) whether the image is the first that the pool has ever seen of its identity: the class weight is
            this image's own embedding.
        evicted: int64 (B,) the identities that have lost their slots, and NOT_IN_POOL.
        num_not_finite: int64 () embeddings that are not finite.
    """

    slot: Tensor
    was_in_pool: Tensor
    is_first: Tensor
    evicted: Tensor
    num_not_finite: Tensor


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
        self.lengths = ShardedRows(1, num_slots, 1, dtype=torch.promote_types(dtype, torch.float32), shard=shard)
        self.lengths.rows.fill_(FIRST_NORM)
        self.kept = KeptWeights(num_identities, embedding_size, dtype, shard, folder)

    @torch.no_grad()
    def admit(self, identities: Tensor, embeddings: Tensor) -> Arrival:
        """Give every identity of a batch a slot.

        One that comes back takes its old weight along; a new one begins with the embedding of its first image.

        Args:
            identities: int64 (B,) of all ranks, at most K different ones.
            embeddings: (B, D) unit vectors.
        """
        slot, was_in_pool, evicted = self.places(identities)
        occurrence, _, first, _ = occurrences(identities)
        before = self.weights_at(slot)
        self.kept.write(evicted, before)
        kept = self.kept.rows_at(identities)[0]
        is_new = ~was_in_pool & (kept == 0).all(1)
        finite = embeddings.isfinite().all(1)
        # An embedding that is not finite leaves what the slot held, which is at least a direction.
        begin = torch.where(finite[:, None], FIRST_NORM * embeddings, before)[first]
        self.put(torch.where(was_in_pool, NOT_IN_POOL, slot), torch.where(is_new[:, None], begin, kept), first)
        self.occupy(identities, slot, evicted)
        return Arrival(slot, was_in_pool, is_new & (occurrence == 0), evicted, (~finite).sum())

    def weights_at(self, slots: Tensor) -> Tensor:
        """Class weights of slots (A,), (A, D), at least float32. All ranks call this together with the same slots."""
        return self.rows_at(slots)[0] * self.lengths.rows_at(slots)[0]

    def put(self, slots: Tensor, weights: Tensor, first: Tensor) -> None:
        """Set the class weights of slots (A,), but for negative ones, to (A, D).

        Half precision rounds at random; so of equal slots only one entry counts, at ``first``, int64 (A,).
        """
        length = lengths(weights)[:, None]
        self.write(slots, rounded_at_random(weights / length, self.rows.dtype)[first])
        self.lengths.write(slots, length[first])

    def invariants(self) -> dict[str, Tensor | bool]:
        return super().invariants() | {
            "class weights have a direction": true_of_all(self.rows, lambda rows: lengths(rows.float()) > 0.5),
            "lengths of class weights are finite and above 0": true_of_all(
                self.lengths.rows, lambda found: (found > 0) & found.isfinite())}


class ResidentLoss(NamedTuple):
    """Loss of a step, and statistics over this rank's images. All float ().

    Attributes:
        loss: mean, with gradient to the embeddings.
        positive_cosine: mean cosine to the own class weight, of images that are not the first of their identity; NaN if
            there are none.
        hard_negative_cosine: mean of the largest cosines to other class weights.
    """

    loss: Tensor
    positive_cosine: Tensor
    hard_negative_cosine: Tensor


def resident_loss(embeddings: Tensor, own: slice, arrival: Arrival, pool: ResidentPool, margin: Margin, rate: float,
                  autocast: bool = False, quality: Tensor | None = None) -> ResidentLoss:
    """Margin softmax of a rank's embeddings over the K slots; and a step of plain SGD of the class weights.

    The first image of an identity is its own target, without margin. Logits of other identities count log((N − 1) / (K − 1))
    more, so that the K slots stand for all N identities (as sampled softmax does; Jean et al., arXiv 1412.2007, section 3).

    As in ``pool_loss``, the slots that are a target of the batch are scored by themselves, and all others in one pass; a
    second pass makes their steps, once the denominators are known.

    Args:
        embeddings: (P, D) of this rank, of any length.
        own: which entries of ``arrival`` are this rank's.
        arrival: of the batch of all ranks.
        pool: after ``admit``. Its class weights change.
        margin: of this step.
        rate: of the step of the class weights; that of a full FC layer's is the learning rate over (1 − momentum).
        autocast: whether matrix products run in the autocast type of the device.
        quality: (P,) of the images, for an adaptive margin.
    """
    probes = normalize(embeddings)
    dtype = torch.get_autocast_dtype(probes.device.type) if autocast else probes.dtype
    slot, is_first = arrival.slot[own], arrival.is_first[own]
    absent = math.log((pool.num_identities - 1) / (pool.num_slots - 1)) if pool.num_slots > 1 else 0.0

    targets = arrival.slot.sort().values  # (B,), with repetitions, so that its length is fixed
    counted = torch.ones_like(targets, dtype=torch.bool)  # of equal ones the first
    counted[1:] = targets[1:] != targets[:-1]
    is_target_slot = torch.zeros(pool.num_slots, dtype=torch.bool, device=probes.device).index_fill_(0, targets, True)
    left_out = is_target_slot[pool.first:pool.end]
    others = pool_softmax(probes, pool.rows[0], left_out, margin.scale, 1, margin.filter_threshold, dtype, pool.shard,
                          pool.first)

    with torch.enable_grad():
        weights = pool.weights_at(targets).to(probes.dtype).requires_grad_()  # (B, D)
        cosine = (probes.to(dtype) @ normalize(weights).to(dtype).T).to(probes.dtype)  # (P, D) @ (D, B) -> (P, B)
        is_own = counted & (targets == slot[:, None])
        positive = torch.where(is_own, cosine, 0).sum(1)
        target = margin.scale * torch.where(is_first, (probes * probes.detach()).sum(1), margin.target(positive, quality))
        negatives = margin.filtered(cosine).masked_fill(is_own | ~counted, -torch.inf)
        logits = [(others.log_sum_exp + absent)[:, None], margin.scale * negatives + absent, target[:, None]]
        total = torch.cat(logits, 1).logsumexp(1)
        loss = (total - target).mean()
        gradient, = torch.autograd.grad(loss, weights, retain_graph=True)
    with torch.no_grad():
        gradient = pool.shard.sum(gradient.nan_to_num(0, 0, 0)) / pool.shard.world_size
        pool.put(targets, weights - rate * gradient, torch.searchsorted(targets, targets))
        learn(pool.rows[0], pool.lengths.rows[0], probes, total - absent, left_out, margin.scale, rate, margin.filter_threshold,
              dtype, pool.shard)
        hardest = torch.maximum(others.hardest_cosine[:, 0], negatives.amax(1))
    return ResidentLoss(loss, torch.where(is_first, torch.nan, positive.detach()).nanmean(), hardest.mean())
