"""The Dynamic Class Pool (paper, section 3.3): which identities are at hand, and their gallery features."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import normalize

from f2c_plugin.ranks import WHOLE, Shard

NOT_IN_POOL = -1
_FILL_BLOCK = 1 << 10  # slots whose first random rows come from one generator


class Placement(NamedTuple):
    """Where a batch of B gallery features goes, an entry for each, in batch order.

    Attributes:
        slot: int64 (B,) the slot each feature's identity has or gets.
        row: int64 (B,) the row it is written to.
        renewed: bool (B,) whether the identity was in the pool when one of its features came.
        evicted: int64 (B,) the identity that loses its slot to this feature, or NOT_IN_POOL.
        source: int64 (B,) the feature that stands in this place in the end: of several that go to
            one row, the last.
        identities, known: int64 and bool (B,) whose features they are, and who had a slot before.
        due_row: int64 (B,) which row of the slot is due after the batch.
    """

    slot: Tensor
    row: Tensor
    renewed: Tensor
    evicted: Tensor
    source: Tensor
    identities: Tensor
    known: Tensor
    due_row: Tensor


class PoolWrite(NamedTuple):
    """What one write did to the pool.

    Attributes:
        placement: where the features went.
        num_skipped: int64 () features that were not finite and therefore not written.
        before: what ``undo`` puts back.
    """

    placement: Placement
    num_skipped: Tensor
    before: dict[str, Tensor]


class DynamicClassPool(nn.Module):
    """K slots, each of one identity with its last two gallery features; placed by exact LRU.

    All state is in buffers, and every operation is on whole tensors of fixed shapes, on the device
    of the pool, so that none of them makes the host wait. Nothing but memory (``slot_of``) grows
    with the number of identities. The same writes on the same state give the same state, bit for
    bit, so ranks that write the same gathered features keep equal pools.

    Args:
        num_slots: K.
        num_identities: identities are numbered 0 … num_identities − 1.
        embedding_size: D.
        seed: of the random vectors in slots not yet taken; the same on all ranks.
        dtype: of the rows; float32, bfloat16 or float16.
        shard: the slots whose rows this rank holds. Everything else is the same on all ranks.

    Attributes:
        rows: (2, K', D), unit vectors; K' is K unless sharded. Slots not yet taken hold random ones.
        slot_identity: int64 (K,) who has the slot, or NOT_IN_POOL.
        last_used: int64 (K,) time of the last write; slots not yet taken have times before 0, the
            lowest slot the earliest, so that "the least recently used" is the one rule for both.
        due_row: int64 (K,) the row that the next write goes to.
        clock: int64 () writes so far.
    """

    def __init__(self, num_slots: int, num_identities: int, embedding_size: int, seed: int = 0,
                 dtype: torch.dtype = torch.float32, shard: Shard = WHOLE):
        super().__init__()
        self.shard = shard
        self.num_slots = num_slots
        self.first_slot, self.end_slot = shard.range_of(num_slots)
        self.rows: Tensor
        self.register_buffer("rows", self._random_rows(embedding_size, seed, dtype))
        self.register_buffer("slot_identity", torch.full((num_slots,), NOT_IN_POOL))
        self.register_buffer("last_used", torch.arange(-num_slots, 0))
        self.register_buffer("due_row", torch.zeros(num_slots, dtype=torch.int64))
        self.register_buffer("clock", torch.zeros((), dtype=torch.int64))
        # Follows from slot_identity. Its last entry stands for NOT_IN_POOL and takes the writes
        # that have nobody to go to.
        self.register_buffer("slot_of", torch.full((num_identities + 1,), NOT_IN_POOL, dtype=torch.int32),
                             persistent=False)
        self.register_load_state_dict_post_hook(DynamicClassPool._after_loading)

    @property
    def num_identities(self) -> int:
        return len(self.slot_of) - 1

    def _random_rows(self, embedding_size, seed, dtype):
        """Block by block, so that a rank draws what is its own only, and the same for any number of ranks."""
        rows = torch.empty(2, self.end_slot - self.first_slot, embedding_size, dtype=dtype)
        for block in range(self.first_slot // _FILL_BLOCK, -(-self.end_slot // _FILL_BLOCK)):
            # Mixed by NumPy: torch's CPU generator takes only 32 bits of its seed.
            mixed, = np.random.SeedSequence([seed, block]).generate_state(1)
            generator = torch.Generator().manual_seed(int(mixed))
            drawn = normalize(torch.randn(2, _FILL_BLOCK, embedding_size, generator=generator), dim=2)
            start = max(block * _FILL_BLOCK, self.first_slot)
            end = min((block + 1) * _FILL_BLOCK, self.end_slot)
            rows[:, start - self.first_slot:end - self.first_slot] = drawn[:, start - block * _FILL_BLOCK:][:, :end - start]
        return rows

    def lookup(self, identities: Tensor) -> Tensor:
        """Slots of identities (B,), int64 (B,); NOT_IN_POOL where there is none."""
        return self.slot_of[identities].long()

    def place(self, identities: Tensor) -> Placement:
        """Decide where gallery features of ``identities`` go. The pool stays as it is.

        An identity that is not in the pool takes the slot that was used longest ago, and row 0;
        one that is gets the row that is due. Of more than two features of one identity in the
        batch the last two stand. Identities of this batch are never evicted by it.

        Args:
            identities: int64 (B,), at most K different ones.
        """
        batch = len(identities)
        occurrence, count, first, same_row_last = occurrences(identities)
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
        evicted = torch.where(known | (occurrence > 0), NOT_IN_POOL, self.slot_identity[slot])
        return Placement(slot, (due + occurrence) % 2, known | (count > 1), evicted, same_row_last, identities, known,
                         (due + count) % 2)

    @torch.no_grad()
    def write(self, placement: Placement, features: Tensor) -> PoolWrite:
        """Write gallery features to where ``place`` has put them; the pool must not have changed since.

        A feature that is not finite is not written, for it would spoil every softmax over the pool: in
        its place stands the identity's feature from the other row, or 0 if it was not in the pool.

        Args:
            features: (B, D) in the order of the placement; normalised here.
        Returns:
            A PoolWrite, which ``undo`` takes back.
        """
        slot, row = placement.slot, placement.row
        place, entry, own = self._own(slot)
        before = {
            "rows": self.rows[row[entry], place],
            "slot_identity": self.slot_identity[slot],
            "last_used": self.last_used[slot],
            "due_row": self.due_row[slot],
            "clock": self.clock.clone(),
        }

        # Where several entries go to one place they all carry the same value: what the last brings.
        batch = len(slot)
        time = self.clock + torch.arange(batch, device=slot.device)
        self.slot_of[placement.evicted] = NOT_IN_POOL
        self.slot_of[placement.identities] = slot.int()
        self.slot_identity[slot] = placement.identities
        self.last_used.scatter_reduce_(0, slot, time, "amax")
        self.due_row[slot] = placement.due_row
        self.clock += batch

        unit = normalize(features)
        finite = unit.isfinite().all(1) & features.norm(dim=1).isfinite()
        stands = placement.source[entry]
        # Not what the row held: that may be of an identity that was evicted since.
        instead = torch.where(placement.known[entry, None], self.rows[1 - row[entry], place], 0)
        written = torch.where(finite[stands, None], unit[stands].to(self.rows.dtype), instead)
        self.rows[row[entry], place] = torch.where(own.any(), written, before["rows"])
        return PoolWrite(placement, (~finite).sum(), before)

    @torch.no_grad()
    def undo(self, write: PoolWrite):
        """Put the pool back to what it was before its last write."""
        placement, before = write.placement, write.before
        slot = placement.slot
        self.slot_of[torch.where(placement.known, NOT_IN_POOL, placement.identities)] = NOT_IN_POOL
        # Evicted identities get their slots back. The entry of NOT_IN_POOL is overwritten on the
        # way (identities that took a free slot, or had one) and mended after.
        self.slot_of[placement.evicted] = slot.int()
        self.slot_of[NOT_IN_POOL].fill_(NOT_IN_POOL)
        self.slot_identity[slot] = before["slot_identity"]
        self.last_used[slot] = before["last_used"]
        self.due_row[slot] = before["due_row"]
        self.clock.copy_(before["clock"])
        place, entry, _ = self._own(slot)
        self.rows[placement.row[entry], place] = before["rows"]

    def _own(self, slot):
        """(place in ``rows``, entry, own), int64, int64 and bool (B,), of entries that go to ``slot``.

        Entries of other ranks' slots repeat the first entry that is this rank's own: then shapes
        are fixed, and writing them all changes nothing but what is own. If none is, all of them
        stand for the first slot, which must keep what it has.
        """
        place, own = self._local(slot)
        first = own.to(torch.uint8).argmax()
        entry = torch.where(own, torch.arange(len(slot), device=slot.device), first)
        return place[entry], entry, own

    def _local(self, slots):
        """Place in ``rows`` of slots (A,), and whether this rank holds it; what it does not hold has any place."""
        own = (slots >= self.first_slot) & (slots < self.end_slot)
        return (slots - self.first_slot).clamp(0, self.end_slot - self.first_slot - 1), own

    def rows_at(self, slots: Tensor, count: int = 2) -> Tensor:
        """The first ``count`` rows of slots (A,), (count, A, D), at least float32.

        What stands for NOT_IN_POOL means nothing. If the pool is sharded, all ranks call this
        together and ask for the same slots.
        """
        place, own = self._local(slots)
        rows = at_least_float32(self.rows[:count, place])
        if self.shard.world_size > 1:
            rows = self.shard.sum(torch.where(own[:, None], rows, 0))
        return rows

    def renewed_at(self, slots: Tensor, placement: Placement) -> Tensor:
        """Whether the placement renews each of slots (A,), bool (A,)."""
        renewed = torch.zeros(self.num_slots, dtype=torch.bool, device=slots.device)
        renewed[placement.slot] = placement.renewed
        return renewed[slots]

    def validate(self):
        """Check what must hold between any two operations. Looks at everything: not for every step.

        Raises:
            ValueError: lists what does not hold; the state is damaged.
        """
        taken = self.slot_identity != NOT_IN_POOL
        identities, recency = self.slot_identity[taken], self.last_used[taken]
        self._raise_unless({
            "the clock has not gone back": self.clock >= 0,
            "identities of slots are numbers from 0 to num_identities": ((identities >= 0)
                                                                         & (identities < self.num_identities)).all(),
            "no identity has two slots": identities.unique().numel() == identities.numel(),
            "every slot was used at a time of its own, before the clock": (recency.unique().numel() == recency.numel()
                                                                           and ((recency >= 0) & (recency < self.clock)).all()),
            "slots not yet taken come in the order of their numbers": (
                self.last_used[~taken] == torch.arange(-self.num_slots, 0, device=taken.device)[~taken]).all(),
            "due rows are 0 or 1": ((self.due_row == 0) | (self.due_row == 1)).all(),
            "rows are finite": self.rows.isfinite().all(),
            "rows are unit vectors or 0": ((self.rows.float().norm(dim=2) - 1).abs() < 0.02).logical_or(
                (self.rows == 0).all(2)).all(),
        })
        slots = torch.arange(self.num_slots, device=taken.device)
        self._raise_unless({
            "the table finds every identity in its slot": (self.slot_of[identities] == slots[taken]).all(),
            "the table finds no other": (self.slot_of != NOT_IN_POOL).sum() == identities.numel(),
        })

    def _raise_unless(self, holds):
        broken = [what for what, true in holds.items() if not true]
        if broken:
            raise ValueError(f"the pool is damaged; it does not hold that {'; that '.join(broken)}")

    def _after_loading(self, _=None):
        """Derive ``slot_of`` from ``slot_identity``, and see whether what was loaded is a pool."""
        taken = (self.slot_identity >= 0) & (self.slot_identity < self.num_identities)
        slots = torch.arange(self.num_slots, dtype=torch.int32, device=taken.device)
        self.slot_of.fill_(NOT_IN_POOL)
        self.slot_of[self.slot_identity[taken]] = slots[taken]
        self.validate()

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.shard.world_size > 1:
            destination[prefix + "rows"] = self._rows_of_all_ranks()

    def _rows_of_all_ranks(self):
        """(2, K, D) in main memory: every rank's checkpoint is whole, and fits any number of ranks."""
        whole = torch.empty(2, self.num_slots, self.rows.size(2), dtype=self.rows.dtype)
        for rank in range(self.shard.world_size):
            start, end = Shard(rank, self.shard.world_size).range_of(self.num_slots)
            part = self.rows.clone() if rank == self.shard.rank else self.rows.new_empty(2, end - start, self.rows.size(2))
            distributed.broadcast(part, rank)
            whole[:, start:end] = part.cpu()
        return whole

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        error_messages = rest[-1]
        rows = state_dict.get(prefix + "rows")
        if rows is not None and (rows.dim() != 3 or rows.size(1) != self.num_slots):
            error_messages.append(f"{prefix}rows: size mismatch, {tuple(rows.shape)} for a pool of {self.num_slots} slots")
            return  # and leave the pool as it is
        if rows is not None:
            if not rows.isfinite().all():  # all of them, so that all ranks refuse what one has to
                error_messages.append(f"{prefix}rows: the pool is damaged; it does not hold that rows are finite")
                return
            state_dict = state_dict | {prefix + "rows": rows[:, self.first_slot:self.end_slot]}
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def fill(self) -> Tensor:
        """Share of the slots that are taken, float ()."""
        return (self.slot_identity != NOT_IN_POOL).float().mean()


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor as it is, or in float32 if it is in half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def occurrences(identities: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
