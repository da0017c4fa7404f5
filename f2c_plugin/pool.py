"""The Dynamic Class Pool (paper, section 3.3): which identities are at hand, and their gallery features."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

NOT_IN_POOL = -1


class PoolWrite(NamedTuple):
    """What one write did to the pool, a row for each of the B gallery features, in batch order.

    Attributes:
        slot: int64 (B,) the slot each feature's identity has.
        row: int64 (B,) the row it was written to.
        renewed: bool (B,) whether the identity was in the pool when one of its features came.
        evicted: int64 (B,) the identity that lost its slot to this feature, or NOT_IN_POOL.
        before: what ``undo`` puts back.
    """

    slot: Tensor
    row: Tensor
    renewed: Tensor
    evicted: Tensor
    before: dict[str, Tensor]


class DynamicClassPool(nn.Module):
    """K slots, each of one identity with its last two gallery features; placed by exact LRU.

    All state is in buffers and every operation is on whole tensors, on the device of the pool.
    The same writes on the same state give the same state, bit for bit, so ranks that write the
    same gathered features keep equal pools.

    Args:
        num_slots: K.
        num_identities: identities are numbered 0 … num_identities − 1.
        embedding_size: D.
        seed: of the random vectors in slots not yet taken; the same on all ranks.

    Attributes:
        rows: float32 (2, K, D), unit vectors. Slots not yet taken hold random ones.
        slot_identity: int64 (K,) who has the slot, or NOT_IN_POOL.
        last_used: int64 (K,) time of the last write; slots not yet taken have times before 0, the
            lowest slot the earliest, so that "the least recently used" is the one rule for both.
        due_row: int64 (K,) the row that the next write goes to.
        clock: int64 () writes so far.
    """

    def __init__(self, num_slots: int, num_identities: int, embedding_size: int, seed: int = 0):
        super().__init__()
        rows = torch.randn(2, num_slots, embedding_size, generator=torch.Generator().manual_seed(seed))
        rows = normalize(rows, dim=2)
        self.rows: Tensor
        self.register_buffer("rows", rows)
        self.register_buffer("slot_identity", torch.full((num_slots,), NOT_IN_POOL))
        self.register_buffer("last_used", torch.arange(-num_slots, 0))
        self.register_buffer("due_row", torch.zeros(num_slots, dtype=torch.int64))
        self.register_buffer("clock", torch.zeros((), dtype=torch.int64))
        # Follows from slot_identity. Its last entry stands for NOT_IN_POOL and takes the writes
        # that have nobody to go to.
        self.register_buffer("slot_of", torch.full((num_identities + 1,), NOT_IN_POOL, dtype=torch.int32),
                             persistent=False)
        self.register_load_state_dict_post_hook(DynamicClassPool._find_slots)

    @property
    def num_slots(self) -> int:
        return self.rows.size(1)

    def _find_slots(self, _=None):
        """Derive ``slot_of`` from ``slot_identity``."""
        self.slot_of.fill_(NOT_IN_POOL)
        slots = torch.arange(self.num_slots, dtype=torch.int32, device=self.slot_of.device)
        self.slot_of[self.slot_identity] = slots
        self.slot_of[NOT_IN_POOL] = NOT_IN_POOL

    def lookup(self, identities: Tensor) -> Tensor:
        """Slots of identities (B,), int64 (B,); NOT_IN_POOL where there is none."""
        return self.slot_of[identities].long()

    @torch.no_grad()
    def write(self, identities: Tensor, features: Tensor) -> PoolWrite:
        """Write gallery features in batch order.

        An identity that is not in the pool takes the slot that was used longest ago, and row 0;
        one that is gets the row that is due. Of more than two features of one identity in the
        batch the last two stand. Identities of this batch are never evicted by it. A feature that is
        not finite is not written, for it would spoil every softmax over the pool: the row keeps
        what the identity had there, or becomes 0 for one that was not in the pool.

        Args:
            identities: int64 (B,), at most K different ones.
            features: (B, D); normalised here.
        Returns:
            A PoolWrite, which ``undo`` takes back.
        """
        batch = len(identities)
        occurrence, count, first, same_row_last = _occurrences(identities)
        known_slot = self.lookup(identities)
        known = known_slot != NOT_IN_POOL

        # The k-th unknown identity takes the k-th least recently used slot; those of this batch are
        # touched first, which puts them out of reach.
        touched = torch.where(known, self.clock + batch, torch.iinfo(torch.int64).min)
        recency = self.last_used.scatter_reduce(0, known_slot.clamp(min=0), touched, "amax")
        oldest = recency.topk(min(batch, self.num_slots), largest=False, sorted=True).indices
        turn = (~known & (occurrence == 0)).cumsum(0) - 1
        slot = torch.where(known, known_slot, oldest[turn.clamp(min=0)])[first]

        due = torch.where(known, self.due_row[slot], 0)
        row = (due + occurrence) % 2
        evicted = torch.where(known | (occurrence > 0), NOT_IN_POOL, self.slot_identity[slot])
        before = {
            "identities": torch.where(known, NOT_IN_POOL, identities),
            "rows": self.rows[row, slot],
            "slot_identity": self.slot_identity[slot],
            "last_used": self.last_used[slot],
            "due_row": self.due_row[slot],
            "clock": self.clock.clone(),
        }

        # Where several entries go to one place they all carry the same value: what the last brings.
        time = self.clock + torch.arange(batch, device=slot.device)
        self.slot_of[evicted] = NOT_IN_POOL
        self.slot_of[identities] = slot.int()
        self.slot_identity[slot] = identities
        self.last_used.scatter_reduce_(0, slot, time, "amax")
        self.due_row[slot] = (due + count) % 2
        unit = normalize(features.to(self.rows.dtype))[same_row_last]
        instead = torch.where(known[:, None], before["rows"], 0)
        self.rows[row, slot] = torch.where(unit.isfinite().all(1, keepdim=True), unit, instead)
        self.clock += batch
        return PoolWrite(slot, row, known | (count > 1), evicted, before)

    @torch.no_grad()
    def undo(self, write: PoolWrite):
        """Put the pool back to what it was before its last write."""
        before = write.before
        self.slot_of[before["identities"]] = NOT_IN_POOL
        # Evicted identities get their slots back. The entry of NOT_IN_POOL is overwritten on the
        # way (identities that took a free slot, or had one) and mended after.
        self.slot_of[write.evicted] = write.slot.int()
        self.slot_of[NOT_IN_POOL] = NOT_IN_POOL
        self.slot_identity[write.slot] = before["slot_identity"]
        self.last_used[write.slot] = before["last_used"]
        self.due_row[write.slot] = before["due_row"]
        self.rows[write.row, write.slot] = before["rows"]
        self.clock.copy_(before["clock"])

    def fill(self) -> Tensor:
        """Share of the slots that are taken, float ()."""
        return (self.slot_identity != NOT_IN_POOL).float().mean()


def _occurrences(identities: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each of B entries, int64 (B,) each: how many equal ones come before it, how many equal
    ones there are, where the first of them is, and where the last that shares its parity is."""
    batch = len(identities)
    ordered, position = identities.sort(stable=True)
    place = torch.arange(batch, device=identities.device)
    starts_group = torch.ones_like(place, dtype=torch.bool)
    starts_group[1:] = ordered[1:] != ordered[:-1]
    start = torch.where(starts_group, place, 0).cummax(0).values
    group = starts_group.cumsum(0) - 1
    count = torch.zeros_like(place).scatter_add_(0, group, torch.ones_like(place))[group]
    occurrence = place - start
    last = count - 1
    same_parity_last = start + last - (last - occurrence) % 2

    in_batch_order = torch.empty_like(place).scatter_(0, position, place)
    return (occurrence[in_batch_order], count[in_batch_order],
            position[start][in_batch_order], position[same_parity_last][in_batch_order])
