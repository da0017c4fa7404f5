"""The loss of probe embeddings against the pool: margin softmax and hard negatives (paper, section 3.3)."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from f2c_plugin.method.margin import Margin
from f2c_plugin.method.pool import DynamicClassPool, PoolView
from f2c_plugin.method.pool_softmax import pool_softmax
from f2c_plugin.method.slots import NOT_IN_POOL


def default_hard_negatives(num_slots: int) -> int:
    """h = min(max(⌊0.0002 · K⌋, 3), 10)."""
    return min(max(num_slots // 5000, 3), 10)


class HalfStep(NamedTuple):
    """The probes of a half-step and the pool that they are compared with.

    Attributes:
        probes: (P, D) embeddings; normalised by the loss.
        labels: int64 (P,) their identities.
        all_labels: int64 (W·P,) those of the probes of all ranks.
        view: the pool with the gallery features of this half-step.
    """

    probes: Tensor
    labels: Tensor
    all_labels: Tensor
    view: PoolView


class PoolLoss(NamedTuple):
    """Loss of a step, and statistics, the mean over its half-steps. All float ().

    Attributes:
        loss: sum over half-steps and views, with gradient to the embeddings.
        pool_hit_rate: share of the probes whose identity is in the pool.
        positive_cosine: mean cosine of these to their target slots in view 1; NaN if there are none.
        hard_negative_cosine: mean cosine of the others to the h slots most like them, clipped below
            at 0, in view 1; NaN if there are none.
    """

    loss: Tensor
    pool_hit_rate: Tensor
    positive_cosine: Tensor
    hard_negative_cosine: Tensor


def pool_loss(half_steps: list[HalfStep], pool: DynamicClassPool, margin: Margin, num_hard_negatives: int,
              autocast: bool = False, quality: Tensor | None = None) -> PoolLoss:
    """Loss of every half-step's probes against both views of the pool.

    View 1 is row 0 of every slot; view 2 shows row 1 of the slots that have two keys. In each view,
    probes whose identity is in the pool take the margin softmax over the K slots, mean over them. The
    others are pushed off their h hardest negatives, mean over all of these. A term without probes is 0.

    All views of all half-steps agree on every slot except the few that a half-step writes. So the
    probes are scored once against the untouched slots, in one pass, and against the touched slots as
    each view shows them. The target slots count as touched, too, because they take the margin.
    Nothing is ever subtracted from a sum, so nothing can cancel.

    The pool may change before ``backward``: only copies of its rows are kept.

    Args:
        half_steps: with the same number of probes each.
        pool: the pool of their views, unchanged. If it is sharded, all ranks call this together.
        margin, num_hard_negatives: of this step; h.
        autocast: whether matrix products with the untouched slots run in the autocast type of the device.
        quality: (H·P,) of the images of all half-steps, for an adaptive margin.
    """
    probes = normalize(torch.stack([each.probes for each in half_steps]), dim=2)  # (H, P, D)
    slots = torch.stack([each.view.lookup(each.labels) for each in half_steps])  # (H, P)
    dtype = torch.get_autocast_dtype(probes.device.type) if autocast else probes.dtype

    touched = _touched_slots(half_steps, pool)  # (A,)
    views = _touched_rows(half_steps, touched, pool)  # (H, 2, A, D)
    untouched = _score_untouched(probes, touched, pool, margin, min(num_hard_negatives, pool.num_slots), dtype)
    target_cosine, others = _score_touched(probes, slots, touched, views, margin)  # (H, 2, P), (H, 2, P, A)
    if quality is not None:
        quality = quality.view(len(half_steps), 1, -1)
    return _combine(slots != NOT_IN_POOL, *untouched, target_cosine, others, margin, quality)


def _touched_slots(half_steps: list[HalfStep], pool: DynamicClassPool) -> Tensor:
    """Slots that a half-step writes or that a probe has as target, sorted, int64 (A,).

    May hold repetitions and NOT_IN_POOL, so that its length is fixed. The same on all ranks.
    """
    labels = torch.cat([each.labels if pool.shard.world_size == 1 else each.all_labels for each in half_steps])
    return torch.cat([pool.lookup(labels), *(each.view.assignment.slot for each in half_steps)]).sort().values


def _touched_rows(half_steps: list[HalfStep], touched: Tensor, pool: DynamicClassPool) -> Tensor:
    """The rows of the touched slots in both views of every half-step, (H, 2, A, D)."""
    rows = pool.rows_at(touched)  # (2, A, D)
    views: list[Tensor] = []
    for each in half_steps:
        index = torch.searchsorted(touched, each.view.assignment.slot)  # (B,), the first of equal ones
        seen = rows.clone()
        each.view.write_into(seen, index)
        has_two_keys = torch.zeros_like(touched, dtype=torch.bool)
        has_two_keys[index] = each.view.assignment.has_two_keys
        views.append(torch.stack([seen[0], torch.where(has_two_keys[:, None], seen[1], seen[0])]))
    return torch.stack(views)


def _score_untouched(probes: Tensor, touched: Tensor, pool: DynamicClassPool, margin: Margin, num_hardest: int,
                     dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Total of the untouched slots (H, P); the largest cosines (H, P, h), -inf where there are fewer."""
    is_touched = torch.zeros(pool.num_slots + 1, dtype=torch.bool, device=probes.device)  # the last is for NOT_IN_POOL
    is_touched.index_fill_(0, touched, True)
    flat = probes.flatten(0, 1)  # (H·P, D)
    found = pool_softmax(flat, pool.rows[0], is_touched[pool.first:pool.end], margin.scale, num_hardest,
                         margin.filter_threshold, dtype, pool.shard, pool.first, fused=pool.fused, weigh=margin.weigh)
    # Once more in full precision, and with gradient. Each rank looks up its own probes' slots.
    rows = pool.rows_at(pool.shard.gather(found.hardest).flatten(), 1)[0]  # (W·H·P·h, D)
    rows = rows.view(-1, *found.hardest.shape, rows.size(1))[pool.shard.rank]
    hardest = torch.einsum("bd,bhd->bh", flat, rows.to(flat.dtype))
    hardest = torch.where(found.hardest_cosine < -2, -torch.inf, hardest)
    if margin.filter_threshold > 0:  # decided in the pass: half precision may see another side of the threshold
        hardest = torch.where(found.hardest_cosine == 0, 0.0, hardest)
    return found.total.view(probes.shape[:2]), hardest.view(*probes.shape[:2], -1)


def _score_touched(probes: Tensor, slots: Tensor, touched: Tensor, views: Tensor, margin: Margin) -> tuple[Tensor, Tensor]:
    """Cosines to the target slots (H, 2, P), 0 where there is none; and to the other touched slots (H, 2, P, A), else -inf."""
    counted = touched != NOT_IN_POOL  # (A,), and of equal ones the first
    counted[1:] &= touched[1:] != touched[:-1]
    # Not in the autocast type: these are few, and the small gradients of a good net would vanish in float16.
    cosine = probes[:, None] @ views.mT.to(probes.dtype)  # (H, 1, P, D) @ (H, 2, D, A) -> (H, 2, P, A)
    is_target = (counted & (touched == slots[:, :, None]))[:, None]  # (H, 1, P, A)
    others = margin.filtered(cosine).masked_fill(is_target | ~counted, -torch.inf)
    return torch.where(is_target, cosine, 0).sum(3), others


def _combine(in_pool: Tensor, untouched: Tensor, hardest: Tensor, target_cosine: Tensor, others: Tensor,
             margin: Margin, quality: Tensor | None) -> PoolLoss:
    total = margin.joined(untouched[:, None], margin.total(others))  # (H, 2, P)
    positive = margin.loss(margin.target(target_cosine, quality), total)
    cosines = torch.cat([hardest[:, None].expand(-1, 2, -1, -1), others], 3)  # (H, 2, P, h + A)
    negative = cosines.topk(hardest.size(2), dim=3).values.clamp_min(0).mean(3)  # (H, 2, P)

    in_pool = in_pool[:, None]  # (H, 1, P)
    loss = _mean(positive, in_pool, least=1).sum() + _mean(negative, ~in_pool, least=1).sum()
    statistics = (in_pool.to(loss.dtype), _mean(target_cosine[:, :1], in_pool), _mean(negative[:, :1], ~in_pool))
    return PoolLoss(loss, *(each.detach().nanmean() for each in statistics))


def _mean(values: Tensor, chosen: Tensor, least: int = 0) -> Tensor:
    """Mean of the chosen of values (H, n, P), (H, n). Of none it is NaN, or 0 with ``least`` 1."""
    return torch.where(chosen, values, 0).sum(2) / chosen.sum(2).clamp(min=least)
