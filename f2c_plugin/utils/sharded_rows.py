"""A table of vectors whose slots are split over the ranks, or held as a whole by each of them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

from f2c_plugin.utils.distributed import WHOLE, Shard
from f2c_plugin.utils.tensors import at_least_float32, hashed, true_of_all

_BLOCK = 1 << 10  # slots whose first rows are drawn at a time, in the cache


def all_rows_at(*reads: "tuple[ShardedRows, Tensor]") -> tuple[Tensor, ...]:
    """The rows of slots (A,) of each table, one after the other, (A, R·D) each, in one collective.

    The tables are split over the same ranks.
    """
    rows = [table.own_rows_at(slots).movedim(0, 1).flatten(1) for table, slots in reads]
    shard = reads[0][0].shard
    return shard.sum(torch.cat(rows, 1)).split([each.size(1) for each in rows], 1) if shard.world_size > 1 else tuple(rows)


class ShardedRows(nn.Module):
    """R rows of D numbers for each of K slots; a rank holds those of its share of the slots.

    A ``state_dict`` holds the rows of all ranks, so it loads on any number of ranks. Slots that are read and written are
    on the device of the computation; if the rows are not, the CPU waits.

    Args:
        num_rows, num_slots, size: R, K, D.
        seed: of the random unit vectors to begin with. They do not depend on the number of ranks.
        dtype: of the rows.
        shard: the slots that this rank holds.

    Attributes:
        rows: (R, K', D); K' is K unless sharded.
    """

    rows: Tensor

    def __init__(self, num_rows: int, num_slots: int, size: int, seed: int = 0, dtype: torch.dtype = torch.float32,
                 shard: Shard = WHOLE):
        super().__init__()
        self.shard = shard
        self.num_slots = num_slots
        self.first, self.end = shard.range_of(num_slots)
        self.register_buffer("rows", self._first_rows(num_rows, size, seed, dtype))

    def _first_rows(self, num_rows: int, size: int, seed: int, dtype: torch.dtype) -> Tensor:
        """Random unit vectors on the default device: all numbers ± 1 / √D, their signs the bits of a hash of their place.

        So they are the same on any device and rank, and ten million cost seconds where normal numbers would cost minutes.
        """
        rows = torch.empty(num_rows, self.end - self.first, size, dtype=dtype)
        mixed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        signs = 2 * (torch.arange(1 << 16)[:, None] >> torch.arange(16) & 1) - 1  # (2¹⁶, 16), of the bits of each number
        vectors = (signs / size ** 0.5).to(dtype)
        hashes = -(-size // 32)  # of a row
        for row in range(num_rows):
            for start in range(self.first, self.end, _BLOCK):
                end = min(start + _BLOCK, self.end)
                bits = hashed(hashes * (row * self.num_slots + start), hashes * (end - start), mixed)
                drawn = vectors.index_select(0, bits.view(torch.int16).int() & 0xffff)
                rows[row, start - self.first:end - self.first] = drawn.view(end - start, -1)[:, :size]
        return rows

    def _are_valid(self, rows: Tensor) -> Tensor | bool:
        return true_of_all(rows, torch.isfinite)

    def rows_at(self, slots: Tensor, count: int | None = None) -> Tensor:
        """A copy of the first ``count`` rows of slots (A,), (count, A, D), at least float32.

        Negative slots give rows that mean nothing. If the table is sharded, all ranks call this
        together with the same slots.
        """
        return self.shard.sum(self.own_rows_at(slots, count))

    def own_rows_at(self, slots: Tensor, count: int | None = None) -> Tensor:
        """As ``rows_at``, but rows of other ranks are 0."""
        if self.shard.world_size == 1:
            return at_least_float32(self.rows[:count, slots.to(self.rows.device)]).to(slots.device)
        index, own = self._local(slots)
        rows = at_least_float32(self.rows[:count, index.to(self.rows.device)]).to(slots.device)
        return rows.masked_fill(~own[:, None], 0)

    def own_entries(self, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For writes of B entries to slots (B,): which entries this rank writes, without a shape that depends on it.

        Returns:
            entry: int64 (B,) those of slots that this rank holds; the others repeat its first.
            index: int64 (B,) into the second dimension of ``rows``, where each goes.
            any_own: bool () whether there is one at all. If not, what is at ``index`` must stay.
        """
        index, own = self._local(slots)
        entry = torch.where(own, torch.arange(len(own), device=own.device), own.to(torch.uint8).argmax())
        return entry, index[entry], own.any()

    def write(self, slots: Tensor, values: Tensor):
        """Set the rows of slots (A,) to values (R, A, D) or (A, D). Entries of one slot hold the same values."""
        if self.shard.world_size == 1:
            self.rows[:, slots.to(self.rows.device)] = values.to(self.rows)
            return
        entry, index, any_own = self.own_entries(slots)
        values = values[..., entry, :].to(self.rows)
        index, any_own = index.to(self.rows.device), any_own.to(self.rows.device)
        self.rows[:, index] = torch.where(any_own, values, self.rows[:, index])

    def _local(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Index into ``rows`` of slots (A,), and whether this rank holds them; the index of others means nothing."""
        own = (slots >= self.first) & (slots < self.end)
        return (slots - self.first).clamp(0, self.end - self.first - 1), own

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.shard.world_size > 1:
            destination[prefix + "rows"] = self._rows_of_all_ranks()

    def _rows_of_all_ranks(self) -> Tensor:
        """(R, K, D) in main memory."""
        num_rows, _, size = self.rows.shape
        whole = torch.empty(num_rows, self.num_slots, size, dtype=self.rows.dtype)
        for rank in range(self.shard.world_size):
            start, end = Shard(rank, self.shard.world_size).range_of(self.num_slots)
            part = self.rows.clone() if rank == self.shard.rank else self.rows.new_empty(num_rows, end - start, size)
            distributed.broadcast(part, rank)
            whole[:, start:end] = part.cpu()
        return whole

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any):
        error_messages: list[str] = rest[-1]
        rows = state_dict.get(prefix + "rows")
        if rows is not None:
            if rows.dim() != 3 or rows.size(1) != self.num_slots:
                error_messages.append(f"{prefix}rows: size mismatch, {tuple(rows.shape)} for a pool of {self.num_slots} slots")
                return  # and leave what is there as it is
            if not self._are_valid(rows):  # looks at all rows, so that all ranks refuse what one has to
                error_messages.append(f"{prefix}rows: the pool is damaged; it does not hold that rows are finite")
                return
            state_dict = {**state_dict, prefix + "rows": rows[:, self.first:self.end]}
        super()._load_from_state_dict(state_dict, prefix, *rest)
