"""Dynamic Class Queue as its paper reads: lists for the queue, a loop over probes."""

from collections import deque

import torch
from torch.nn.functional import normalize

from tests.reference.margin import slow_image_loss


class SlowDCQ:
    """A queue of (identity, class weight), the oldest first.

    Args:
        queue: a ClassQueue to begin with, empty: random weights of nobody.
        gallery_images: of how many images an own class weight is the mean, at most.
    """

    def __init__(self, queue, gallery_images=1):
        self.gallery_images = gallery_images
        self.entries = deque((-1, row) for row in queue.rows[0].clone())

    def step(self, probes, labels, weights, margin):
        """Mean loss of probes (n, D) with labels (n,), whose own class weights are (n, D); and the weights enter."""
        losses = []
        for probe, label, weight in zip(probes, labels.tolist(), weights, strict=True):
            others = [entry @ probe / probe.norm() for identity, entry in self.entries if identity != label]
            earlier = [entry for identity, entry in self.entries if identity == label]
            images = [weight / weight.norm(), *earlier[::-1][:self.gallery_images - 1]]
            own = torch.stack(images).mean(0)
            losses.append(slow_image_loss([own @ probe / (own.norm() * probe.norm()), *others], 0, margin))
        for label, weight in zip(labels.tolist(), normalize(weights), strict=True):
            self.entries.popleft()
            self.entries.append((label, weight))
        return torch.stack(losses).mean()
