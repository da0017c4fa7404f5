"""The dual sampler: which images make up each batch (paper, section 3.2, "dual-data loaders")."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from f2c_plugin.data.identities import IdentityIndex, Labels
from f2c_plugin.data.recordio import Int64s
from f2c_plugin.errors import InputError
from f2c_plugin.utils.distributed import this_rank


class ShuffledPasses:
    """An endless stream of the numbers 0 … size − 1: pass after pass, each in another random order.

    Every number comes once in a pass. Any part of the stream can be read directly and depends on the
    seed alone. The order of a pass is not stored but computed: a Feistel network, keyed by seed and pass,
    permutes the bits of the position. Results outside the range go through the network again until they
    are inside (cycle walking), which keeps the mapping one-to-one.
    """

    ROUNDS = 8

    def __init__(self, size: int, seed: Sequence[int]):
        self.size, self.seed = size, seed
        self.half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
        self.half_mask = np.uint64((1 << int(self.half_bits)) - 1)

    def take(self, start: int, end: int, step: int = 1) -> Int64s:
        """Every ``step``-th number of the stream from position ``start`` to before ``end``, int64."""
        positions = np.arange(start, end, step)
        taken = np.empty(len(positions), np.int64)
        for number in range(start // self.size, -(-end // self.size)):
            inside = positions // self.size == number
            taken[inside] = self._shuffled(positions[inside] % self.size, number)
        return taken

    def _shuffled(self, positions: Int64s, number: int) -> Int64s:
        keys = np.random.default_rng([*self.seed, number]).integers(1 << 64, size=self.ROUNDS, dtype=np.uint64)
        numbers = positions.astype(np.uint64)
        outside = np.arange(len(numbers))
        while len(outside):
            numbers[outside] = self._network(numbers[outside], keys)
            outside = outside[numbers[outside] >= self.size]
        return numbers.astype(np.int64)

    def _network(self, bits: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = bits >> self.half_bits, bits & self.half_mask
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & self.half_mask)
        return left << self.half_bits | right


class Position(NamedTuple):
    """How far a training has advanced in its data, summed over all ranks."""

    step: int  # since the start of training
    identities: int  # that the identity-based loader has taken
    images: int  # that the instance-based loader has taken


class DualSampler(Sampler[list[int]]):
    """Yields the batches of one rank, each a list of dataset positions.

    Use it as the ``batch_sampler`` of a DataLoader over any map-style dataset, or in a DualLoader.
    Each iteration is an epoch; the next one is the next epoch unless ``set_epoch`` chooses another.

    A batch is x ∪ y, one half each: x = I ∪ III and y = II ∪ IV. I and II hold the same identities in
    the same order, from the identity-based loader; III and IV are images from the instance-based
    loader. Over all ranks together, the sampler guarantees that

    - a pass of the identity-based loader takes every identity once, and a pass of the instance-based
      loader every image once; passes continue across epochs;
    - no identity appears twice among the pairs of a step, on one rank or several;
    - the two images of a pair differ if their identity has two;
    - batches depend only on (seed, step, rank, world_size) and ``origin``, the Position from which both
      passes continue. It is not the start if a training resumes with another global batch size.

    To satisfy the first two together, a pass of the identity-based loader is spread evenly over a
    whole number of steps, and images of the instance-based loader fill the batches.

    Args:
        batch_size: images per rank and step; even, unless ``identity_rate`` is 0.
        num_steps: steps per epoch; None takes images // (batch_size · world_size), as arcface_torch does.
        identity_rate: largest share of the batch that the identity-based loader fills, 0 to 1.
        seed: the same on all ranks.
        rank, world_size: None takes the value of the process group, or 0 and 1 without one.

    Raises InputError if the batch cannot be split into pairs, an epoch has no steps, or an argument is out of range.
    """

    def __init__(self, index: IdentityIndex, batch_size: int, num_steps: int | None = None, identity_rate: float = 2 / 3,
                 seed: int = 0, rank: int | None = None, world_size: int | None = None):
        group_rank, group_size = this_rank()
        rank = group_rank if rank is None else rank
        world_size = group_size if world_size is None else world_size
        if not 0 <= rank < world_size:
            raise InputError(f"rank={rank}, world_size={world_size}: rank must be from 0 to world_size - 1")
        if num_steps is None:
            num_steps = len(index) // max(1, batch_size * world_size)
        if batch_size < 1 or num_steps < 1:
            raise InputError(f"batch_size={batch_size} gives {num_steps} steps an epoch for {len(index)} images on "
                             f"{world_size} ranks: must be at least one step of one image; lower batch_size")
        if not 0 <= identity_rate <= 1:
            raise InputError(f"identity_rate={identity_rate}: must be from 0 to 1")
        if identity_rate and batch_size % 2:
            raise InputError(f"batch_size={batch_size}: F²C splits a batch into two halves, gallery and probe: make it even")
        self.index, self.batch_size, self.num_steps = index, batch_size, num_steps
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.epoch, self.first_step = 0, 0
        self.origin = Position(0, 0, 0)
        # The epsilon makes 2/3 of 12 exactly 8, however 2/3 was rounded.
        self.pairs_per_step = int(identity_rate * batch_size / 2 + 1e-6) * world_size
        self.identities = ShuffledPasses(len(index.numbers), (seed, 0))
        self.images = ShuffledPasses(len(index), (seed, 1))

    @classmethod
    def from_labels(cls, labels: Labels, batch_size: int, identity_rate: float = 2 / 3, seed: int = 0,
                    num_steps: int | None = None, rank: int | None = None, world_size: int | None = None) -> "DualSampler":
        """A sampler over any dataset whose item i shows identity ``labels[i]``, a whole number from 0.

        Raises InputError if the labels are not such numbers, or as the class does.
        """
        return cls(IdentityIndex.from_labels(labels), batch_size, num_steps, identity_rate, seed, rank, world_size)

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Choose the epoch of the next iteration. It skips the batches before ``first_step``, to resume inside an epoch."""
        self.epoch, self.first_step = epoch, first_step

    def position(self, step: int) -> Position:
        """The position before ``step``, counted from the start of training."""
        identities = self._identities_before(step)
        taken = (step - self.origin.step) * self.batch_size * self.world_size
        return Position(step, identities, self.origin.images + taken - 2 * (identities - self.origin.identities))

    def __len__(self) -> int:
        return self.num_steps - self.first_step

    @property
    def steps(self) -> range:
        """The steps of the next iteration, counted from the start of training."""
        start = self.epoch * self.num_steps
        return range(start + self.first_step, start + self.num_steps)

    def __iter__(self) -> Iterator[list[int]]:
        # A generator runs at the first batch, not at iter(), which a DataLoader with workers calls twice.
        steps = self.steps
        self.set_epoch(self.epoch + 1)
        for step in steps:
            yield self.batch(step).tolist()

    def batch(self, step: int) -> Int64s:
        """The batch of this rank at ``step``, counted from the start of training, int64 (batch_size,)."""
        _, first, start = self.position(step)
        if not self.pairs_per_step:
            start += self.batch_size * self.rank
            return self.images.take(start, start + self.batch_size)
        end = self._identities_before(step + 1)
        chosen = self.identities.take(first + self.rank, end, self.world_size)
        pairs = self._pairs(chosen, step)  # (2, p)

        # Each rank fills its own batch: ranks with one pair less take two more images.
        per_rank = [self.batch_size - 2 * len(range(first + rank, end, self.world_size)) for rank in range(self.world_size)]
        start += sum(per_rank[:self.rank])
        instances = np.reshape(self.images.take(start, start + per_rank[self.rank]), (2, -1))
        return np.concatenate([pairs, instances], axis=1).ravel()  # I III | II IV

    def _identities_before(self, step: int) -> int:
        """How many identities all ranks together have taken before ``step``."""
        step, taken = step - self.origin.step, self.origin.identities
        if not self.pairs_per_step:
            return taken
        rest = -taken % self.identities.size  # of the pass that ``origin`` interrupts
        steps_of_rest = -(-rest // self.pairs_per_step)
        if step < steps_of_rest:
            return taken + step * rest // steps_of_rest
        steps_per_pass = -(-self.identities.size // self.pairs_per_step)
        return taken + rest + (step - steps_of_rest) * self.identities.size // steps_per_pass

    def _pairs(self, chosen: Int64s, step: int) -> Int64s:
        """Positions of two images of each chosen identity, (2, p)."""
        rng = np.random.default_rng([self.seed, 2, step, self.rank])
        start = self.index.starts[chosen]
        count = self.index.starts[chosen + 1] - start
        first = rng.integers(count)
        # The second is any image but the first, counted on from it; an only image comes twice.
        second = (first + 1 + rng.integers(np.maximum(count - 1, 1))) % count
        return self.index.grouped[start + np.stack([first, second])].astype(np.int64)
