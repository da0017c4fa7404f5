"""Dynamic Class Queue as its paper reads: lists for the queue, a loop over probes."""

from collections import deque

import torch
from torch.nn.functional import normalize

from tests.reference.margin import slow_image_loss


class SlowDCQ:
    """A queue of (identity, class weight), the oldest first.

    Args:
        queue: a ClassQueue to begin with, empty: random weights of nobody.
    """

    def __init__(self, queue):
        self.entries = deque((-1, row) for row in queue.rows[0].clone())

    def step(self, probes, labels, weights, margin):
        """Mean loss of probes (n, D) with labels (n,), whose own class weights are (n, D); and the weights enter."""
        losses = []
        for probe, label, weight in zip(probes, labels.tolist(), weights, strict=True):
            others = [entry @ probe / probe.norm() for identity, entry in self.entries if identity != label]
            losses.append(slow_image_loss([weight @ probe / (weight.norm() * probe.norm()), *others], 0, margin))
        for label, weight in zip(labels.tolist(), normalize(weights), strict=True):
            self.entries.popleft()
            self.entries.append((label, weight))
        return torch.stack(losses).mean()
