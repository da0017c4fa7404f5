"""Main memory that a GPU reads and writes itself, and numbers that it leaves there."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Bytes:
    """Memory by its address, as ``torch.as_tensor`` takes it; keeps its owner alive."""

    def __init__(self, owner: Tensor):
        self._owner = owner
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (owner.nbytes,), "typestr": "|u1", "data": (owner.data_ptr(), False), "version": 3}


def seen_by(device: torch.device, tensor: Tensor) -> Tensor:
    """A tensor on a GPU over the memory of a contiguous tensor on the CPU: what one writes, the other reads.

    The memory is locked, so that it cannot be swapped out, for as long as the result lives; it can be locked once at a time.
    Operations go over the bus, so they should touch few entries.

    Raises:
        RuntimeError: CUDA cannot lock the memory; says why.
    """
    if not tensor.nbytes:
        return tensor.to(device)
    runtime: Any = torch.cuda.cudart()
    with torch.cuda.device(device):
        code = int(runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0))
        if code:
            raise RuntimeError(f"cannot lock {tensor.nbytes >> 20:,} MB of main memory for {device}: "
                               f"{runtime.cudaGetErrorString(runtime.cudaError(code))}")
        memory = _Bytes(tensor)  # which the result keeps
        weakref.finalize(memory, runtime.cudaHostUnregister, tensor.data_ptr())
        return torch.as_tensor(memory, device=device).view(tensor.dtype).view(tensor.shape)


def left_behind(number: Tensor) -> Callable[[], float]:
    """Copies a number () to main memory behind the work that a GPU has to do. Call the result for it: it waits if need be."""
    if not number.is_cuda:
        return number.item
    copy, done = torch.empty((), dtype=number.dtype, device="cpu", pin_memory=True), torch.cuda.Event()
    copy.copy_(number, non_blocking=True)
    done.record(torch.cuda.current_stream(number.device))

    def read() -> float:
        done.synchronize()
        return copy.item()
    return read
