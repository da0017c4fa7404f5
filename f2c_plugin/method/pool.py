"""The Dynamic Class Pool as published (paper, section 3.3): slots that hold the last two gallery features of an identity."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from f2c_plugin.method.slots import NOT_IN_POOL, Slots
from f2c_plugin.utils.distributed import WHOLE, Shard
from f2c_plugin.utils.tensors import all_finite, lengths, occurrences, true_of_all

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


class DynamicClassPool(Slots):
    """K slots, each of one identity with its last two gallery features.

    Equal commits on equal states give equal states, bit for bit, so all ranks keep equal pools.

    Args: see ``Slots``.

    Attributes:
        rows: (2, K', D), unit vectors; K' is K unless sharded. Slots not yet taken hold random ones.
        next_row: int64 (K,) the row that the slot's next feature goes to.
    """

    next_row: Tensor

    def __init__(self, num_slots: int, num_identities: int, embedding_size: int, seed: int = 0,
                 dtype: torch.dtype = torch.float32, shard: Shard = WHOLE):
        super().__init__(2, num_slots, num_identities, embedding_size, seed, dtype, shard)
        self.register_buffer("next_row", torch.zeros(num_slots, dtype=torch.int64))

    def assign_slots(self, identities: Tensor) -> SlotAssignment:
        """Decide where gallery features of ``identities`` go: which slot, which row, who is evicted.

        A new identity's feature goes to row 0, a known one's to the slot's next row. Of more than two features of one
        identity the last two remain.

        Args:
            identities: int64 (B,), at most K different ones.
        """
        occurrence, count, last = occurrences(identities)
        slot, was_in_pool, evicted, *_ = self.places(identities)
        row = torch.where(was_in_pool, self.next_row[slot], 0)  # of the identity's first feature
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
        finite = all_finite(unit) & lengths(features).isfinite()  # (B,)
        assignment = self.assign_slots(identities)
        return PoolView(assignment, unit[assignment.last].to(self.rows.dtype), finite[assignment.last], (~finite).sum(),
                        self.slot_of)

    @torch.no_grad()
    def commit(self, view: PoolView):
        """Make the pool what ``view`` shows. The pool must not have changed since the preview."""
        new = view.assignment
        self.occupy(new.identities, new.slot, new.evicted)
        self.next_row[new.slot] = new.next_row
        entry, index, any_own = self.own_entries(new.slot)
        view = view.entries(entry)
        kept = self.rows[view.assignment.row, index]
        view.write_into(self.rows, index)
        self.rows[view.assignment.row, index] = torch.where(any_own, self.rows[view.assignment.row, index], kept)

    def invariants(self) -> dict[str, Tensor | bool]:
        return super().invariants() | {
            "next rows are 0 or 1": ((self.next_row == 0) | (self.next_row == 1)).all(),
            "rows are unit vectors or 0": true_of_all(
                self.rows, lambda rows: ((lengths(rows.float()) - 1).abs() < _UNIT_TOLERANCE) | (rows == 0).all(2))}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any):
        if prefix + "due_row" in state_dict:  # its name in version 0.1
            state_dict = {**state_dict, prefix + "next_row": state_dict[prefix + "due_row"]}
            del state_dict[prefix + "due_row"]
        super()._load_from_state_dict(state_dict, prefix, *rest)
