"""Algorithm 1 of the paper step by step."""

from copy import deepcopy

import torch

from tests.reference.loss import slow_loss
from tests.reference.margin import SlowQuality
from tests.reference.pool import SlowPool


class SlowHead:
    """Slow pool and slow loss put together. The first half-step's write is forgotten by copying the pool.

    Args:
        head: whose schedule and pool to begin with.
        gallery: the gallery net, in training mode and without dropout.
        momentum: the configured m.
    """

    def __init__(self, head, gallery, momentum=0.9):
        self.schedule, self.momentum = head.schedule, momentum
        self.steps = 0
        self.pool = SlowPool(head.pool)
        self.gallery = gallery
        self.quality = SlowQuality()

    def half_step(self, gallery, gallery_labels, probe, probe_labels, qualities):
        two_keys, _ = self.pool.write(gallery_labels.tolist(), gallery)
        slots = torch.tensor([self.pool.slots.get(identity, -1) for identity in probe_labels.tolist()])
        return slow_loss(probe, slots, self.pool.rows.clone(), torch.tensor(sorted(two_keys)),
                         self.schedule.margin_at(self.steps), 3, qualities)

    def step(self, net, images, embeddings, labels, symmetric, follow):
        loss = self.loss(net, images, embeddings, labels, symmetric, follow)
        self.steps += 1
        return loss

    @torch.no_grad()
    def follow(self, net):
        m = self.momentum
        for mine, theirs in zip(self.gallery.parameters(), net.parameters(), strict=True):
            mine.copy_(m * mine + (1 - m) * theirs)

    def loss(self, net, images, embeddings, labels, symmetric, follow):
        if follow:
            self.follow(net)
        label_x, label_y = labels.chunk(2)
        with torch.no_grad():
            if not symmetric:
                gallery_x = self.gallery(images.chunk(2)[0])
            else:
                gallery_x, gallery_y = self.gallery(images).chunk(2)
        qualities = self.quality(embeddings)
        if not symmetric:
            return self.half_step(gallery_x, label_x, embeddings, label_y, qualities)
        probe_x, probe_y = embeddings.chunk(2)
        before = deepcopy(self.pool)
        first = self.half_step(gallery_y, label_y, probe_x, label_x, qualities[:len(label_x)])
        self.pool = before
        second = self.half_step(gallery_x, label_x, probe_y, label_y, qualities[len(label_x):])
        return first + second
