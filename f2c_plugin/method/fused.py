"""The passes over the slots as a kernel each, in Triton: a row is read once, and written once where slots learn.

They compute what ``pool_softmax`` says; its PyTorch operators are their reference and their fallback. Rows are keys and values
of an attention at once, so that a block of them serves both products while it is on the chip.

Tests run the kernels on the CPU, in Triton's interpreter, and compile them for GPUs; on a GPU: `make gpu`.
"""

import itertools
import os
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from f2c_plugin.method.pool_softmax import LEFT_OUT, num_parts
from f2c_plugin.utils.replay import Number
from f2c_plugin.utils.tensors import DROPPED_BITS

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_UNIT = 128  # slots; parts of the pool are multiples of it, and so of every block of slots
_TUNED_ON = 1 << 14  # slots: four blocks for each multiprocessor, and copies no larger than a step's working memory
_tuned: set[tuple[object, ...]] = set()  # what the step has been tuned for


def _milliseconds(kernel: Callable[[], None], quantiles: Sequence[float]) -> list[float]:
    """Median of a few calls. Unlike Triton's own measure it takes no memory: a pool does not fit into a GPU's cache anyway."""
    kernel()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(6)]
    for event in events:
        event.record()
        kernel()
    torch.cuda.synchronize()
    median = sorted(start.elapsed_time(end) for start, end in itertools.pairwise(events))[2]
    return [median] * len(quantiles)


def _configs(*tried: tuple[int, int, int, int]) -> list[triton.Config]:
    """What is tried on a GPU before the first step, of which the fastest is taken: (probes, slots, warps, stages)."""
    made = [triton.Config({"PROBES": p, "SLOTS": s}, num_warps=warps, num_stages=stages) for p, s, warps, stages in tried]
    return made[:1] if IS_INTERPRETED else made


@triton.autotune(_configs((32, 32, 4, 2), (64, 32, 8, 2), (64, 32, 8, 3), (64, 64, 8, 2)), key=["size", "num_top"],
                 do_bench=_milliseconds)
@triton.jit(do_not_specialize=["first_slot"])
def _pass_kernel(queries, rows, left_out, own_slot, largest, total, weighted, top, where, num_probes, num_slots, part,
                 threshold, first_slot, size: tl.constexpr, num_top: tl.constexpr, OUT: tl.constexpr, FILTERED: tl.constexpr,
                 LEFT_OUT: tl.constexpr, OWN: tl.constexpr, TOP: tl.constexpr, SIZE: tl.constexpr, PROBES: tl.constexpr,
                 SLOTS: tl.constexpr):
    """A block of probes against a part of the slots, by online softmax (Milakov and Gimelshein, arXiv 1805.02867)."""
    # Blocks of probes of the same part run at the same time, so that all but one find its rows in the cache.
    split = tl.program_id(1)
    probe = tl.program_id(0) * PROBES + tl.arange(0, PROBES)
    number = tl.arange(0, SIZE)
    is_probe, is_number = probe < num_probes, number < size
    query = tl.load(queries + probe[:, None] * size + number[None, :], mask=is_probe[:, None] & is_number[None, :], other=0)
    if OWN:
        own = tl.load(own_slot + probe, mask=is_probe, other=-1)
    maximum = tl.full((PROBES,), float("-inf"), tl.float32)
    denominator = tl.zeros((PROBES,), tl.float32)
    numerator = tl.zeros((PROBES, SIZE), tl.float32)
    if num_top == 1:
        best_slot = tl.zeros((PROBES,), tl.int64)
    else:
        rank = tl.arange(0, TOP)
        # The largest logits so far, in no order; what pads them to a power of two is never the smallest.
        best = tl.where(rank[None, :] < num_top, tl.full((PROBES, TOP), OUT, tl.float32), float("inf"))
        best_slot = tl.zeros((PROBES, TOP), tl.int64)

    for start in range(split * part, tl.minimum((split + 1) * part, num_slots), SLOTS):
        slot = start + tl.arange(0, SLOTS).to(tl.int64)
        is_slot = slot < num_slots
        row = tl.load(rows + slot[:, None] * size + number[None, :], mask=is_slot[:, None] & is_number[None, :], other=0)
        row = row.to(query.dtype)
        logits = tl.dot(query, tl.trans(row), input_precision="ieee")  # (PROBES, SLOTS)
        if FILTERED:
            filtered = logits > threshold
            logits = tl.where(filtered, 0.0, logits)
        is_in = is_slot[None, :] & is_probe[:, None]
        if LEFT_OUT:
            is_in &= (tl.load(left_out + slot, mask=is_slot, other=1) == 0)[None, :]
        if OWN:
            is_in &= own[:, None] != first_slot + slot[None, :]
        logits = tl.where(is_in, logits, OUT)

        if num_top == 1:  # without a loop, which would keep the next rows from being fetched meanwhile
            found, at = tl.max(logits, 1, return_indices=True)
            best_slot = tl.where(found > maximum, start + at.to(tl.int64), best_slot)
        else:
            worst = tl.min(best, 1)
            candidates = logits
            found = tl.max(candidates, 1)
            while tl.max((found > worst).to(tl.int32), 0) > 0:
                better = found > worst
                at = tl.argmax(candidates, 1)
                place = tl.argmax((best == worst[:, None]).to(tl.int32), 1)
                replaced = better[:, None] & (rank[None, :] == place[:, None])
                best = tl.where(replaced, found[:, None], best)
                best_slot = tl.where(replaced, (start + at.to(tl.int64))[:, None], best_slot)
                taken = better[:, None] & (tl.arange(0, SLOTS)[None, :] == at[:, None])
                candidates = tl.where(taken, float("-inf"), candidates)
                worst = tl.min(best, 1)
                found = tl.max(candidates, 1)
            found = tl.max(logits, 1)

        new_maximum = tl.maximum(maximum, found)
        softmax = tl.exp(logits - new_maximum[:, None])
        shrink = tl.exp(maximum - new_maximum)
        denominator = denominator * shrink + tl.sum(softmax, 1)
        if FILTERED:
            softmax = tl.where(filtered, 0.0, softmax)  # a constant has no gradient
        numerator = tl.dot(softmax.to(query.dtype), row, numerator * shrink[:, None], input_precision="ieee")
        maximum = new_maximum

    out = split * num_probes + probe
    tl.store(largest + out, maximum, mask=is_probe)
    tl.store(total + out, denominator, mask=is_probe)
    tl.store(weighted + out[:, None] * size + number[None, :], numerator, mask=is_probe[:, None] & is_number[None, :])
    if num_top == 1:
        tl.store(top + out, maximum, mask=is_probe)
        tl.store(where + out, best_slot, mask=is_probe)
    else:
        is_top = is_probe[:, None] & (rank[None, :] < num_top)
        tl.store(top + out[:, None] * num_top + rank[None, :], best, mask=is_top)
        tl.store(where + out[:, None] * num_top + rank[None, :], best_slot, mask=is_top)


@triton.jit
def _join_kernel(largest, total, weighted, log_sum_exp, mean_row, num_probes, num_parts, size: tl.constexpr, SIZE: tl.constexpr,
                 PARTS: tl.constexpr):
    """What the parts of the slots have found for a probe, put together."""
    probe = tl.program_id(0)
    number = tl.arange(0, SIZE)
    maximum = tl.full((), float("-inf"), tl.float32)
    denominator = tl.full((), 0.0, tl.float32)
    numerator = tl.zeros((SIZE,), tl.float32)
    for start in range(0, num_parts, PARTS):
        part = start + tl.arange(0, PARTS)
        is_part, place = part < num_parts, part * num_probes + probe
        of_part = tl.load(largest + place, mask=is_part, other=float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(of_part, 0))
        shrink, weight = tl.exp(maximum - new_maximum), tl.exp(of_part - new_maximum)
        denominator = denominator * shrink + tl.sum(weight * tl.load(total + place, mask=is_part, other=0), 0)
        inside = is_part[:, None] & (number < size)[None, :]
        rows = tl.load(weighted + place[:, None] * size + number[None, :], mask=inside, other=0)
        numerator = numerator * shrink + tl.sum(weight[:, None] * rows, 0)
        maximum = new_maximum
    tl.store(log_sum_exp + probe, maximum + tl.log(denominator))
    tl.store(mean_row + probe * size + number, numerator / denominator, mask=number < size)


@triton.jit
def _hashed(values, seed):
    """As ``utils.tensors.hashed``; a tenth of the work of Philox, which for bits to round with is too much."""
    values = values.to(tl.uint32)
    values = (values ^ (values >> 16)) * 0x7feb352d ^ (seed.to(tl.uint32) * 0x9e3779b9)
    values = (values ^ (values >> 15)) * 0x846ca68b
    return values ^ (values >> 16)


@triton.autotune(_configs((16, 16, 4, 2), (32, 32, 4, 2), (64, 32, 8, 2), (128, 32, 8, 2)), key=["size"],
                 do_bench=_milliseconds)
# Without the list Triton would compile it again for a seed that 16 divides.
@triton.jit(do_not_specialize=["seed", "first_slot"])
def _learn_kernel(rows, lengths, probes, log_denominator, own_slot, own_gradient, numbers, num_probes, num_slots, scale, rate,
                  seed, threshold, first_slot, size: tl.constexpr, GIVEN: tl.constexpr, FILTERED: tl.constexpr,
                  ROUNDED_BITS: tl.constexpr, SIZE: tl.constexpr, PROBES: tl.constexpr, SLOTS: tl.constexpr):
    """The step of a block of slots; see ``pool_softmax.learn``."""
    if not GIVEN:
        scale, rate = tl.load(numbers).to(tl.float32), tl.load(numbers + 1).to(tl.float32)
        seed = tl.load(numbers + 2).to(tl.int32)
    begin = tl.program_id(0) * SLOTS
    rows += begin.to(tl.int64) * size
    slot = begin + tl.arange(0, SLOTS)
    number = tl.arange(0, SIZE)
    is_slot, is_number = slot < num_slots, number < size
    place = tl.arange(0, SLOTS)[:, None] * size + number[None, :]  # within the block, so that 32 bits hold it
    inside = is_slot[:, None] & is_number[None, :]
    factor = tl.load(rows + place, mask=inside, other=0, eviction_policy="evict_last").to(probes.dtype.element_ty)
    gradient = tl.zeros((SLOTS, SIZE), tl.float32)
    for start in range(0, num_probes, PROBES):
        index = start + tl.arange(0, PROBES)
        is_probe = index < num_probes
        is_there = is_probe[:, None] & is_number[None, :]
        probe = tl.load(probes + index[:, None] * size + number[None, :], mask=is_there, other=0)
        logits = scale * tl.dot(factor, tl.trans(probe), input_precision="ieee")  # (SLOTS, PROBES)
        softmax = tl.exp(logits - tl.load(log_denominator + index, mask=is_probe, other=float("inf"))[None, :])
        if FILTERED:
            softmax = tl.where(logits > scale * threshold, 0.0, softmax)
        own = tl.load(own_slot + index, mask=is_probe, other=-1)
        of_own = tl.load(own_gradient + index, mask=is_probe, other=0)
        softmax = tl.where(first_slot + slot[:, None] == own[None, :], of_own[None, :], softmax)
        gradient = tl.dot(softmax.to(probe.dtype), probe, gradient, input_precision="ieee")

    # Read again, from the cache: registers have had no room for it beside the gradient.
    row = tl.load(rows + place, mask=inside, other=0, eviction_policy="evict_first").to(tl.float32)
    length = tl.load(lengths + slot, mask=is_slot, other=1.0).to(tl.float32)
    inverse = 1 / tl.sqrt(tl.maximum(tl.sum(row * row, 1), 1e-24))
    along = tl.sum(gradient * row, 1) * inverse
    step = rate / (length * length)
    across = tl.maximum(tl.sum(gradient * gradient, 1) - along * along, 0.0)
    growth = tl.sqrt(1 + step * step * across)
    row = row * ((1 + step * along) * inverse / growth)[:, None] - gradient * (step / growth)[:, None]
    if ROUNDED_BITS > 0:  # at random; see ``utils.tensors.rounded_at_random``
        noise = _hashed(place + (first_slot + begin) * size, seed) & ((1 << ROUNDED_BITS) - 1)
        row = (row.to(tl.uint32, bitcast=True) + noise) & ((1 << 32) - (1 << ROUNDED_BITS))
        row = row.to(tl.float32, bitcast=True)
    tl.store(rows + place, row.to(rows.dtype.element_ty), mask=inside)
    tl.store(lengths + slot, (length * growth).to(lengths.dtype.element_ty), mask=is_slot)


def _padded(size: int) -> int:
    """The size of a block that holds vectors of ``size`` numbers: a power of two that matrix units take."""
    return max(16, triton.next_power_of_2(size))


@torch.library.custom_op("f2c_plugin::pool_pass", mutates_args=())
def _pass(queries: Tensor, rows: Tensor, left_out: Tensor | None, own_slot: Tensor | None, first_slot: int, threshold: float,
          num_top: int, num_splits: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    made = largest, total, weighted, top, where = _parts(queries, rows, left_out, own_slot, first_slot, threshold, num_top,
                                                         num_splits)
    num_probes, size = queries.shape
    part = triton.cdiv(triton.cdiv(len(rows), num_splits), _UNIT) * _UNIT
    _pass_kernel[lambda chosen: (triton.cdiv(num_probes, chosen["PROBES"]), num_splits)](
        queries, rows, left_out, own_slot, largest, total, weighted, top, where, num_probes, len(rows), part, threshold,
        first_slot, size, num_top, OUT=LEFT_OUT, FILTERED=threshold > 0, LEFT_OUT=left_out is not None,
        OWN=own_slot is not None, TOP=triton.next_power_of_2(num_top), SIZE=_padded(size))
    return made


@_pass.register_fake
def _parts(queries: Tensor, rows: Tensor, left_out: Tensor | None, own_slot: Tensor | None, first_slot: int, threshold: float,
           num_top: int, num_splits: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of each part of the slots and probe: the largest logit, and Σ exp and Σ exp · row below it; the largest, and where."""
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return queries.new_empty(num_splits, len(queries), *shape, dtype=dtype)
    return empty(), empty(), empty(queries.size(1)), empty(num_top), empty(num_top, dtype=torch.int64)


@torch.library.custom_op("f2c_plugin::pool_join", mutates_args=())
def _join(largest: Tensor, total: Tensor, weighted: Tensor) -> tuple[Tensor, Tensor]:
    """Of parts (S, B), (S, B) and (S, B, D): log Σ exp (B,) of all slots, and their mean row (B, D)."""
    num_parts, num_probes, size = weighted.shape
    log_sum_exp, mean_row = _joined(largest, total, weighted)
    _join_kernel[num_probes,](largest, total, weighted, log_sum_exp, mean_row, num_probes, num_parts, size, SIZE=_padded(size),
                              PARTS=16)
    return log_sum_exp, mean_row


@_join.register_fake
def _joined(largest: Tensor, total: Tensor, weighted: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(largest[0]), torch.empty_like(weighted[0])


def one_pass(queries: Tensor, rows: Tensor, left_out: Tensor | None, own_slot: Tensor | None, first_slot: int, threshold: float,
             num_hardest: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``pool_softmax._one_pass``."""
    splits = num_parts(len(rows), len(queries)) if rows.is_cuda else 3
    *parts, top, where = _pass(queries.to(dtype), rows, left_out, own_slot, first_slot, threshold, num_hardest, splits)
    log_sum_exp, mean_row = _join(*parts)
    values, best = top.movedim(0, 1).flatten(1).topk(num_hardest)  # (B, h)
    return log_sum_exp, mean_row, where.movedim(0, 1).flatten(1).gather(1, best), values


def learn(rows: Tensor, lengths: Tensor, probes: Tensor, log_denominator: Tensor, own_slot: Tensor, own_gradient: Tensor,
          scale: Number, rate: Number, seed: Number, threshold: float, first_slot: int) -> None:
    """The step of ``pool_softmax.learn``, with the probes in the products' type, and as it scales the others."""
    factors = rows, lengths, probes, log_denominator, own_slot, own_gradient
    if isinstance(scale, Tensor) and isinstance(rate, Tensor) and isinstance(seed, Tensor):
        _learn(*factors, torch.stack([scale, rate, seed]), 0.0, 0.0, 0, threshold, first_slot)
    else:
        _learn(*factors, None, float(scale), float(rate), int(seed), threshold, first_slot)


@torch.library.custom_op("f2c_plugin::pool_learn", mutates_args=("rows", "lengths"))
def _learn(rows: Tensor, lengths: Tensor, probes: Tensor, log_denominator: Tensor, own_slot: Tensor, own_gradient: Tensor,
           numbers: Tensor | None, scale: float, rate: float, seed: int, threshold: float, first_slot: int) -> None:
    """``numbers`` float64 (3,), if there are any, are scale, rate and seed."""
    size = rows.size(1)

    def run(rows: Tensor, lengths: Tensor) -> None:
        _learn_kernel[lambda chosen: (triton.cdiv(len(rows), chosen["SLOTS"]),)](
            rows, lengths, probes, log_denominator, own_slot, own_gradient, numbers, len(probes), len(rows), scale, rate,
            seed, threshold, first_slot, size, GIVEN=numbers is None, FILTERED=threshold > 0,
            ROUNDED_BITS=DROPPED_BITS.get(rows.dtype, 0), SIZE=_padded(size))

    kind = size, rows.dtype, lengths.dtype, probes.dtype
    if kind not in _tuned:  # on copies, because each try takes a step
        _tuned.add(kind)
        run(rows[:_TUNED_ON].clone(), lengths[:_TUNED_ON].clone())
    run(rows, lengths)


@_learn.register_fake
def _(rows: Tensor, lengths: Tensor, probes: Tensor, log_denominator: Tensor, own_slot: Tensor, own_gradient: Tensor,
      numbers: Tensor | None, scale: float, rate: float, seed: int, threshold: float, first_slot: int) -> None:
    return None
