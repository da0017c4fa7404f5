"""A slow pool that follows the paper line by line."""

from collections import OrderedDict

from torch.nn.functional import normalize

from f2c_plugin.method.pool import DynamicClassPool


class SlowPool:
    """An OrderedDict from least to most recently used identity, and a loop over features."""

    def __init__(self, pool: DynamicClassPool):
        self.rows = pool.rows.clone()
        self.slots = OrderedDict()
        self.next_row = {}
        self.free = list(range(pool.num_slots))

    def write(self, identities, features):
        has_two_keys, evicted = set(), []
        protected = {identity for identity in identities if identity in self.slots}
        for identity in protected:  # touched before anything is evicted
            self.slots.move_to_end(identity)
        for identity, feature in zip(identities, normalize(features), strict=True):
            if identity not in self.slots:
                if self.free:
                    slot = self.free.pop(0)
                else:
                    loser, slot = self.slots.popitem(last=False)
                    assert loser not in identities
                    evicted.append(loser)
                self.rows[0, slot] = feature
                self.next_row[slot] = 1
            else:
                slot = self.slots[identity]
                self.rows[self.next_row[slot], slot] = feature
                self.next_row[slot] = 1 - self.next_row[slot]
                has_two_keys.add(slot)
            self.slots[identity] = slot
            self.slots.move_to_end(identity)
        return has_two_keys, evicted
