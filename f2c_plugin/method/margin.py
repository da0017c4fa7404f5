"""The margin: what is taken off the cosine of a probe to its own identity, and how much other identities weigh."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from f2c_plugin.utils.distributed import gather
from f2c_plugin.utils.replay import Number
from f2c_plugin.utils.tensors import at_least_float32, lengths

# Keeps the slope of cos(θ + m), which divides by sin θ, finite at θ = 0.
_MIN_SIN_SQUARED = 1e-7
# AdaFace's constants: h; the share of a new batch in the running statistics; ε; the range of lengths.
_CONCENTRATION = 0.333
_RATE = 0.01
_EPSILON = 1e-3
_LENGTHS = 0.001, 100.0


@dataclass(frozen=True)
class Margin:
    """arcface_torch's combined margin, ``config.margin_list`` (m1, m2, m3), or AdaFace's.

    (1, m2, 0) is ArcFace, cos(θ + m2), arXiv 1801.07698; (1, 0, m3) with m3 > 0 is CosFace,
    cos θ − m3, arXiv 1801.09414. Values equal arcface_torch's. The gradient is the exact derivative;
    arcface_torch's in-place ArcFace passes the target's gradient through unchanged.

    AdaFace (arXiv 2204.00964) with m = m3 is cos(θ − m·q) − (m + m·q) for an image of quality q: CosFace for one of
    average quality (q = 0), ArcFace for the worst (q = −1), and for the best (q = 1) a margin that weighs hard images more.
    As in its authors' code, θ − m·q ends at 0; going on below, as the paper's equation does, would push an image that is
    closer than m·q away from its class.

    Attributes:
        scale: s.
        angular: m2 in radians.
        additive: m3.
        filter_threshold: cosines to other identities above it count as 0, because such images are
            assumed to be mislabelled (``config.interclass_filtering_threshold``); 0 is off.
        adaptive: whether the margin is AdaFace's, with m = m3 and without m2.
    """

    scale: Number
    angular: Number = 0.0
    additive: Number = 0.0
    filter_threshold: float = 0.0
    adaptive: bool = False

    @property
    def numbers(self) -> tuple[float, float, float]:
        """Scale, angular and additive."""
        return float(self.scale), float(self.angular), float(self.additive)

    def scaled(self, scale: float, share: float) -> "Margin":
        """This margin with another scale and ``share`` of its margins."""
        return replace(self, scale=scale, angular=share * self.angular, additive=share * self.additive)

    def target(self, cosine: Tensor, quality: Tensor | None = None) -> Tensor:
        """Cosines to the own identity, with the margin applied.

        ``quality``, -1 to 1 and without gradient, of shapes that broadcast to those of ``cosine``, is needed if the margin is
        adaptive.
        """
        if self.adaptive:
            assert quality is not None
            angular = -self.additive * quality
            below_0 = (angular < 0) & (cosine > angular.cos())  # θ + angular
            target = cosine * angular.cos() - _sine(cosine) * angular.sin()
            return torch.where(below_0, 1.0, target) - self.additive * (1 + quality)
        if isinstance(self.angular, Tensor):
            return cosine * self.angular.cos() - _sine(cosine) * self.angular.sin()
        if not self.angular:
            return cosine - self.additive
        return cosine * math.cos(self.angular) - _sine(cosine) * math.sin(self.angular)

    def filtered(self, cosine: Tensor) -> Tensor:
        """Cosines to other identities, with 0 for those above the threshold."""
        return torch.where(cosine > self.filter_threshold, 0.0, cosine) if self.filter_threshold > 0 else cosine

    # What follows is the loss of an image, from its target and a total of its cosines to other identities. A pass over the
    # slots makes that total without ever holding all of these cosines.

    @property
    def weigh(self) -> Callable[[Tensor], Tensor] | None:
        """From logits s · cosine of other identities to their weights, the loss's gradient to them; None: their softmax."""
        return None

    @property
    def own_target(self) -> float:
        """The target of an image that is its own class weight. It has no margin and no gradient."""
        return 1.0

    def total(self, cosine: Tensor) -> Tensor:
        """Of cosines (…, A) to other identities, (…): log Σ exp(s · cosine). Those of -inf do not count."""
        return (self.scale * self.filtered(cosine)).logsumexp(-1)

    def joined(self, total: Tensor, other: Tensor) -> Tensor:
        """The total of two sets of identities, from those of each."""
        return torch.logaddexp(total, other)

    def standing_for(self, total: Tensor, ratio: float) -> Tensor:
        """The total of ``ratio`` times as many identities that are as those that were counted."""
        return total + math.log(ratio)

    def loss(self, target: Tensor, total: Tensor) -> Tensor:
        """Losses (…) of images, from their targets and their totals."""
        target = self.scale * target
        return torch.logaddexp(total, target) - target


@dataclass(frozen=True)
class SFace(Margin):
    """Sigmoid-constrained hypersphere loss (Zhong et al., IEEE TIP 2021), loss = Σ s·w(θ_j)·cos θ_j − s·v(θ)·cos θ.

    An image is pulled to its own class with v = 1 / (1 + exp(−k (θ − a))), which ends where the angle is a, and pushed off each
    other one with w = 1 / (1 + exp(k (θ_j − b))), which ends where that is b: so wrong labels are not learnt to the end. Both
    weights are constants to the gradient; they are not a softmax, so that no class weighs less because others are nearer.

    Attributes:
        angular: a in radians; 0.9 as published for MS1MV2, 0.87 for CASIA-WebFace.
        additive: b in radians; 1.2 as published.
    """

    slope = 80.0  # k

    def scaled(self, scale: float, share: float) -> "SFace":
        """With another scale. Where the pull ends does not change during a training."""
        return replace(self, scale=scale)

    def target(self, cosine: Tensor, quality: Tensor | None = None) -> Tensor:
        weight = torch.sigmoid(self.slope * (_angle(cosine.detach()) - self.angular))
        return weight * cosine

    @property
    def weigh(self) -> Callable[[Tensor], Tensor]:
        return lambda logits: torch.sigmoid(self.slope * (self.additive - _angle(logits / self.scale)))

    @property
    def own_target(self) -> float:
        return 0.0

    def total(self, cosine: Tensor) -> Tensor:
        logits = torch.where(cosine.isneginf(), 0.0, self.scale * self.filtered(cosine))  # 0 adds nothing, whatever it weighs
        return (self.weigh(logits.detach()) * logits).sum(-1)

    def joined(self, total: Tensor, other: Tensor) -> Tensor:
        return total + other

    def standing_for(self, total: Tensor, ratio: float) -> Tensor:
        """The total as it is. Embeddings begin near each other: pushed off a pool N / K times as much, they learn nothing."""
        return total

    def loss(self, target: Tensor, total: Tensor) -> Tensor:
        return total - self.scale * target


def margin_loss(cosine: Tensor, labels: Tensor, margin: Margin, quality: Tensor | None = None) -> Tensor:
    """Losses (B,) of cosines (B, A), of which the labelled ones, int64 (B,), are to the own class."""
    own = cosine.gather(1, labels[:, None])[:, 0]
    others = cosine.scatter(1, labels[:, None], -torch.inf)
    return margin.loss(margin.target(own, quality), margin.total(others))


def _angle(cosine: Tensor) -> Tensor:
    return torch.acos(cosine.clamp(-1, 1))


def _sine(cosine: Tensor) -> Tensor:
    return (1 - cosine * cosine).clamp_min(_MIN_SIN_SQUARED).sqrt()


class ImageQuality(nn.Module):
    """Quality of images, as AdaFace reads it from the lengths of their embeddings: h · (length − mean) / std, from -1 to 1.

    That is their quality in nets in which images that are hard to recognise have shorter embeddings than others. Mean and
    standard deviation are running averages over the batches of all ranks, equal on all of them. The first batch sets them;
    the authors' code begins with a mean of 20 and a standard deviation of 100, which takes hundreds of steps to forget.

    Attributes:
        mean, std: float (), 0 before the first batch.
    """

    mean: Tensor
    std: Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.zeros(()))

    @torch.no_grad()
    def forward(self, local_embeddings: Tensor) -> Tensor:
        """Quality (B,) of this rank's images, from embeddings (B, D) that are not normalised, after they have been counted.

        All ranks call this together. Embeddings that are not finite are not counted.
        """
        length = lengths(at_least_float32(local_embeddings))
        self._count(gather(length).flatten())
        return (_CONCENTRATION * (length.clamp(*_LENGTHS) - self.mean) / (self.std + _EPSILON)).clamp(-1, 1)

    def _count(self, length: Tensor) -> None:
        finite = length.isfinite()
        length = torch.where(finite, length.clamp(*_LENGTHS), 0)
        mean = length.sum() / finite.sum().clamp_min(1)
        variance = torch.where(finite, length - mean, 0).square().sum() / (finite.sum() - 1).clamp_min(1)
        rate = torch.full_like(self.mean, _RATE).masked_fill(self.mean == 0, 1) * finite.any()
        self.mean += rate * (mean - self.mean)
        self.std += rate * (variance.sqrt() - self.std)
