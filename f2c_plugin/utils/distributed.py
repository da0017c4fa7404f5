"""Collectives and sharding. With one rank, or without a process group, all of it is free."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, distributed


def this_rank() -> tuple[int, int]:
    """(rank, number of ranks)."""
    if distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


_recorder: Callable[[Callable[[], Any]], None] | None = None


@contextmanager
def recording(recorder: Callable[[Callable[[], Any]], None]) -> Iterator[None]:
    """Within, collectives are handed to ``recorder`` instead of called."""
    global _recorder
    _recorder = recorder
    try:
        yield
    finally:
        _recorder = None


def gather(local: Tensor) -> Tensor:
    """The tensors (n, …) of all ranks in rank order, (W, n, …)."""
    return gather_meanwhile(local)()


def gather_meanwhile(local: Tensor) -> Callable[[], Tensor]:
    """Begins to ``gather`` while other work goes on. The result returns the tensors."""
    _, world_size = this_rank()
    if world_size == 1:
        return lambda: local[None]
    parts, local = local.new_empty(world_size, *local.shape), local.contiguous()
    if _recorder:
        _recorder(lambda: distributed.all_gather(list(parts), local))
        return lambda: parts
    work: Any = distributed.all_gather(list(parts), local, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return parts
    return finish


@dataclass(frozen=True)
class Shard:
    """A rank's share of items that are split evenly over ``world_size`` ranks."""

    rank: int
    world_size: int

    def range_of(self, size: int) -> tuple[int, int]:
        """(first, one past the last) of this rank's part of ``size`` items."""
        return self.rank * size // self.world_size, (self.rank + 1) * size // self.world_size

    def gather(self, local: Tensor) -> Tensor:
        """The tensors (n, …) of all ranks that share, (W, n, …)."""
        return gather(local) if self.world_size > 1 else local[None]

    def sum(self, partial: Tensor) -> Tensor:
        """The sum over the ranks that share."""
        if self.world_size > 1:
            partial = partial.contiguous()
            if _recorder:
                _recorder(lambda: distributed.all_reduce(partial))
            else:
                distributed.all_reduce(partial)
        return partial


WHOLE = Shard(0, 1)
