"""The Dynamic Class Pool (paper, section 3.3): which identities are in memory, and their gallery features."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from f2c_plugin.errors import PoolStateError
from f2c_plugin.utils.distributed import WHOLE, Shard
from f2c_plugin.utils.sharded_rows import ShardedRows
from f2c_plugin.utils.tensors import all_different, lengths, occurrences

NOT_IN_POOL = -1
_UNIT_TOLERANCE = 0.02  # of the length of a row; bfloat16 rounds by less


class SlotAssignment(NamedTuple):
    """Where a batch of B gallery features goes, an entry for each, in batch order.

    Attributes:
        identities: int64 (B,) whose features they are.
        slot: int64 (B,) the slot that the identity has or gets.
        row: int64 (B,) the row that the feature goes to.
        next_row: int64 (B,) the row that the slot's next feature goes to, after the batch.
        was_in_pool: bool (B,) whether the identity had a slot before the batch.
        has_two_keys: bool (B,) whether the identity was in the pool when one of its features came:
            the second view shows row 1 of its slot.
        evicted: int64 (B,) the identity that loses its slot to this feature, or NOT_IN_POOL.
        last: int64 (B,) the last feature of the batch that goes to the same row of the same slot.
    """

    identities: Tensor
    slot: Tensor
    row: Tensor
    next_row: Tensor
    was_in_pool: Tensor
    has_two_keys: Tensor
    evicted: Tensor
    last: Tensor


@dataclass(frozen=True)
class PoolView:
    """The pool as a batch of B gallery features leaves it. Valid until the pool itself changes.

    Attributes:
        assignment: where the features go.
        features: (B, D) unit vectors in the pool's dtype. Entries that go to the same place hold the
            same feature: the last one.
        finite: bool (B,) whether ``features`` are finite.
        num_not_finite: int64 () gallery features of the batch that are not finite.
        slot_of: the pool's table.
    """

    assignment: SlotAssignment
    features: Tensor
    finite: Tensor
    num_not_finite: Tensor
    slot_of: Tensor

    def lookup(self, identities: Tensor) -> Tensor:
        """Slots of identities (P,) in this view, int64 (P,); NOT_IN_POOL where there is none."""
        new = self.assignment
        in_batch = identities[:, None] == new.identities  # (P, B)
        before = self.slot_of[identities].long()
        evicted = (before[:, None] == new.slot).any(1)  # unless the identity is in the batch itself
        assigned = new.slot[in_batch.to(torch.uint8).argmax(1)]
        return torch.where(in_batch.any(1), assigned, torch.where(evicted, NOT_IN_POOL, before))

    def entries(self, chosen: Tensor) -> "PoolView":
        """The view of the ``chosen`` entries, int64 (n,)."""
        assignment = SlotAssignment(*(each[chosen] for each in self.assignment))
        return replace(self, assignment=assignment, features=self.features[chosen], finite=self.finite[chosen])

    def write_into(self, rows: Tensor, index: Tensor):
        """Write the features into ``rows`` (2, M, D), where ``index`` (B,) is the place of each feature's slot.

        A feature that is not finite would spoil every softmax over the pool. Its row gets the
        identity's feature from the other row instead, or 0 if the identity was not in the pool: what
        the row itself held may belong to an identity that was evicted since.
        """
        row = self.assignment.row
        fallback = torch.where(self.assignment.was_in_pool[:, None], rows[1 - row, index], 0)
        rows[row, index] = torch.where(self.finite[:, None], self.features.to(rows.dtype), fallback)


class DynamicClassPool(ShardedRows):
    """K slots, each of one identity with its last two gallery features; assigned by exact LRU.

    All state is in buffers. Operations work on whole tensors of fixed shapes on the pool's device, so
    none makes the CPU wait for the GPU. Only ``slot_of`` grows with the number of identities. Equal
    commits on equal states give equal states, bit for bit, so all ranks keep equal pools.

    Args:
        num_slots: K.
        num_identities: identities are numbered 0 … num_identities − 1.
        embedding_size: D.
        seed: of the random vectors in slots not yet taken; the same on all ranks.
        dtype: of the rows; float32, bfloat16 or float16.
        shard: the slots whose rows this rank holds. Everything else is the same on all ranks.

    Attributes:
        rows: (2, K', D), unit vectors; K' is K unless sharded. Slots not yet taken hold random ones.
        slot_identity: int64 (K,) the identity in the slot, or NOT_IN_POOL.
        last_used: int64 (K,) time of the last write. Slots not yet taken have times before 0, the
            lowest slot the earliest, so "least recently used" is the one rule for both.
        next_row: int64 (K,) the row that the slot's next feature goes to.
        clock: int64 () features written so far.
    """

    slot_identity: Tensor
    last_used: Tensor
    next_row: Tensor
    clock: Tensor
    slot_of: Tensor

    def __init__(self, num_slots: int, num_identities: int, embedding_size: int, seed: int = 0,
                 dtype: torch.dtype = torch.float32, shard: Shard = WHOLE):
        super().__init__(2, num_slots, embedding_size, seed, dtype, shard)
        self.register_buffer("slot_identity", torch.full((num_slots,), NOT_IN_POOL))
        self.register_buffer("last_used", torch.arange(-num_slots, 0))
        self.register_buffer("next_row", torch.zeros(num_slots, dtype=torch.int64))
        self.register_buffer("clock", torch.zeros((), dtype=torch.int64))
        # Derived from slot_identity. The last entry stands for NOT_IN_POOL and takes the writes
        # that are meant for no identity.
        self.register_buffer("slot_of", torch.full((num_identities + 1,), NOT_IN_POOL, dtype=torch.int32),
                             persistent=False)
        self.register_load_state_dict_post_hook(DynamicClassPool._after_loading)  # pyright: ignore[reportUnknownMemberType]

    @property
    def num_identities(self) -> int:
        return len(self.slot_of) - 1

    @property
    def embedding_size(self) -> int:
        return self.rows.size(2)

    def lookup(self, identities: Tensor) -> Tensor:
        """Slots of identities (B,), int64 (B,); NOT_IN_POOL where there is none."""
        return self.slot_of[identities].long()

    def fill(self) -> Tensor:
        """Share of the slots that are taken, float ()."""
        return (self.slot_identity != NOT_IN_POOL).float().mean()

    def assign_slots(self, identities: Tensor) -> SlotAssignment:
        """Decide where gallery features of ``identities`` go: which slot, which row, who is evicted.

        An identity that is not in the pool takes the least recently used slot, and row 0; one that
        is takes the slot's next row. Of more than two features of one identity the last two remain.
        A batch never evicts its own identities.

        Args:
            identities: int64 (B,), at most K different ones.
        """
        batch = len(identities)
        occurrence, count, first, last = occurrences(identities)
        known_slot = self.lookup(identities)
        was_in_pool = known_slot != NOT_IN_POOL

        # The k-th new identity takes the k-th least recently used slot. The slots of this batch are
        # touched first, which puts them out of reach.
        touched = torch.where(was_in_pool, self.clock + batch, torch.iinfo(torch.int64).min)
        recency = self.last_used.scatter_reduce(0, known_slot.clamp(min=0), touched, "amax")  # (K,)
        oldest = recency.topk(min(batch, self.num_slots), largest=False, sorted=True).indices
        turn = (~was_in_pool & (occurrence == 0)).cumsum(0) - 1
        slot = torch.where(was_in_pool, known_slot, oldest[turn.clamp(min=0)])[first]

        row = torch.where(was_in_pool, self.next_row[slot], 0)  # of the identity's first feature
        evicted = torch.where(was_in_pool | (occurrence > 0), NOT_IN_POOL, self.slot_identity[slot])
        return SlotAssignment(identities, slot, (row + occurrence) % 2, (row + count) % 2, was_in_pool,
                              was_in_pool | (count > 1), evicted, last)

    @torch.no_grad()
    def preview(self, identities: Tensor, features: Tensor) -> PoolView:
        """The pool as gallery features would leave it. The pool itself stays as it is.

        Args:
            identities: int64 (B,), at most K different ones.
            features: (B, D); normalised here.
        """
        unit = normalize(features)
        finite = unit.isfinite().all(1) & lengths(features).isfinite()  # (B,)
        assignment = self.assign_slots(identities)
        return PoolView(assignment, unit[assignment.last].to(self.rows.dtype), finite[assignment.last], (~finite).sum(),
                        self.slot_of)

    @torch.no_grad()
    def commit(self, view: PoolView):
        """Make the pool what ``view`` shows. The pool must not have changed since the preview."""
        new = view.assignment
        batch = len(new.slot)
        # Entries for the same place all hold the same value, so their order does not matter.
        self.slot_of.index_fill_(0, new.evicted, NOT_IN_POOL)
        self.slot_of[new.identities] = new.slot.int()
        self.slot_identity[new.slot] = new.identities
        self.last_used.scatter_reduce_(0, new.slot, self.clock + torch.arange(batch, device=new.slot.device), "amax")
        self.next_row[new.slot] = new.next_row
        self.clock += batch
        entry, index, any_own = self.own_entries(new.slot)
        view = view.entries(entry)
        kept = self.rows[view.assignment.row, index]
        view.write_into(self.rows, index)
        self.rows[view.assignment.row, index] = torch.where(any_own, self.rows[view.assignment.row, index], kept)

    def validate(self):
        """Check the invariants that hold between any two operations. Reads everything: not for every step.

        Raises:
            PoolStateError: lists the broken invariants.
        """
        taken = self.slot_identity != NOT_IN_POOL
        slots = torch.arange(self.num_slots, device=taken.device)
        identities, recency = self.slot_identity[taken], self.last_used[taken]
        table = self.slot_of[identities.clamp(0, self.num_identities)]
        holds = {
            "the clock is not negative": self.clock >= 0,
            "identities of slots are numbers from 0 to num_identities": (
                (identities >= 0) & (identities < self.num_identities)).all(),
            "no identity has two slots": all_different(identities),
            "every slot was used at a different time, before the clock": (
                all_different(recency) and bool(((recency >= 0) & (recency < self.clock)).all())),
            "slots not yet taken are in the order of their numbers": (
                self.last_used[~taken] == (slots - self.num_slots)[~taken]).all(),
            "next rows are 0 or 1": ((self.next_row == 0) | (self.next_row == 1)).all(),
            "rows are finite": self.rows.isfinite().all(),
            "rows are unit vectors or 0": (
                ((lengths(self.rows.float()) - 1).abs() < _UNIT_TOLERANCE) | (self.rows == 0).all(2)).all(),
            "the table finds every identity in its slot": (table == slots[taken]).all(),
            "the table finds no other": (self.slot_of != NOT_IN_POOL).sum() == len(identities),
        }
        if broken := [what for what, true in holds.items() if not true]:
            raise PoolStateError(f"the pool is damaged; it does not hold that {'; that '.join(broken)}")

    def _after_loading(self, _: Any = None):
        """Derive ``slot_of`` from ``slot_identity``, and check what was loaded."""
        taken = (self.slot_identity >= 0) & (self.slot_identity < self.num_identities)
        slots = torch.arange(self.num_slots, dtype=torch.int32, device=taken.device)
        self.slot_of.fill_(NOT_IN_POOL)
        self.slot_of[self.slot_identity[taken]] = slots[taken]
        self.validate()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any):
        if prefix + "due_row" in state_dict:  # its name in version 0.1
            state_dict = {**state_dict, prefix + "next_row": state_dict[prefix + "due_row"]}
            del state_dict[prefix + "due_row"]
        super()._load_from_state_dict(state_dict, prefix, *rest)
