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
from f2c_plugin.utils.tensors import all_finite, lengths, rounded_at_random, true_of_all, with_gradient

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
        slot, was_in_pool, evicted, first, is_first = self.places(identities)
        rows, before = self.rows_at(slot)[0], self.lengths.rows_at(slot)[0]  # what the slots hold
        kept = self.kept.rows_at(identities)[0]
        # Where none is evicted, what is kept of the entry's own identity is written as it is.
        none_evicted = evicted == NOT_IN_POOL
        self.kept.write(torch.where(none_evicted, identities, evicted), torch.where(none_evicted[:, None], kept, before * rows))

        was_kept = kept.any(1)
        finite = all_finite(embeddings)
        # An embedding that is not finite leaves what the slot held, which is at least a direction.
        begin = torch.where(finite[:, None], FIRST_NORM * embeddings, FIRST_NORM * rows)[first]
        row, length = self._parts(torch.where(was_kept[:, None], kept, begin), first)
        self.write(slot, torch.where(was_in_pool[:, None], rows.to(row.dtype), row))
        self.lengths.write(slot, torch.where(was_in_pool[:, None], before, length))
        self.occupy(identities, slot, evicted)
        return Arrival(slot, was_in_pool, is_first & ~was_in_pool & ~was_kept, evicted, (~finite).sum())

    def weights_at(self, slots: Tensor) -> Tensor:
        """Class weights of slots (A,), (A, D), at least float32. All ranks call this together with the same slots."""
        return self.rows_at(slots)[0] * self.lengths.rows_at(slots)[0]

    def put(self, slots: Tensor, weights: Tensor, first: Tensor) -> None:
        """Set the class weights of slots (A,) to (A, D). Of equal slots the entry at ``first`` counts, int64 (A,)."""
        row, length = self._parts(weights, first)
        self.write(slots, row)
        self.lengths.write(slots, length)

    def _parts(self, weights: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """Directions in the pool's type and lengths of the class weights (A, D) at ``first`` (A,).

        Half precision rounds at random, so entries that shall be equal are copied.
        """
        length = weights.norm(dim=1, keepdim=True)
        return rounded_at_random(weights / length, self.rows.dtype)[first], length[first]

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


def resident_loss(probes: Tensor, own: slice, arrival: Arrival, pool: ResidentPool, margin: Margin, rate: float,
                  autocast: bool = False, quality: Tensor | None = None, seed: int = 0) -> ResidentLoss:
    """Margin softmax of a rank's embeddings over the K slots; and a step of plain SGD of the class weights.

    The first image of an identity is its own target, without margin. Logits of other identities count log((N − 1) / (K − 1))
    more, so that the K slots stand for all N identities (as sampled softmax does; Jean et al., arXiv 1412.2007, section 3).

    As in ``pool_loss``, the slots that are a target of the batch are scored by themselves, and all others in one pass; a
    second pass makes their steps, once the denominators are known.

    Args:
        probes: (P, D) embeddings of this rank, unit vectors.
        own: which entries of ``arrival`` are this rank's.
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
    absent = math.log((pool.num_identities - 1) / (pool.num_slots - 1)) if pool.num_slots > 1 else 0.0

    targets = arrival.slot.sort().values  # (B,), with repetitions, so that its length is fixed
    first = torch.searchsorted(targets, targets)  # of equal ones the first counts
    bias = torch.full_like(targets, absent, dtype=probes.dtype).masked_fill_(first != torch.arange(
        len(targets), device=targets.device), -torch.inf)
    target = torch.searchsorted(targets, arrival.slot[own])[:, None]  # (P, 1)
    left_out = torch.zeros(pool.num_slots, dtype=torch.bool, device=probes.device).index_fill_(0, targets, True)
    left_out = left_out[pool.first:pool.end]

    with torch.enable_grad():
        leaf = probes.detach().requires_grad_()
        others = pool_softmax(leaf, pool.rows[0], left_out, margin.scale, 1, margin.filter_threshold, dtype, pool.shard,
                              pool.first, pool.fused)
        weights = pool.weights_at(targets).to(probes.dtype).requires_grad_()  # (B, D)
        cosine = (leaf.to(dtype) @ normalize(weights).to(dtype).T).to(probes.dtype)  # (P, D) @ (D, B) -> (P, B)
        positive = cosine.gather(1, target)  # (P, 1)
        # The first image's is 1, of itself, and has no gradient.
        own_logit = margin.scale * margin.target(positive[:, 0], quality).masked_fill(is_first, 1.0)
        logits = torch.add(bias, margin.filtered(cosine), alpha=margin.scale).scatter(1, target, own_logit[:, None])
        total = torch.logaddexp(others.log_sum_exp + absent, logits.logsumexp(1))
        loss = (total - own_logit).mean()
        to_probes, to_weights = torch.autograd.grad(loss, [leaf, weights])
    with torch.no_grad():
        to_weights = pool.shard.sum(to_weights.nan_to_num(0, 0, 0)) / pool.shard.world_size
        pool.put(targets, weights - rate * to_weights, first)
        learn(pool.rows[0], pool.lengths.rows[0], leaf, total - absent, left_out, margin.scale, rate, margin.filter_threshold,
              dtype, pool.shard, pool.first, pool.fused, seed)
        negatives = logits.scatter(1, target, -torch.inf).amax(1)
        hardest = torch.maximum(others.hardest_cosine[:, 0], (negatives - absent) / margin.scale)
        positive_cosine = positive[:, 0].masked_fill(is_first, 0).sum() / (~is_first).sum()
    return ResidentLoss(with_gradient(probes, loss.detach(), to_probes), positive_cosine, hardest.mean())
