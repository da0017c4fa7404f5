"""Margins image by image, with θ itself; AdaFace's running statistics in a list of floats."""

import math
import statistics

import torch


def slow_target(cosine, margin, quality=None):
    """The target of one image, scalar, of its cosine () and the quality of its image, a float."""
    theta = torch.acos(cosine)
    if margin.adaptive:
        shifted = theta - margin.additive * quality
        return torch.cos(shifted if shifted > 0 else shifted * 0) - margin.additive - margin.additive * quality
    return (torch.cos(theta + margin.angular) if margin.angular else cosine) - margin.additive


class SlowQuality:
    """AdaFace's image quality. The averages begin with the first batch's."""

    def __init__(self):
        self.averages = []

    def __call__(self, embeddings):
        """A float for every embedding."""
        norms = [min(max(math.hypot(*embedding), 0.001), 100.0) for embedding in embeddings.tolist()]
        of_batch = statistics.mean(norms), statistics.stdev(norms)
        self.averages = [0.01 * new + 0.99 * old for new, old in zip(of_batch, self.averages or of_batch, strict=True)]
        mean, deviation = self.averages
        return [min(max(0.333 * (norm - mean) / (deviation + 0.001), -1.0), 1.0) for norm in norms]
