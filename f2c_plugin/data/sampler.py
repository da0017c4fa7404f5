"""The dual sampler: which images make up each batch (paper, section 3.2, "dual-data loaders")."""

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from f2c_plugin.data.identities import IdentityIndex, Ints, Labels
from f2c_plugin.data.recordio import Int64s
from f2c_plugin.errors import InputError
from f2c_plugin.utils.distributed import this_rank

log = logging.getLogger(__name__)

UInt64s = NDArray[np.uint64]

_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio


def _permuted(positions: Int64s, sizes: Int64s, keys: UInt64s) -> Int64s:
    """Where random permutations take ``positions`` (n,), int64 (n,).

    Position i goes to a number below ``sizes[i]``, as the round keys ``keys[:, i]`` decide. ``sizes`` (n,) and
    ``keys`` (_ROUNDS, n) are broadcast. The permutations are not stored but computed: a Feistel network permutes the
    bits of the position. Results outside the range go through the network again until they are inside (cycle
    walking), which keeps the mapping one-to-one.
    """
    numbers = positions.astype(np.uint64)
    sizes = np.broadcast_to(sizes, len(numbers))
    keys = np.broadcast_to(keys, (_ROUNDS, len(numbers)))
    half_bits = np.maximum(1, (np.frexp(sizes - 1)[1] + 1) // 2).astype(np.uint64)  # frexp gives the length in bits
    outside = np.arange(len(numbers))
    while len(outside):
        numbers[outside] = _network(numbers[outside], half_bits[outside], keys[:, outside])
        outside = outside[numbers[outside] >= sizes[outside].astype(np.uint64)]
    return numbers.astype(np.int64)


def _network(bits: UInt64s, half_bits: UInt64s, keys: UInt64s) -> UInt64s:
    half_mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = bits >> half_bits, bits & half_mask
    for key in keys:
        mixed = (right + key) * _GOLDEN
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        left, right = right, left ^ ((mixed >> np.uint64(32)) & half_mask)
    return left << half_bits | right


def _mixed(bits: UInt64s) -> UInt64s:
    """The output function of SplitMix64: one-to-one, and every bit depends on every other."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


class ShuffledPasses:
    """An endless stream of the numbers 0 … size − 1: pass after pass, each in another random order.

    Every number comes once in a pass. Any part of the stream can be read directly and depends on the
    seed alone.
    """

    def __init__(self, size: int, seed: Sequence[int]):
        self.size, self.seed = size, seed

    def take(self, positions: Int64s) -> Int64s:
        """The numbers at ``positions`` (n,) of the stream, int64 (n,). Those at position p are of pass p // size."""
        taken = np.empty_like(positions)
        passes, positions = np.divmod(positions, self.size)
        for number in np.unique(passes).tolist():
            keys = np.random.default_rng([*self.seed, number]).integers(1 << 64, size=(_ROUNDS, 1), dtype=np.uint64)
            inside = passes == number
            taken[inside] = _permuted(positions[inside], np.array(self.size), keys)
        return taken


class ShuffledPairs:
    """Two images of an identity for each of its visits, so that all of its images come equally often.

    The images of an identity form an endless stream of random permutations, from which visit v takes items 2v and
    2v + 1. After v visits, each of n images has come ⌊2v / n⌋ or ⌈2v / n⌉ times; after n visits, exactly twice.

    The two images of a visit differ: if n is odd, a visit may take the last image of a permutation and the first of
    the next, and if these are the same, the first two of the next change places. Any visit can be read directly and
    depends on seed and identity alone.
    """

    def __init__(self, seed: Sequence[int]):
        self.key = np.random.default_rng(seed).integers(1 << 64, dtype=np.uint64)

    def take(self, identities: Ints, sizes: Int64s, visits: Int64s) -> Int64s:
        """Two different numbers below ``sizes[i]`` for visit ``visits[i]`` of ``identities[i]``, int64 (2, n).

        All arguments are (n,); sizes are 2 or more, and an identity always has the same.
        """
        identities, sizes = np.tile(identities, 2), np.tile(sizes, 2)
        numbers, positions = np.divmod(np.concatenate([2 * visits, 2 * visits + 1]), sizes)
        # The first two items of permutations that begin with the second image of a visit.
        crossing = np.flatnonzero((numbers * sizes % 2 == 1) & (positions < 2))
        of, size, number = identities[crossing], sizes[crossing], numbers[crossing]
        last, first = self._items(np.tile(of, 2), np.tile(size, 2), np.concatenate([number - 1, number]),
                                  np.concatenate([size - 1, np.zeros_like(size)])).reshape(2, -1)
        positions[crossing] ^= last == first
        return self._items(identities, sizes, numbers, positions).reshape(2, -1)

    def _items(self, identities: Ints, sizes: Int64s, numbers: Int64s, positions: Int64s) -> Int64s:
        """Items ``positions`` of permutations ``numbers``, all (n,)."""
        state = _mixed(self.key + identities.astype(np.uint64) * _GOLDEN)
        state = _mixed(state + numbers.astype(np.uint64) * _GOLDEN)
        return _permuted(positions, sizes, _mixed(state + np.arange(1, _ROUNDS + 1, dtype=np.uint64)[:, None] * _GOLDEN))


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

    - a pass of the identity-based loader takes every identity with two images or more once, and a pass
      of the instance-based loader every image once; passes continue across epochs;
    - the two images of a pair differ, and over the passes every image of an identity is equally often in
      its pairs: the counts of two images never differ by more than 1;
    - no identity appears twice among the pairs of a step, on one rank or several;
    - batches depend only on (seed, step, rank, world_size) and ``origin``, the Position from which both
      passes continue. It is not the start if a training resumes with another global batch size.

    To satisfy the first two together, a pass of the identity-based loader is spread evenly over a
    whole number of steps, and images of the instance-based loader fill the batches. If no identity has
    two images, they make up all of the batches, and a warning is logged.

    Args:
        batch_size: images per rank and step; even, unless ``identity_rate`` is 0.
        num_steps: steps per epoch; None takes images // (batch_size · world_size), as arcface_torch does.
        identity_rate: largest share of the batch that the identity-based loader fills, 0 to 1; the paper's is 2/3.
        seed: the same on all ranks.
        rank, world_size: None takes the value of the process group, or 0 and 1 without one.

    Raises InputError if the batch cannot be split into pairs, an epoch has no steps, or an argument is out of range.
    """

    def __init__(self, index: IdentityIndex, batch_size: int, num_steps: int | None = None, identity_rate: float = 0.0,
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
        # Which identities have two images or more, by position in the index.
        self.paired = np.flatnonzero(np.diff(index.starts) > 1 if self.pairs_per_step else []).astype(index.grouped.dtype)
        if self.pairs_per_step and not len(self.paired):
            log.warning("no identity has two images, so there are no pairs: every batch holds random images")
            self.pairs_per_step = 0
        self.identities = ShuffledPasses(len(self.paired), (seed, 0))
        self.images = ShuffledPasses(len(index), (seed, 1))
        self.pairs = ShuffledPairs((seed, 2))

    @classmethod
    def from_labels(cls, labels: Labels, batch_size: int, identity_rate: float = 0.0, seed: int = 0,
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
            return self.images.take(np.arange(start, start + self.batch_size))
        end = self._identities_before(step + 1)
        pairs = self._pairs(np.arange(first + self.rank, end, self.world_size))  # (2, p)

        # Each rank fills its own batch: ranks with one pair less take two more images.
        per_rank = [self.batch_size - 2 * len(range(first + rank, end, self.world_size)) for rank in range(self.world_size)]
        start += sum(per_rank[:self.rank])
        instances = self.images.take(np.arange(start, start + per_rank[self.rank])).reshape(2, -1)
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

    def _pairs(self, positions: Int64s) -> Int64s:
        """The images of the pairs at ``positions`` (p,) of the identity-based loader, by position in the dataset, (2, p)."""
        chosen = self.paired[self.identities.take(positions)]
        start = self.index.starts[chosen]
        images = self.pairs.take(chosen, self.index.starts[chosen + 1] - start, positions // self.identities.size)
        return self.index.grouped[start + images].astype(np.int64)
