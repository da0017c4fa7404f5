"""Operations on tensors of fixed shapes, without a wait for the device."""

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor as it is, or in float32 if it is in half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def occurrences(identities: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where equal entries of a batch stand, int64 (B,) each, an entry for each of B.

    Returns:
        how many equal entries come before it; how many equal entries there are; the position of the
        first of them; the position of the last of them whose number has the same parity.
    """
    batch = len(identities)
    ordered, position = identities.sort(stable=True)
    index = torch.arange(batch, device=identities.device)
    starts_group = torch.ones_like(index, dtype=torch.bool)
    starts_group[1:] = ordered[1:] != ordered[:-1]
    start = torch.where(starts_group, index, 0).cummax(0).values
    group = starts_group.cumsum(0) - 1
    count = torch.zeros_like(index).scatter_add_(0, group, torch.ones_like(index))[group]
    occurrence = index - start
    last = count - 1
    same_parity_last = start + last - (last - occurrence) % 2

    in_batch_order = torch.empty_like(index).scatter_(0, position, index)
    return (occurrence[in_batch_order], count[in_batch_order],
            position[start][in_batch_order], position[same_parity_last][in_batch_order])
