"""Values whose gradient is already known."""

from typing import Any

import torch
from torch import Tensor


def with_gradient(inputs: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """``value`` (B,), with ``gradient`` (B, D) as its gradient to ``inputs`` (B, D)."""
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
        return gradient * value_gradient[:, None], None, None
