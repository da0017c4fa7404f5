"""The margin: what is taken off the cosine of a probe to its own identity."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Keeps the slope of ArcFace's cos(θ + m), which divides by sin θ, finite at θ = 0.
_MIN_SIN_SQUARED = 1e-7


@dataclass(frozen=True)
class Margin:
    """arcface_torch's combined margin, ``config.margin_list`` (m1, m2, m3).

    (1, m2, 0) is ArcFace, cos(θ + m2), arXiv 1801.07698; (1, 0, m3) with m3 > 0 is CosFace,
    cos θ − m3, arXiv 1801.09414. Values equal arcface_torch's. The gradient is the exact derivative;
    arcface_torch's in-place ArcFace passes the target's gradient through unchanged.

    Attributes:
        scale: s.
        angular: m2 in radians.
        additive: m3.
        filter_threshold: cosines to other identities above it count as 0, because such images are
            assumed to be mislabelled (``config.interclass_filtering_threshold``); 0 is off.
    """

    scale: float
    angular: float = 0.0
    additive: float = 0.0
    filter_threshold: float = 0.0

    def scaled(self, scale: float, share: float) -> "Margin":
        """This margin with another scale and ``share`` of its margins."""
        return replace(self, scale=scale, angular=share * self.angular, additive=share * self.additive)

    def target(self, cosine: Tensor) -> Tensor:
        """Cosines to the own identity, with the margin applied."""
        if not self.angular:
            return cosine - self.additive
        sine = (1 - cosine * cosine).clamp_min(_MIN_SIN_SQUARED).sqrt()
        return cosine * math.cos(self.angular) - sine * math.sin(self.angular)

    def filtered(self, cosine: Tensor) -> Tensor:
        """Cosines to other identities, with 0 for those above the threshold."""
        return torch.where(cosine > self.filter_threshold, 0.0, cosine) if self.filter_threshold > 0 else cosine

