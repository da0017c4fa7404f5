"""Class weights of the identities that are not in the pool, outside the GPU's memory."""

import mmap
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from f2c_plugin.errors import ConfigError
from f2c_plugin.utils.atomic import naming
from f2c_plugin.utils.distributed import WHOLE, Shard
from f2c_plugin.utils.host_memory import seen_by
from f2c_plugin.utils.sharded_rows import ShardedRows

_BLOCK = 1 << 24  # numbers that a rank hands over at a time


def _pages(num_bytes: int) -> mmap.mmap:
    """Memory whose pages come one by one with the first write. NumPy's and PyTorch's come in huge ones, or at once."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # on Linux
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


class KeptWeights(ShardedRows):
    """A class weight for each of N identities, in main memory or in a memory-mapped file; 0 where there is none yet.

    The identities are split over the ranks. The weights stay off the GPU, wherever the head goes: it reads and writes main
    memory itself, a few hundred weights a step, and the CPU does not wait. With a file the CPU does both, and waits.

    A ``state_dict`` of rank 0 holds all of them, and loads on any number of ranks; that of another rank holds its own,
    and loads on the same rank of as many.

    Args:
        num_identities, embedding_size: N, D.
        dtype: of the weights.
        shard: the identities whose weights this rank keeps.
        folder: where a file takes the weights instead of main memory. The file has no name, and is gone with the process.
            Main memory is taken as weights come.
    Raises:
        OSError: the folder has no room for the file; names it.
    """

    def __init__(self, num_identities: int, embedding_size: int, dtype: torch.dtype = torch.float32, shard: Shard = WHOLE,
                 folder: Path | None = None):
        self._folder = folder
        super().__init__(1, num_identities, embedding_size, dtype=dtype, shard=shard)

    def _first_rows(self, num_rows: int, size: int, seed: int, dtype: torch.dtype) -> Tensor:
        return self._zeros((num_rows, self.end - self.first, size), dtype)

    def _zeros(self, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
        num_bytes = int(np.prod(shape)) * dtype.itemsize
        memory: NDArray[np.uint8]
        if not num_bytes:
            memory = np.zeros(0, np.uint8)
        elif self._folder is None:
            memory = np.frombuffer(_pages(num_bytes), np.uint8)
        else:
            with naming(self._folder), tempfile.TemporaryFile(dir=self._folder) as file:
                if hasattr(os, "posix_fallocate"):  # not on macOS; a disk that fills up later would end the process
                    os.posix_fallocate(file.fileno(), 0, num_bytes)
                memory = np.memmap(file, np.uint8, "r+", shape=(num_bytes,))
        return torch.as_tensor(memory, device="cpu").view(dtype).view(shape)

    def _apply(self, fn: Any, recurse: bool = True) -> "KeptWeights":
        """Stay in main memory, and keep the type. A GPU to which the rest of the head goes reads and writes it there."""
        device = fn(self.rows.new_empty(0)).device
        with_the_gpu = device.type == "cuda" and not self._folder  # to lock a file in memory would need the memory
        if self.rows.is_cuda and not with_the_gpu:
            self.rows = self._locked
        elif with_the_gpu and not self.rows.is_cuda:
            self._locked = self.rows
            try:
                self.rows = seen_by(device, self.rows)
            except RuntimeError as error:
                raise ConfigError(f"f2c_kept_weights='memory': {error}; set it to 'file'") from error
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy or a pickle: the weights stay in main memory, also with a GPU."""
        state = self.__dict__ | {"_buffers": self._buffers | {"rows": self._in_memory()}, "device": self.rows.device}
        state.pop("_locked", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        module: Any = super()
        module.__setstate__(state)
        self.to(self.__dict__.pop("device"))

    def _in_memory(self) -> Tensor:
        """The rows as the CPU sees them, once the GPU has written what it was asked to."""
        if not self.rows.is_cuda:
            return self.rows
        torch.cuda.current_stream(self.rows.device).synchronize()
        return self._locked

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.shard.world_size == 1:
            destination[prefix + "rows"] = self._in_memory()

    def _rows_of_all_ranks(self) -> Tensor:
        """(1, N, D) on rank 0; on others those of their own identities."""
        own_rows = self._in_memory()
        num_rows, _, size = own_rows.shape
        is_first = self.shard.rank == 0
        whole = self._zeros((num_rows, self.num_slots, size), own_rows.dtype) if is_first else own_rows
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"  # where collectives take their tensors from
        for rank in range(self.shard.world_size):
            start, end = Shard(rank, self.shard.world_size).range_of(self.num_slots)
            for first in range(start, end, max(1, _BLOCK // size)):
                last = min(first + max(1, _BLOCK // size), end)
                own = rank == self.shard.rank
                part = (own_rows[0, first - start:last - start] if own else own_rows.new_empty(last - first, size)).to(device)
                distributed.broadcast(part.contiguous() if own else part, rank)
                if is_first:
                    whole[0, first:last] = part.cpu()
        return whole

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any):
        rows = state_dict.get(prefix + "rows")
        if rows is not None and rows.shape == self.rows.shape and self.shard.world_size > 1:
            self.rows.copy_(rows)  # this rank's own, from a file of its own
            return
        super()._load_from_state_dict(state_dict, prefix, *rest)
