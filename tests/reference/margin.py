"""Margins image by image, with θ itself; AdaFace's running statistics in a list of floats."""

import math
import statistics

import torch

from f2c_plugin import SFace


def slow_target(cosine, margin, quality=None):
    """The target of one image, scalar, of its cosine () and the quality of its image, a float."""
    theta = torch.acos(cosine)
    if margin.adaptive:
        shifted = theta - margin.additive * quality
        return torch.cos(shifted if shifted > 0 else shifted * 0) - margin.additive - margin.additive * quality
    return (torch.cos(theta + margin.angular) if margin.angular else cosine) - margin.additive


def slow_image_loss(cosines, target, margin, quality=None, ratio=1.0, is_own_target=False):
    """The loss of one image, scalar, of its cosines to all classes, a list, and the number of its own.

    Each other class counts ``ratio`` times, but for SFace once. The own class weight may be the image itself: then there is
    no margin, and no gradient.
    """
    others = [cosine * 0 if margin.filter_threshold and cosine > margin.filter_threshold else cosine
              for number, cosine in enumerate(cosines) if number != target]
    if isinstance(margin, SFace):
        weights = [1 / (1 + torch.exp(80 * (torch.acos(cosine.detach()) - margin.additive))) for cosine in others]
        pushed = sum(weight * cosine for weight, cosine in zip(weights, others, strict=True))
        pull = 1 / (1 + torch.exp(-80 * (torch.acos(cosines[target].detach()) - margin.angular)))
        return margin.scale * (pushed - (0 if is_own_target else pull * cosines[target]))
    own = cosines[target] * 0 + 1 if is_own_target else slow_target(cosines[target], margin, quality)
    logits = margin.scale * torch.stack([own, *others])
    counted = torch.tensor([1.0] + [ratio] * len(others), dtype=logits.dtype).log()
    return torch.logsumexp(logits + counted, 0) - logits[0]


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
