"""Which identities are in memory: K slots, given to identities by exact LRU (paper, section 3.3)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from f2c_plugin.errors import PoolStateError
from f2c_plugin.utils.distributed import WHOLE, Shard
from f2c_plugin.utils.inputs import check_room
from f2c_plugin.utils.sharded_rows import ShardedRows
from f2c_plugin.utils.tensors import all_different, first_of_equal, true_of_all

NOT_IN_POOL = -1


class Places(NamedTuple):
    """The slots of a batch of B identities, an entry for each, in batch order.

    Attributes:
        slot: int64 (B,) the slot that the identity has or gets.
        was_in_pool: bool (B,) whether the identity had a slot before the batch.
        evicted: int64 (B,) the identity that loses its slot to this one; NOT_IN_POOL if none does, and for all but the
            first entry of an identity.
        first: int64 (B,) the first entry of the same identity.
        is_first: bool (B,) whether the entry is that.
    """

    slot: Tensor
    was_in_pool: Tensor
    evicted: Tensor
    first: Tensor
    is_first: Tensor


class SlotTable(ShardedRows):
    """Slots with ``num_rows`` vectors each, and whose they are: what a head and its monitor read of a pool or a queue.

    Args: as of ``ShardedRows``; and
        num_identities: identities are numbered 0 … num_identities − 1.

    Attributes:
        slot_identity: int64 (K,) the identity in the slot, or NOT_IN_POOL.
        last_used: int64 (K,) when the slot was last written or its identity came. Slots not yet taken have times before 0,
            the lowest slot the earliest, so "least recently used" is the one rule for both.
        clock: int64 () images seen so far.
        fused: whether the passes over the slots may use the fused kernels.
        size_key: the config key that decides how many there are.
    """

    slot_identity: Tensor
    last_used: Tensor
    clock: Tensor
    fused: bool = True
    size_key = "f2c_pool_rate"

    def __init__(self, num_rows: int, num_slots: int, num_identities: int, embedding_size: int, seed: int = 0,
                 dtype: torch.dtype = torch.float32, shard: Shard = WHOLE):
        super().__init__(num_rows, num_slots, embedding_size, seed, dtype, shard)
        self.num_identities = num_identities
        self.register_buffer("slot_identity", torch.full((num_slots,), NOT_IN_POOL))
        self.register_buffer("last_used", torch.arange(-num_slots, 0))
        self.register_buffer("clock", torch.zeros((), dtype=torch.int64))
        self.register_load_state_dict_post_hook(type(self)._after_loading)  # pyright: ignore[reportUnknownMemberType]

    @property
    def embedding_size(self) -> int:
        return self.rows.size(2)

    def fill(self) -> Tensor:
        """Share of the slots that are taken, float ()."""
        return (self.slot_identity != NOT_IN_POOL).float().mean()

    def require_room(self, num_images: int) -> None:
        """Raise ConfigError unless there is room for a batch of ``num_images`` gathered images."""
        check_room(num_images, self.num_identities, self.num_slots)

    def validate(self):
        """Check the invariants that hold between any two operations. Reads everything: not for every step.

        Raises:
            PoolStateError: lists the broken invariants.
        """
        if broken := [what for what, true in self.invariants().items() if not true]:
            raise PoolStateError(f"the pool is damaged; it does not hold that {'; that '.join(broken)}")

    def invariants(self) -> dict[str, Tensor | bool]:
        """What must hold, and whether it does."""
        taken = self.slot_identity != NOT_IN_POOL
        identities, recency = self.slot_identity[taken], self.last_used[taken]
        return {
            "the clock is not negative": self.clock >= 0,
            "identities of slots are numbers from 0 to num_identities": (
                (identities >= 0) & (identities < self.num_identities)).all(),
            "every slot was used at a different time, before the clock": (
                all_different(recency) and bool(((recency >= 0) & (recency < self.clock)).all())),
            "rows are finite": true_of_all(self.rows, torch.isfinite)}

    def _after_loading(self, _: Any = None):
        """Check what was loaded."""
        self.validate()


class Slots(SlotTable):
    """K slots, each of one identity with ``num_rows`` vectors; assigned by exact LRU.

    All state is in buffers. Operations work on whole tensors of fixed shapes on the slots' device, so none makes the CPU
    wait for the GPU. Only ``slot_of`` grows with the number of identities. Equal batches on equal states give equal states,
    so all ranks keep equal tables.

    Args:
        num_rows: vectors of a slot.
        num_slots: K.
        num_identities: identities are numbered 0 … num_identities − 1.
        embedding_size: D.
        seed: of the random vectors in slots not yet taken; the same on all ranks.
        dtype: of the rows; float32, bfloat16 or float16.
        shard: the slots whose rows this rank holds. Everything else is the same on all ranks.

    Attributes: as of ``SlotTable``.
    """

    slot_of: Tensor

    def __init__(self, num_rows: int, num_slots: int, num_identities: int, embedding_size: int, seed: int = 0,
                 dtype: torch.dtype = torch.float32, shard: Shard = WHOLE):
        super().__init__(num_rows, num_slots, num_identities, embedding_size, seed, dtype, shard)
        # Derived from slot_identity. The last entry stands for NOT_IN_POOL and takes the writes
        # that are meant for no identity.
        self.register_buffer("slot_of", torch.full((num_identities + 1,), NOT_IN_POOL, dtype=torch.int32),
                             persistent=False)

    def lookup(self, identities: Tensor) -> Tensor:
        """Slots of identities (B,), int64 (B,); NOT_IN_POOL where there is none."""
        return self.slot_of[identities].long()

    def places(self, identities: Tensor) -> Places:
        """Decide where a batch of identities goes. Nothing changes yet.

        An identity that is not in the pool takes the least recently used slot. A batch never evicts its own identities.

        Args:
            identities: int64 (B,), at most K different ones.
        """
        batch = len(identities)
        first, is_first = first_of_equal(identities)
        known_slot = self.lookup(identities)
        was_in_pool = known_slot >= 0
        is_new = is_first & ~was_in_pool

        # The k-th new identity takes the k-th least recently used slot. The slots of this batch are put out of reach before;
        # NOT_IN_POOL, as an index, is the place behind the last slot.
        recency = pad(self.last_used, (0, 1)).index_fill_(0, known_slot, torch.iinfo(torch.int64).max)[:-1]
        oldest = recency.topk(min(batch, self.num_slots), largest=False, sorted=True).indices
        slot = torch.where(was_in_pool, known_slot, oldest[is_new.cumsum(0) - 1])[first]
        evicted = self.slot_identity[slot].masked_fill(~is_new, NOT_IN_POOL)
        return Places(slot, was_in_pool, evicted, first, is_first)

    def occupy(self, identities: Tensor, slot: Tensor, evicted: Tensor):
        """Give the slots (B,) to the identities (B,), whose evicted ones (B,) lose theirs, and count the batch."""
        # Entries for the same place all hold the same value, so their order does not matter.
        self.slot_of.index_fill_(0, evicted, NOT_IN_POOL)
        self.slot_of[identities] = slot.int()
        self.slot_identity[slot] = identities
        self.last_used.scatter_reduce_(0, slot, self.clock + torch.arange(len(slot), device=slot.device), "amax")
        self.clock += len(slot)

    def invariants(self) -> dict[str, Tensor | bool]:
        taken = self.slot_identity != NOT_IN_POOL
        slots = torch.arange(self.num_slots, device=taken.device)
        identities = self.slot_identity[taken]
        table = self.slot_of[identities.clamp(0, self.num_identities)]
        return super().invariants() | {
            "no identity has two slots": all_different(identities),
            "slots not yet taken are in the order of their numbers": (
                self.last_used[~taken] == (slots - self.num_slots)[~taken]).all(),
            "the table finds every identity in its slot": (table == slots[taken]).all(),
            "the table finds no other": (self.slot_of != NOT_IN_POOL).sum() == len(identities),
        }

    def _after_loading(self, _: Any = None):
        """Derive ``slot_of`` from ``slot_identity``, and check what was loaded."""
        taken = (self.slot_identity >= 0) & (self.slot_identity < self.num_identities)
        slots = torch.arange(self.num_slots, dtype=torch.int32, device=taken.device)
        self.slot_of.fill_(NOT_IN_POOL)
        self.slot_of[self.slot_identity[taken]] = slots[taken]
        self.validate()
