"""The dual sampler: which images make up each batch (paper, section 3.2, "dual-data loaders")."""

import numpy as np
from torch.utils.data import Sampler

from f2c_plugin.data.identities import IdentityIndex


class ShuffledPasses:
    """An endless stream of the numbers 0 … size−1, pass after pass, each pass in its own random order.

    Every number comes once in a pass. Any stretch of the stream can be asked for, and depends on
    the seed alone.
    """

    def __init__(self, size: int, seed):
        self.size = size
        self.seed = seed
        self._number, self._order = None, None

    def take(self, start: int, count: int) -> np.ndarray:
        """Numbers ``start`` to ``start + count`` of the stream, integers (count,)."""
        pieces = []
        while count:
            number, offset = divmod(start, self.size)
            piece = self._pass(number)[offset:offset + count]
            pieces.append(piece)
            start += len(piece)
            count -= len(piece)
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def _pass(self, number):
        if number != self._number:
            self._order = None  # before the next is made, for each takes as much memory as all else together
            order = np.arange(self.size, dtype=np.int32 if self.size < 1 << 31 else np.int64)
            np.random.default_rng([*self.seed, number]).shuffle(order)
            self._number, self._order = number, order
        return self._order


class DualSampler(Sampler):
    """Yields the batches of one rank, integers (batch_size,), positions of images.

    A batch is x ∪ y, one half each: x = I ∪ III and y = II ∪ IV. I and II hold the same
    identities in the same order, from the identity-based loader; III and IV are images from the
    instance-based loader. Guarantees, over all ranks together:

    - a pass of the identity-based loader takes every identity once, a pass of the instance-based
      loader every image once; the passes run on through the epochs;
    - no identity appears twice among the identity-based pairs of a step, on one rank or several;
    - the two images of a pair differ if their identity has two;
    - batches depend on (seed, epoch, rank, world_size) only.

    So that the first two hold at once, a pass of the identity-based loader is shared out evenly
    over a whole number of steps, and images of the instance-based loader fill the batches.

    Args:
        index: the pack's IdentityIndex.
        batch_size: images per rank and step, even if there are to be pairs.
        num_steps: steps per epoch.
        identity_rate: share of the batch that the identity-based loader fills at most, 0 to 1.
        seed: the same on all ranks.
    """

    def __init__(self, index: IdentityIndex, batch_size: int, num_steps: int, identity_rate: float = 2 / 3,
                 seed: int = 0, rank: int = 0, world_size: int = 1):
        self.index = index
        self.batch_size = batch_size
        self.num_steps = num_steps
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.epoch = 0
        # The epsilon keeps 2/3 of 12 at 8 however 2/3 was rounded.
        self.pairs_per_step = int(identity_rate * batch_size / 2 + 1e-6) * world_size
        self.identities = ShuffledPasses(len(index.numbers), (seed, 0))
        self.images = ShuffledPasses(len(index), (seed, 1))

    def set_epoch(self, epoch: int):
        """Choose the epoch that the next iteration runs through."""
        self.epoch = epoch

    def __len__(self):
        return self.num_steps

    def __iter__(self):
        first = self.epoch * self.num_steps
        return map(self.batch, range(first, first + self.num_steps))

    def batch(self, step: int) -> np.ndarray:
        """The batch of this rank at ``step``, counted from the start of training."""
        if not self.pairs_per_step:
            share = self.batch_size * self.world_size * step + self.batch_size * self.rank
            return self.images.take(share, self.batch_size)
        chosen, taken = self._identities_at(step)
        pairs = self._pairs(chosen[self.rank::self.world_size], step)  # (2, p)

        # Each rank fills its own batch: ranks that got a pair less take two images more.
        per_rank = [self.batch_size - 2 * len(chosen[rank::self.world_size]) for rank in range(self.world_size)]
        start = step * self.batch_size * self.world_size - 2 * taken + sum(per_rank[:self.rank])
        instances = self.images.take(start, per_rank[self.rank]).reshape(2, -1)

        return np.concatenate([pairs, instances], axis=1).reshape(-1)  # I III | II IV

    def _identities_at(self, step):
        """Identities of all ranks at ``step``, and how many were taken before it."""
        steps_per_pass = -(-self.identities.size // self.pairs_per_step)
        start, end = (each * self.identities.size // steps_per_pass for each in (step, step + 1))
        return self.identities.take(start, end - start), start

    def _pairs(self, chosen, step):
        """Positions of two images each of the chosen identities, (2, p)."""
        rng = np.random.default_rng([self.seed, 2, step, self.rank])
        start = self.index.starts[chosen]
        count = self.index.starts[chosen + 1] - start
        first = rng.integers(count)
        # The second is any but the first, counted on from it; an only image comes twice.
        second = (first + 1 + rng.integers(np.maximum(count - 1, 1))) % count
        return self.index.grouped[start + np.stack([first, second])]
