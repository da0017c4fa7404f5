"""The loss of probe embeddings against the pool: margin softmax and hard negatives (paper, section 3.3)."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from f2c_plugin.config import ConfigError
from f2c_plugin.pool import NOT_IN_POOL, DynamicClassPool, occurrences
from f2c_plugin.pool_softmax import WithGradient, pool_softmax

# Keeps the slope of ArcFace's cos(θ + m), which has sin θ as divisor, finite at θ = 0.
_MIN_SIN_SQUARED = 1e-7


@dataclass(frozen=True)
class Margin:
    """The host's combined margin, ``config.margin_list`` (m1, m2, m3).

    (1, m2, 0) is ArcFace, cos(θ + m2); (1, 0, m3) with m3 > 0 is CosFace, cos θ − m3.
    Values are the host's. The gradient is the exact derivative, where the host's in-place
    ArcFace passes the target's gradient through unchanged.

    Attributes:
        scale: s.
        angular: m2 in radians.
        additive: m3.
        filter_threshold: cosines to other identities above it count as 0, for they are taken for
            mislabelled images (``config.interclass_filtering_threshold``); 0 is off.
    """

    scale: float
    angular: float = 0.0
    additive: float = 0.0
    filter_threshold: float = 0.0

    @classmethod
    def of_host(cls, margin_loss) -> "Margin":
        """Read the margin off the host's ``CombinedMarginLoss``.

        Raises:
            ConfigError: for a ``margin_list`` that the host refuses, too.
        """
        m1, m2, m3 = margin_loss.m1, margin_loss.m2, margin_loss.m3
        threshold = margin_loss.interclass_filtering_threshold
        if m1 == 1.0 and m3 == 0.0:
            return cls(margin_loss.s, angular=m2, filter_threshold=threshold)
        if m3 > 0:
            return cls(margin_loss.s, additive=m3, filter_threshold=threshold)
        raise ConfigError(f"margin_list=({m1}, {m2}, {m3}) is neither ArcFace (1, m2, 0) nor CosFace (1, 0, m3 > 0)")

    def scaled(self, scale: float, share: float) -> "Margin":
        """This margin with another scale and ``share`` of its margins."""
        return replace(self, scale=scale, angular=share * self.angular, additive=share * self.additive)

    def target(self, cosine: Tensor) -> Tensor:
        """The cosine to the own identity with the margin taken off."""
        if not self.angular:
            return cosine - self.additive
        sine = (1 - cosine * cosine).clamp_min(_MIN_SIN_SQUARED).sqrt()
        return cosine * math.cos(self.angular) - sine * math.sin(self.angular)

    def filtered(self, cosine: Tensor) -> Tensor:
        """Cosines to other identities, with 0 for those above the threshold."""
        return torch.where(cosine > self.filter_threshold, 0.0, cosine) if self.filter_threshold > 0 else cosine


def margin_softmax(cosine: Tensor, labels: Tensor, margin: Margin) -> Tensor:
    """Mean cross-entropy of s · cosines (B, K) with the margin on the labelled columns, scalar."""
    target = margin.target(cosine.gather(1, labels[:, None]))  # (B, 1)
    return cross_entropy(margin.scale * margin.filtered(cosine).scatter(1, labels[:, None], target), labels)


def default_hard_negatives(num_slots: int) -> int:
    """h = min(max(⌊0.0002 · K⌋, 3), 10)."""
    return min(max(num_slots // 5000, 3), 10)


class HalfStep(NamedTuple):
    """The probes of a half-step, and its pool where it is not like the other half-step's.

    Attributes:
        probes: (P, D) embeddings; normalised by the loss.
        slot: int64 (P,) slot of each probe's identity in this half-step, or NOT_IN_POOL.
        rows: (2, A, D) both rows of the slots apart, as this half-step has written them.
        renewed: bool (A,) which of these it has renewed.
        twins: (P, D) the gallery features of the probes' own images, or None to do without.
    """

    probes: Tensor
    slot: Tensor
    rows: Tensor
    renewed: Tensor
    twins: Tensor | None = None


class PoolLoss(NamedTuple):
    """Loss of a step, and what to watch, the mean over its half-steps. All float ().

    Attributes:
        loss: sum over half-steps and views; has the gradient to the embeddings.
        found: share of the probes whose identity is in the pool.
        positive_cosine: mean cosine of these to their own slots in view 1; NaN if there are none.
        hard_negative_cosine: mean cosine of the others to the h slots most like them, clipped below
            at 0, in view 1; NaN if there are none.
    """

    loss: Tensor
    found: Tensor
    positive_cosine: Tensor
    hard_negative_cosine: Tensor


def pool_loss(half_steps: list[HalfStep], apart: Tensor, pool: DynamicClassPool, margin: Margin,
              num_hard_negatives: int, autocast: bool = False, outside_weight: float = 1.0) -> PoolLoss:
    """Loss of every half-step's probes against both views of the pool.

    View 1 is row 0 of every slot; view 2 has row 1 for renewed slots. In each view, probes whose
    identity is in the pool take the margin softmax over the K slots, mean over them. The others
    are pushed off their h hardest negatives, mean over all of these; or, with twins, tell their own
    image from the K slots by a softmax without margin, mean over them (as MoCo, arXiv 1911.05722,
    equation 1). A term without probes is 0.

    All views of all half-steps agree on every slot but the few ``apart``: those that are written.
    So the probes of all half-steps go over the other slots together, once, and then over the slots
    apart as each view has them. The slots of the probes' own identities count as apart, too, for
    they take the margin. Nothing is ever subtracted from a sum, so nothing can cancel.

    The pool may change before ``backward``: the gradient is computed here.

    Args:
        half_steps: with equally many probes each.
        apart: int64 (A,) slots, at least all that any half-step writes or any probe has as its own;
            repeated ones and NOT_IN_POOL are allowed. The same on all ranks if the pool is sharded.
        pool: as any of the half-steps has it.
        margin: scale and margin to train with.
        num_hard_negatives: h.
        autocast: whether matrix products run in the autocast type of the device.
        outside_weight: factor of the term of probes whose identity is not in the pool.
    """
    device = apart.device
    is_apart = torch.zeros(pool.num_slots + 1, dtype=torch.bool, device=device)  # the last stands for NOT_IN_POOL
    is_apart[apart] = True
    counted = (apart != NOT_IN_POOL) & (occurrences(apart)[0] == 0)  # (A,)
    *known, twins = zip(*half_steps)
    embeddings, slot, rows, renewed = map(torch.stack, known)  # (H, P, D), (H, P), (H, 2, A, D), (H, A)
    dtype = torch.get_autocast_dtype(device.type) if autocast else embeddings.dtype
    with torch.enable_grad():
        inputs = embeddings.detach().requires_grad_()
        probes = normalize(inputs, dim=2)

        common = pool_softmax(probes.flatten(0, 1), pool.rows[0], is_apart[pool.first_slot:pool.end_slot], margin.scale,
                              min(num_hard_negatives, pool.num_slots), margin.filter_threshold, dtype,
                              pool.shard, pool.first_slot)
        hardest = torch.einsum("bd,bhd->bh", probes.flatten(0, 1), _rows_for_each(common.hardest, pool))
        hardest = torch.where(common.hardest_cosine < -2, -torch.inf, hardest)
        if margin.filter_threshold > 0:  # which ones it takes was decided in the pass: in half precision it may differ
            hardest = torch.where(common.hardest_cosine == 0, 0.0, hardest)

        views = torch.stack([rows[:, 0], torch.where(renewed[:, :, None], rows[:, 1], rows[:, 0])], 1)  # (H, 2, A, D)
        cosine = _product(probes[:, None], views.mT, dtype)  # (H, 1, P, D) @ (H, 2, D, A) -> (H, 2, P, A)
        own = (counted & (apart == slot[:, :, None]))[:, None]  # (H, 1, P, A)
        own_cosine = torch.where(own, cosine, 0).sum(3)  # (H, 2, P)
        others = margin.filtered(cosine).masked_fill(own | ~counted, -torch.inf)

        def softmax_loss(target):  # (H, n, P) logits, against the slots of both views -> (H, 2, P)
            target = target.expand(-1, 2, -1)
            logits = [_for_both_views(common.log_sum_exp, cosine), margin.scale * others, target[..., None]]
            return torch.cat(logits, 3).logsumexp(3) - target

        positive = softmax_loss(margin.scale * margin.target(own_cosine))
        negative = torch.cat([_for_both_views(hardest, cosine), others], 3).topk(hardest.size(1), dim=3).values
        negative = negative.clamp_min(0).mean(3)  # (H, 2, P)

        outside = negative
        if twins[0] is not None:
            twin_cosine = (probes * normalize(torch.stack(twins).nan_to_num(0, 0, 0), dim=2)).sum(2)  # (H, P)
            outside = softmax_loss(margin.scale * twin_cosine[:, None])

        found = (slot != NOT_IN_POOL)[:, None]  # (H, 1, P)
        loss = _mean(positive, found, least=1).sum() + outside_weight * _mean(outside, ~found, least=1).sum()
        gradient, = torch.autograd.grad(loss, inputs)
    watched = [values.detach().nanmean() for values in (found.to(loss.dtype), _mean(own_cosine[:, :1], found),
                                                        _mean(negative[:, :1], ~found))]
    return PoolLoss(WithGradient.apply(embeddings.flatten(0, 1), loss.detach(), gradient.flatten(0, 1)), *watched)


def _rows_for_each(slots, pool):
    """Rows 0 of slots (B, h) of this rank's own, (B, h, D)."""
    rows, = pool.rows_at(pool.shard.gather(slots).flatten(), 1)  # (W·B·h, D)
    return rows.view(-1, *slots.shape, rows.size(1))[pool.shard.rank]


def _for_both_views(found, cosine):
    """(B,) or (B, n) as (H, 2, P, n), beside cosines (H, 2, P, A)."""
    half_steps, _, probes, _ = cosine.shape
    return found.view(half_steps, 1, probes, -1).expand(-1, 2, -1, -1)


def _product(probes, columns, dtype):
    return (probes.to(dtype) @ columns.to(dtype)).to(probes.dtype)


def _mean(values, chosen, least=0):
    """Mean of the chosen of values (H, n, P), (H, n); of none, NaN, or with ``least`` 1, 0."""
    return torch.where(chosen, values, 0).sum(2) / chosen.sum(2).clamp(min=least)
