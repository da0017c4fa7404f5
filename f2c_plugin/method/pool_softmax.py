"""Log-sum-exp over the pool, its gradient and the hardest negatives, in one pass over the slots.

∂ log Σ exp(s·cos) / ∂ probe = s · Σ softmax · row is accumulated during the pass, chunk by chunk, and
nothing of size probes × slots outlives a chunk. Two matrix products: the logits of a chunk, and its
softmax times its rows. Slots that learn take a second pass, with two more: their logits again, now that
the whole denominators are known, and their softmax times the probes. On a GPU with Triton the kernels in
``fused`` make the passes; the operators here say what they compute.

Source: the online softmax of Milakov and Gimelshein, arXiv 1805.02867; in chunks with its product,
Rabe and Staats, arXiv 2112.05682.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from f2c_plugin.utils.distributed import WHOLE, Shard
from f2c_plugin.utils.replay import Number
from f2c_plugin.utils.tensors import (
    all_finite,
    at_least_float32,
    inverse_lengths,
    largest_of_columns,
    lengths as lengths_of,
    rounded_at_random,
    with_gradient,
)

# The logit of a slot that is left out: its exponential is 0. Finite, also in half precision, so that a chunk with no other
# slot has a softmax, too.
LEFT_OUT = -3e4

# Entries of a chunk of logits. On the CPU a chunk stays in the cache; a GPU needs work for each kernel.
CHUNK_ENTRIES = {"cpu": 1 << 19, "cuda": 1 << 24}

# Most entries of logits that a step keeps for ``learn``, which else makes them once more. On a GPU that is faster.
KEPT_LOGITS = {"cpu": 1 << 24}

# Where the fused kernels make the passes, and for which types of the products: in float32 PyTorch's own are faster.
FUSED_ON = {"cuda": (torch.float16, torch.bfloat16)}
_MULTIPROCESSORS = 132  # of an H100; an A100 has 108


class PoolSoftmax(NamedTuple):
    """The result of one pass over the slots, for each of B probes.

    Attributes:
        total: (B,) log Σ exp(s·cos) over the slots, or what ``weigh`` makes of it; with gradient to the probes.
        hardest: int64 (B, h) the slots of the largest cosines.
        hardest_cosine: (B, h) these cosines, without gradient; LEFT_OUT / s where there are fewer slots.
        logits: (K', W·B) for ``learn``, if they are kept.
    """

    total: Tensor
    hardest: Tensor
    hardest_cosine: Tensor
    logits: Tensor | None = None


def pool_softmax(probes: Tensor, rows: Tensor, left_out: Tensor | None, scale: Number, num_hardest: int,
                 filter_threshold: float = 0.0, dtype: torch.dtype | None = None, shard: Shard = WHOLE,
                 first_slot: int = 0, own_slot: Tensor | None = None, fused: bool = True,
                 all_probes: Tensor | None = None, keep_logits: bool = False,
                 weigh: Callable[[Tensor], Tensor] | None = None) -> PoolSoftmax:
    """Compare probes with every slot, except those that are left out. Of several rows of a slot the nearest counts.

    Args:
        probes: (B, D) unit vectors, float32 or float64.
        rows: (K', D) or (R, K', D) unit vectors of this rank's slots. There are fused kernels for one row.
        left_out: bool (K',) or (R, K') rows that do not count for any probe; None leaves out none.
        scale: s.
        num_hardest: h.
        filter_threshold: cosines above it count as 0; 0 is off.
        dtype: of the matrix products; None is that of the probes. All else is in that of the probes.
        shard: how the slots are split over ranks. Each rank passes its own probes, the same number as
            the others, and gets the result over the slots of all ranks.
        first_slot: the number of the first of this rank's slots.
        own_slot: int64 (W·B,) the slot, of all ranks' slots, that is left out for each probe of all ranks; None: no slot.
        fused: whether to use the fused kernels where they run.
        all_probes: (W·B, D) those of all ranks, if they are gathered already.
        keep_logits: whether slots will learn: the logits are kept, if they are few.
        weigh: from logits s·cos to weights that do without a softmax: the total is then Σ weight·s·cos, and its gradient takes
            the weights as constants. There is no fused kernel for it.
    """
    if all_probes is None:
        all_probes = shard.gather(probes.detach()).flatten(0, 1)
    dtype = dtype or probes.dtype
    rows = rows if rows.dim() == 3 else rows[None]
    kernels = _kernels(probes, dtype, fused and weigh is None and len(rows) == 1)
    threshold = float(scale) * filter_threshold if filter_threshold > 0 else 0.0
    table = (rows[0], left_out) if kernels else (rows, left_out)
    task = all_probes * scale, *table, own_slot, first_slot, threshold, num_hardest, dtype
    kept = None
    num_logits = rows.size(1) * len(all_probes)
    if keep_logits and not kernels and not threshold and len(rows) == 1 and are_kept(num_logits, rows.device.type):
        kept = all_probes.new_empty(rows.size(1), len(all_probes))
    total, mean_row, hardest, values = kernels.one_pass(*task) if kernels else _one_pass(*task, kept, weigh)
    if shard.world_size > 1:
        local = slice(shard.rank * len(probes), (shard.rank + 1) * len(probes))
        every = shard.gather(total)  # (W, W·B)
        if weigh is None:
            mean_row = mean_row * (total - every.logsumexp(0)).exp()[:, None]
        mean_row = shard.sum(mean_row)[local]
        total = (every.sum(0) if weigh else every.logsumexp(0))[local]
        found = torch.stack([hardest + first_slot, values.double()])  # float64 holds both exactly
        numbers, values = shard.gather(found)[:, :, local].movedim(0, 2).flatten(2)  # (B, W·h) each
        values, best = values.to(probes.dtype).topk(num_hardest, dim=1)
        hardest = numbers.gather(1, best).long()
    return PoolSoftmax(with_gradient(probes, total, scale * mean_row), hardest, values / scale, kept)


@torch.no_grad()
def learn(rows: Tensor, lengths: Tensor, probes: Tensor, log_denominator: Tensor, own_slot: Tensor, own_gradient: Tensor,
          scale: Number, rate: Number, filter_threshold: float = 0.0, dtype: torch.dtype | None = None, shard: Shard = WHOLE,
          first_slot: int = 0, fused: bool = True, seed: Number = 0, logits: Tensor | None = None,
          weigh: Callable[[Tensor], Tensor] | None = None, left_out: Tensor | None = None) -> None:
    """A step of plain SGD of the class weights, in place: the mean of the probes' losses falls at ``rate``.

    The gradient of a probe's loss to its cosine to a slot is s · exp(s·cos − log denominator), or with ``weigh`` s · weight ·
    exp(−log denominator), or what is given for its own slot. So a class weight's gradient is the sum of these times the
    probes, less its part along the weight, over the weight's length. Probes that are not finite are left out.

    Args:
        rows: (K', D) or (R, K', D) directions of the class weights of this rank's slots, unit vectors. Of several the nearest
            to a probe takes its step.
        lengths: (K', 1) or (R, K', 1) of the class weights.
        probes: (W·B, D) unit vectors, of all ranks that share the slots.
        log_denominator: (B,) of this rank's.
        own_slot: int64 (W·B,) the slot, of all ranks' slots, of each probe's identity.
        own_gradient: (B,) of the loss of this rank's probes to their cosine to that, over s.
        scale, filter_threshold, dtype, shard, first_slot, fused, weigh, left_out: as of ``pool_softmax``.
        seed: of the fused kernel's rounding; another one in each step.
        logits: (K', W·B) what ``pool_softmax`` has kept, if it has; used up.
    """
    log_denominator, own_gradient = shard.gather(torch.stack([log_denominator, own_gradient])).movedim(1, 0).flatten(1)
    not_finite = ~all_finite(probes + (log_denominator + own_gradient)[:, None])
    probes = probes.masked_fill(not_finite[:, None], 0)
    # Small probabilities are lifted to where half precision holds them, as far as the sum over the probes has room.
    lift = 2.0 ** (14 - len(probes).bit_length())
    log_denominator = (log_denominator - math.log(lift)).masked_fill_(not_finite, torch.inf)
    own_gradient = (lift * own_gradient).masked_fill_(not_finite, 0)
    dtype = dtype or probes.dtype
    rate = rate * scale / (lift * len(probes))
    factors = probes.to(dtype)
    rows, lengths = (each if each.dim() == 3 else each[None] for each in (rows, lengths))
    if kernels := _kernels(probes, dtype, fused and weigh is None and len(rows) == 1):
        return kernels.learn(rows[0], lengths[0], factors, log_denominator, own_slot, own_gradient, scale, rate, seed,
                             filter_threshold, first_slot)
    queries = (probes * scale).to(dtype)
    if logits is not None and not_finite.any():
        logits.masked_fill_(not_finite, 0)
    for chunk in _chunks(rows, max(len(probes), rows.size(2))):
        row = rows[:, chunk].flatten(0, 1).to(probes.dtype)  # (R·C, D)
        if logits is None:
            here, nearest, slots_last = _logits(queries, row.to(dtype), left_out, chunk, len(rows))
        else:
            here, nearest, slots_last = logits[chunk], None, False
        filtered = here > scale * filter_threshold if filter_threshold > 0 else None
        less = (log_denominator[:, None] if slots_last else log_denominator).to(here.dtype)
        weights = here.sub_(less).exp_() if weigh is None else weigh(here).mul_(less.neg().exp_())
        if filtered is not None:
            weights.masked_fill_(filtered, 0)
        _set_own(weights, slots_last, own_slot, first_slot + chunk.start, own_gradient)
        weights = _of_rows(weights, nearest, len(rows), slots_last)
        gradient = ((weights.T if slots_last else weights).to(dtype) @ factors).to(probes.dtype)  # (R·C, D), lifted, over s

        # The step at right angles to the direction, in units of the weight's length.
        inverse = inverse_lengths(row)  # of what half precision has left of the unit vector
        along = (gradient * row).sum(1, keepdim=True) * inverse
        length = lengths[:, chunk]
        step = rate / length.flatten(0, 1).to(probes.dtype).square()
        across = (lengths_of(gradient)[:, None].square() - along.square()).clamp(min=0)
        growth = (1 + step.square() * across).sqrt()
        row.mul_((1 + step * along) * inverse / growth).addcmul_(gradient, step / growth, value=-1)
        length *= growth.view_as(length)
        if row.dtype != rows.dtype or len(rows) > 1:  # else it is the chunk itself
            rows[:, chunk] = rounded_at_random(row, rows.dtype).view_as(rows[:, chunk])


def _kernels(probes: Tensor, dtype: torch.dtype, fused: bool) -> Any:
    """The module with the fused kernels, where they are wanted and run: for float32 probes, on a GPU, with Triton."""
    if not fused or dtype not in FUSED_ON.get(probes.device.type, ()) or probes.dtype != torch.float32:
        return None
    try:
        from f2c_plugin.method import fused as kernels
    except ImportError:  # PyTorch's packages for other systems come without Triton
        return None
    return kernels


def num_parts(num_slots: int, num_probes: int) -> int:
    """Into how many parts the fused kernel splits the slots: about a program for each multiprocessor of an H100.

    The same on every card, so that each adds in the same order, and `plan` needs none to know the working memory.
    """
    return max(1, min(_MULTIPROCESSORS * 64 // max(64, num_probes), num_slots // 1024))


def are_kept(logits: int, device: str) -> bool:
    """Whether so many logits are few enough to be kept for ``learn``."""
    return logits <= KEPT_LOGITS.get(device, 0)


def _chunks(rows: Tensor, width: int) -> Iterator[slice]:
    """Slices of the slots of rows (R, K', D), each of which fills a chunk with ``width`` numbers for every row."""
    size = max(1, CHUNK_ENTRIES[rows.device.type] // (len(rows) * width))
    return (slice(start, min(start + size, rows.size(1))) for start in range(0, rows.size(1), size))


def _logits(queries: Tensor, part: Tensor, left_out: Tensor | None, chunk: slice,
            num_rows: int) -> tuple[Tensor, Tensor | None, bool]:
    """Logits of queries (B, D) and a chunk of C slots with rows (R·C, D); the row of each slot that they are of, if R > 1; and
    whether slots are their last dimension.

    (C, B) on the CPU, whose matrix product is a third faster that way; there in float32 at least, because few CPUs compute in
    half precision. (B, C) elsewhere: a GPU reduces over the last dimension with all its threads.
    """
    slots_last = part.device.type != "cpu"
    bias = None
    if left_out is not None:
        absent = left_out[..., chunk].flatten()
        bias = torch.zeros_like(absent, dtype=part.dtype).masked_fill_(absent, LEFT_OUT)
    if slots_last:
        logits = linear(queries, part, bias)
    else:
        logits = at_least_float32(part @ queries.T.contiguous())
        logits = logits if bias is None else logits.add_(bias[:, None])
    if num_rows == 1:
        return logits, None, slots_last
    dim = int(slots_last)
    largest, nearest = torch.max(logits.view(*logits.shape[:dim], num_rows, -1, *logits.shape[dim + 1:]), dim)
    return largest, nearest, slots_last


def _of_rows(weights: Tensor, nearest: Tensor | None, num_rows: int, slots_last: bool) -> Tensor:
    """From the weights of slots to those of their rows, 0 for all but the nearest: the other way round of ``_logits``."""
    if nearest is None:
        return weights
    dim = int(slots_last)
    shape = list(weights.shape)
    shape.insert(dim, num_rows)
    return weights.new_zeros(shape).scatter_(dim, nearest.unsqueeze(dim), weights.unsqueeze(dim)).flatten(dim, dim + 1)


def _set_own(logits: Tensor, slots_last: bool, own_slot: Tensor, first: int, value: Tensor) -> None:
    """Set each probe's own slot in a chunk of ``_logits`` that begins with slot ``first`` to a value (B,), if it is there."""
    dim = int(slots_last)
    index = (own_slot - first).unsqueeze(dim)
    inside = (index >= 0) & (index < logits.size(dim))
    index = index.clamp(0, logits.size(dim) - 1)
    logits.scatter_(dim, index, torch.where(inside, value.unsqueeze(dim).to(logits.dtype), logits.gather(dim, index)))


def _one_pass(queries: Tensor, rows: Tensor, left_out: Tensor | None, own_slot: Tensor | None, first_slot: int,
              filter_threshold: float, num_hardest: int, dtype: torch.dtype, kept: Tensor | None = None,
              weigh: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(total (B,), softmax or weights · rows (B, D), indices (B, h) and values (B, h) of the largest logits).

    On the CPU the logits go into ``kept`` (K', B), too.
    """
    total = queries.new_full((len(queries),), -torch.inf if weigh is None else 0.0)
    mean_row = torch.zeros_like(queries)
    values = [queries.new_full((num_hardest, len(queries)), LEFT_OUT)]  # of each chunk
    hardest = [torch.zeros_like(values[0], dtype=torch.int64)]
    factors, nothing = queries.to(dtype), queries.new_full((len(queries),), LEFT_OUT)
    for chunk in _chunks(rows, len(queries)):
        part = rows[:, chunk].flatten(0, 1).to(dtype)  # (R·C, D)
        logits, nearest, slots_last = _logits(factors, part, left_out, chunk, len(rows))
        if kept is not None:
            kept[chunk] = logits
        filtered = logits > filter_threshold if filter_threshold > 0 else None
        if filtered is not None:
            logits.masked_fill_(filtered, 0)
        if own_slot is not None:
            _set_own(logits, slots_last, own_slot, first_slot + chunk.start, nothing)

        if slots_last:
            top, where = (found.T for found in logits.topk(min(num_hardest, logits.size(1))))  # (h, B)
        else:
            top, where = largest_of_columns(logits, num_hardest)  # (h, B)
        dim = int(slots_last)
        if weigh is None:
            weights = logits.softmax(dim)
            largest = weights.gather(dim, where[:1].movedim(0, dim)).squeeze(dim)
            here = top[0] - largest.to(queries.dtype).log()  # log-sum-exp of this chunk
            before, total = total, torch.logaddexp(total, here)
            mean_row *= (before - total).exp()[:, None]
            share = (here - total).exp()[:, None]
        else:
            weights = weigh(logits).masked_fill_(logits == LEFT_OUT, 0)
            total = total + (weights * logits).sum(dim).to(queries.dtype)
            share = 1.0
        if filtered is not None:
            weights.masked_fill_(filtered, 0)  # a constant has no gradient
        weights = _of_rows(weights, nearest, len(rows), slots_last)
        by_probe = (weights if slots_last else weights.T).to(dtype)
        mean_row += (by_probe @ part).to(queries.dtype) * share  # (B, R·C) @ (R·C, D)
        values.append(top.to(queries.dtype))
        hardest.append(where + chunk.start)
    largest, best = torch.cat(values).topk(num_hardest, dim=0)
    return total, mean_row, torch.cat(hardest).gather(0, best).T, largest.T
