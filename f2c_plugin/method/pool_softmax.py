"""Log-sum-exp over the pool, its gradient and the hardest negatives, in one pass over the slots.

∂ log Σ exp(s·cos) / ∂ probe = s · Σ softmax · row is accumulated during the pass, chunk by chunk, and
nothing of size probes × slots outlives a chunk. Two matrix products: the logits of a chunk, and its
softmax times its rows. Slots that learn take a second pass, with two more: their logits again, now that
the whole denominators are known, and their softmax times the probes.

Source: the online softmax of Milakov and Gimelshein, arXiv 1805.02867; in chunks with its product,
Rabe and Staats, arXiv 2112.05682.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from f2c_plugin.utils.distributed import WHOLE, Shard
from f2c_plugin.utils.tensors import inverse_lengths, largest_of_columns, rounded_at_random, with_gradient

# The logit of a slot that is left out. Finite, so that a chunk with no other slot has a softmax, too.
LEFT_OUT = -1e30

# Entries of a chunk of logits. On the CPU a chunk stays in the cache; a GPU needs work for each kernel.
CHUNK_ENTRIES = {"cpu": 1 << 19, "cuda": 1 << 24}


class PoolSoftmax(NamedTuple):
    """The result of one pass over the slots, for each of B probes.

    Attributes:
        log_sum_exp: (B,) of s·cos over the slots, with gradient to the probes.
        hardest: int64 (B, h) the slots of the largest cosines.
        hardest_cosine: (B, h) these cosines, without gradient; LEFT_OUT / s where there are fewer slots.
    """

    log_sum_exp: Tensor
    hardest: Tensor
    hardest_cosine: Tensor


def pool_softmax(probes: Tensor, rows: Tensor, left_out: Tensor, scale: float, num_hardest: int,
                 filter_threshold: float = 0.0, dtype: torch.dtype | None = None, shard: Shard = WHOLE,
                 first_slot: int = 0, unit_rows: bool = True) -> PoolSoftmax:
    """Compare probes with one row of every slot, except those that are left out.

    Args:
        probes: (B, D) unit vectors, float32 or float64.
        rows: (K', D) of this rank's slots.
        left_out: bool (K',).
        scale: s.
        num_hardest: h.
        filter_threshold: cosines above it count as 0; 0 is off.
        dtype: of the matrix products; None is that of the probes. All else is in that of the probes.
        shard: how the slots are split over ranks. Each rank passes its own probes, the same number as
            the others, and gets the result over the slots of all ranks.
        first_slot: the number of the first of this rank's slots.
        unit_rows: whether the rows are unit vectors. If not, their directions are compared.
    """
    all_probes = shard.gather(probes.detach()).flatten(0, 1)  # (W·B, D)
    bias = torch.where(left_out, LEFT_OUT, 0.0).to(probes.dtype)
    log_sum_exp, mean_row, hardest, values = _one_pass(all_probes, rows, bias, scale, filter_threshold, num_hardest,
                                                       dtype or probes.dtype, unit_rows)
    if shard.world_size > 1:
        local = slice(shard.rank * len(probes), (shard.rank + 1) * len(probes))
        every = shard.gather(log_sum_exp)  # (W, W·B)
        total = every.logsumexp(0)
        mean_row = shard.sum(mean_row * (log_sum_exp - total).exp()[:, None])[local]
        log_sum_exp = total[local]
        hardest, values = (shard.gather(found)[:, local].movedim(0, 1).flatten(1)
                           for found in (hardest + first_slot, values))  # (B, W·h)
        values, best = values.topk(num_hardest, dim=1)
        hardest = hardest.gather(1, best)
    return PoolSoftmax(with_gradient(probes, log_sum_exp, scale * mean_row), hardest, values / scale)


@torch.no_grad()
def learn(rows: Tensor, probes: Tensor, log_denominator: Tensor, left_out: Tensor, scale: float, rate: float,
          filter_threshold: float = 0.0, dtype: torch.dtype | None = None, shard: Shard = WHOLE) -> None:
    """A step of plain SGD of the rows, in place: the mean of the probes' losses falls at ``rate``.

    A probe's loss is log Σ exp(s·cos) over all slots, those left out among them, so that a slot's gradient is
    s · softmax · probe, less its part along the row, over the row's norm. Probes that are not finite are left out.

    Args:
        rows: (K', D) of this rank's slots; only their directions are compared.
        probes: (B, D) unit vectors of this rank.
        log_denominator: (B,) log Σ exp(s·cos) over the slots of all ranks, as it counts for the slots of ``rows``.
        left_out: bool (K',) slots that take no step.
        scale, filter_threshold, dtype, shard: as of ``pool_softmax``.
    """
    all_probes = shard.gather(probes).flatten(0, 1)  # (W·B, D)
    log_denominator = shard.gather(log_denominator).flatten()
    finite = log_denominator.isfinite() & all_probes.isfinite().all(1)
    all_probes = torch.where(finite[:, None], all_probes, 0)
    log_denominator = torch.where(finite, log_denominator, torch.inf)
    dtype = dtype or probes.dtype
    factors = all_probes.to(dtype).T.contiguous()  # (D, W·B)
    for chunk in _chunks(rows, max(len(all_probes), rows.size(1))):
        row = rows[chunk].to(probes.dtype)
        inverse = inverse_lengths(row)  # (C, 1)
        # (C, D) @ (D, W·B) -> (C, W·B). Scaled afterwards: long rows times s would be more than half precision holds.
        logits = (row.to(dtype) @ factors).to(probes.dtype).mul_(scale * inverse)
        takes_no_step = left_out[chunk, None]
        if filter_threshold > 0:
            takes_no_step = takes_no_step | (logits > scale * filter_threshold)
        softmax = logits.sub_(log_denominator).exp_().masked_fill_(takes_no_step, 0)
        # row − rate · s / (n · |row|) · (gradient − its part along the row), so that the matrices are passed over least.
        gradient = (softmax.to(dtype) @ factors.T).to(probes.dtype)  # (C, W·B) @ (W·B, D) -> (C, D), over s
        step = rate * scale / len(all_probes) * inverse
        along = torch.einsum("cd,cd->c", gradient, row)[:, None] * inverse.square()
        row.mul_(1 + step * along).addcmul_(gradient, step, value=-1)
        if row.dtype != rows.dtype:  # else it is the chunk itself
            rows[chunk] = rounded_at_random(row, rows.dtype)


def _chunks(rows: Tensor, width: int) -> Iterator[slice]:
    """Slices of the rows, each of which fills a chunk with ``width`` numbers for every row."""
    size = max(1, CHUNK_ENTRIES[rows.device.type] // width)
    return (slice(start, min(start + size, len(rows))) for start in range(0, len(rows), size))


def _one_pass(probes: Tensor, rows: Tensor, bias: Tensor, scale: float, filter_threshold: float, num_hardest: int,
              dtype: torch.dtype, unit_rows: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-sum-exp (B,), softmax · directions of the rows (B, D), indices and values of the largest logits (B, h))."""
    log_sum_exp = probes.new_full((len(probes),), -torch.inf)
    mean_row = torch.zeros_like(probes)
    values = [probes.new_full((num_hardest, len(probes)), LEFT_OUT)]  # of each chunk
    hardest = [torch.zeros_like(values[0], dtype=torch.int64)]
    factors = (scale * probes if unit_rows else probes).to(dtype).T.contiguous()  # (D, B)
    for chunk in _chunks(rows, len(probes)):
        part = rows[chunk].to(dtype)  # (C, D)
        # Slots by probes, not the other way round: the CPU's matrix product is a third faster that way.
        logits = (part @ factors).to(probes.dtype)  # (C, D) @ (D, B) -> (C, B)
        inverse = None if unit_rows else inverse_lengths(rows[chunk])
        if inverse is not None:
            logits *= scale * inverse
        filtered = logits > scale * filter_threshold if filter_threshold > 0 else None
        if filtered is not None:
            logits.masked_fill_(filtered, 0)
        logits += bias[chunk, None]

        top, where = largest_of_columns(logits, num_hardest)  # (h, B)
        softmax = logits.softmax(0)
        here = top[0] - softmax.gather(0, where[:1])[0].log()  # log-sum-exp of this chunk
        if filtered is not None:
            softmax.masked_fill_(filtered, 0)  # a constant has no gradient
        if inverse is not None:
            softmax *= inverse

        total = torch.logaddexp(log_sum_exp, here)
        mean_row *= (log_sum_exp - total).exp()[:, None]
        mean_row += (softmax.T.to(dtype) @ part).to(probes.dtype) * (here - total).exp()[:, None]  # (B, C) @ (C, D)
        log_sum_exp = total
        values.append(top)
        hardest.append(where + chunk.start)
    largest, best = torch.cat(values).topk(num_hardest, dim=0)
    return log_sum_exp, mean_row, torch.cat(hardest).gather(0, best).T, largest.T
