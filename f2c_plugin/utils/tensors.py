"""Operations on tensors; of fixed shapes and without a wait for the device unless said."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}  # of float32's fraction, that the type lacks
_GROUP = 32  # numbers of which the maximum is compared first
_BLOCK = 1 << 15  # vectors that are looked at together


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor as it is, or in float32 if it is in half precision."""
    return tensor.float() if tensor.dtype in DROPPED_BITS else tensor


def rounded_at_random(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values (…) in ``dtype``, at least float32: those that half precision cannot hold are rounded up or down at random.

    The mean of many roundings is the value, so that small steps add up; rounded to the nearest, they would be lost.
    """
    dropped = DROPPED_BITS.get(dtype)
    if dropped is None:
        return values.to(dtype)
    bits = values.float().view(torch.int32)
    noise = torch.randint_like(bits, 1 << dropped)
    return ((bits + noise) & -(1 << dropped)).view(torch.float32).to(dtype)


def hashed(first: int, count: int, seed: int) -> Tensor:
    """A hash of each of the numbers from ``first`` on, int32 (count,), on the default device. The seed has 32 bits."""
    def logical_shift(values: Tensor, by: int) -> Tensor:
        return (values >> by) & (1 << 32 - by) - 1

    values = torch.arange(count, dtype=torch.int32) + _signed(first)
    values = (values ^ logical_shift(values, 16)) * 0x7feb352d ^ _signed(seed)  # multipliers of Wellons' hash "lowbias32"
    values = (values ^ logical_shift(values, 15)) * _signed(0x846ca68b)
    return values ^ logical_shift(values, 16)


def _signed(bits: int) -> int:
    """The number that the lowest 32 bits are as int32."""
    return (bits + (1 << 31)) % (1 << 32) - (1 << 31)


def all_finite(vectors: Tensor) -> Tensor:
    """Which of vectors (…, D) are finite, bool (…,), if their numbers are of moderate size; of a number (), itself."""
    total = vectors.sum(-1) if vectors.dim() else vectors
    return total - total == 0  # NaN is not equal to 0


def lengths(vectors: Tensor) -> Tensor:
    """Euclidean lengths of vectors (…, D), (…)."""
    return vectors.norm(dim=-1)


def inverse_lengths(vectors: Tensor) -> Tensor:
    """1 / length of vectors (n, D), (n, 1), at least float32."""
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    return vectors.norm(dim=1, keepdim=True, dtype=dtype).clamp(min=1e-12).reciprocal()


def true_of_all(vectors: Tensor, condition: Callable[[Tensor], Tensor]) -> Tensor:
    """Whether a condition, bool (R, n, …), is true of all vectors (R, N, D), bool (). Needs memory for a block of them."""
    return torch.stack([condition(block).all() for block in vectors.split(_BLOCK, dim=1)]).all()


def all_different(values: Tensor) -> bool:
    """Whether no two of ``values`` (n,) are equal. Waits for the device."""
    return len(values.unique()) == len(values)


def first_of_equal(values: Tensor) -> tuple[Tensor, Tensor]:
    """For each entry of ``values`` (B,) the position of the first equal to it, int64 (B,); and whether it is that one."""
    ordered, position = values.sort(stable=True)
    first = position[torch.searchsorted(ordered, values)]
    return first, first == torch.arange(len(values), device=values.device)


def occurrences(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where equal entries of ``values`` (B,) stand, int64 (B,) each, an entry for each of B.

    Returns:
        how many equal entries come before it; how many equal entries there are; the position of the last of them whose
        number has the same parity.
    """
    ordered, position = values.sort(stable=True)
    start, end = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    rank = torch.empty_like(position).scatter_(0, position, torch.arange(len(values), device=values.device))
    return rank - start, end - start, position[end - 1 - (end - 1 - rank) % 2]


def largest_of_columns(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Values and rows of the ``count`` largest of every column of ``values`` (C, B), descending, (count, B) each.

    They lie within the groups with the ``count`` largest maxima, so the rest need not be compared.
    """
    whole = len(values) // _GROUP * _GROUP
    rows = torch.arange(len(values), device=values.device)
    maxima: Tensor = values[:whole].unflatten(0, (-1, _GROUP)).amax(1)  # (C / group, B)
    groups = maxima.topk(min(count, len(maxima)), dim=0).indices
    inside = (groups[:, None] * _GROUP + rows[:_GROUP, None]).flatten(0, 1)  # (count · group, B)
    candidates = torch.cat([inside, rows[whole:, None].expand(-1, values.size(1))])
    found, best = values.gather(0, candidates).topk(min(count, len(candidates)), dim=0)
    return found, candidates.gather(0, best)


def step_towards(tensors: list[Tensor], targets: list[Tensor], rate: float) -> None:
    """t ← t − rate · (t − target) for all tensors of one type together, in place; if all targets are finite, else not."""
    operators: Any = torch  # those for lists are not in its stubs
    total = torch.stack(operators._foreach_norm(targets)).sum(dtype=torch.float32)
    operators._fused_sgd_(tensors, operators._foreach_sub(tensors, targets), [], weight_decay=0.0, momentum=0.0, lr=rate,
                          dampening=0.0, nesterov=False, maximize=False, is_first_step=False,
                          found_inf=(total - total != 0).float())


def with_gradient(inputs: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """``value`` () or (B,), with ``gradient`` (B, D) as its gradient to ``inputs`` (B, D)."""
    return _WithGradient.apply(inputs, value, gradient)  # pyright: ignore[reportReturnType]


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, value_gradient: Tensor) -> tuple[Tensor, None, None]:
        gradient, = ctx.saved_tensors
        return gradient * value_gradient[..., None], None, None


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Turns autocast off, on devices that have it."""
    return torch.autocast(device_type, enabled=False) if torch.amp.is_autocast_available(device_type) else nullcontext()
