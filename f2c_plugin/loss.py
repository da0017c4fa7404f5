"""The loss of probe embeddings against the pool: margin softmax and hard negatives (paper, section 3.3)."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from f2c_plugin.config import ConfigError

# Keeps the slope of ArcFace's cos(θ + m), which has sin θ as divisor, finite at θ = 0.
_MIN_SIN_SQUARED = 1e-7


@dataclass(frozen=True)
class Margin:
    """The host's combined margin, ``config.margin_list`` (m1, m2, m3).

    (1, m2, 0) is ArcFace, cos(θ + m2); (1, 0, m3) with m3 > 0 is CosFace, cos θ − m3.
    Values are the host's. The gradient is the exact derivative, where the host's in-place
    ArcFace passes the target's gradient through unchanged.

    Attributes:
        scale: s.
        angular: m2 in radians.
        additive: m3.
        filter_threshold: cosines to other identities above it count as 0, for they are taken for
            mislabelled images (``config.interclass_filtering_threshold``); 0 is off.
    """

    scale: float
    angular: float = 0.0
    additive: float = 0.0
    filter_threshold: float = 0.0

    @classmethod
    def of_host(cls, margin_loss) -> "Margin":
        """Read the margin off the host's ``CombinedMarginLoss``.

        Raises:
            ConfigError: for a ``margin_list`` that the host refuses, too.
        """
        m1, m2, m3 = margin_loss.m1, margin_loss.m2, margin_loss.m3
        threshold = margin_loss.interclass_filtering_threshold
        if m1 == 1.0 and m3 == 0.0:
            return cls(margin_loss.s, angular=m2, filter_threshold=threshold)
        if m3 > 0:
            return cls(margin_loss.s, additive=m3, filter_threshold=threshold)
        raise ConfigError(f"margin_list=({m1}, {m2}, {m3}) is neither ArcFace (1, m2, 0) nor CosFace (1, 0, m3 > 0)")

    def scaled(self, scale: float, share: float) -> "Margin":
        """This margin with another scale and ``share`` of its margins."""
        return replace(self, scale=scale, angular=share * self.angular, additive=share * self.additive)

    def target(self, cosine: Tensor) -> Tensor:
        """The cosine to the own identity with the margin taken off."""
        if not self.angular:
            return cosine - self.additive
        sine = (1 - cosine * cosine).clamp_min(_MIN_SIN_SQUARED).sqrt()
        return cosine * math.cos(self.angular) - sine * math.sin(self.angular)

    def filtered(self, cosine: Tensor, labels: Tensor) -> Tensor:
        """Cosines (B, K) without those to other identities above the threshold."""
        if not self.filter_threshold > 0:
            return cosine
        other = torch.arange(cosine.size(1), device=cosine.device) != labels[:, None]  # (B, K)
        return torch.where(other & (cosine > self.filter_threshold), 0.0, cosine)


def margin_softmax(cosine: Tensor, labels: Tensor, margin: Margin) -> Tensor:
    """Mean cross-entropy of s · cosines (B, K) with the margin on the labelled columns, scalar."""
    cosine = margin.filtered(cosine, labels)
    target = margin.target(cosine.gather(1, labels[:, None]))  # (B, 1)
    return cross_entropy(margin.scale * cosine.scatter(1, labels[:, None], target), labels)


def hard_negatives(cosine: Tensor, count: int) -> Tensor:
    """The ``count`` largest cosines of every row (B, K), clipped below at 0; (B, count)."""
    return cosine.topk(min(count, cosine.size(1)), dim=1).values.clamp_min(0)


def default_hard_negatives(num_slots: int) -> int:
    """h = min(max(⌊0.0002 · K⌋, 3), 10)."""
    return min(max(num_slots // 5000, 3), 10)


class PoolLoss(NamedTuple):
    """Loss of one probe batch, and what to watch. All float ().

    Attributes:
        loss: has the gradient to the embeddings.
        found: share of the probes whose identity is in the pool.
        positive_cosine: mean cosine of these to their own slots in view 1; NaN if there are none.
        hard_negative_cosine: mean cosine of the others to the h slots most like them, clipped below
            at 0, in view 1; NaN if there are none.
    """

    loss: Tensor
    found: Tensor
    positive_cosine: Tensor
    hard_negative_cosine: Tensor


def pool_loss(embeddings: Tensor, labels: Tensor, rows: Tensor, renewed: Tensor, margin: Margin,
              num_hard_negatives: int, autocast: bool = False) -> PoolLoss:
    """Loss of probe embeddings against both views of the pool, summed over the views.

    View 1 is row 0 of every slot; view 2 has row 1 for renewed slots. In each view, probes whose
    identity is in the pool take the margin softmax over the K slots, mean over them; the others
    are pushed off their h hardest negatives, mean over all of these. A term without probes is 0.

    The pool may change before ``backward``: the gradient is computed here.

    Args:
        embeddings: (B, D), normalised here.
        labels: int64 (B,) slot of each probe's identity, or NOT_IN_POOL.
        rows: (2, K, D) unit vectors.
        renewed: int64 (B',) slots whose row 1 makes view 2; duplicates are allowed.
        margin: scale and margin to train with.
        num_hard_negatives: h.
        autocast: whether matrix products run in the autocast type of the device.
    """
    with torch.enable_grad():
        probes = embeddings.detach().requires_grad_()
        result = _pool_loss(probes, labels, rows, renewed.unique(), margin, num_hard_negatives, autocast)
        # Softmax over a large pool has entries below what float16 can hold; the factor lifts them.
        factor = 2**14 * len(labels) / margin.scale if autocast else 1
        gradient = torch.autograd.grad(result.loss * factor, probes)[0] / factor
    return PoolLoss(_GradientComputed.apply(embeddings, result.loss.detach(), gradient), *result[1:])


class _GradientComputed(torch.autograd.Function):
    """A loss whose gradient is already known."""

    @staticmethod
    def forward(ctx, embeddings, loss, gradient):
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, loss_gradient):
        gradient, = ctx.saved_tensors
        return gradient * loss_gradient, None, None


def _pool_loss(probes, labels, rows, renewed, margin, num_hard_negatives, autocast) -> PoolLoss:
    probes = normalize(probes)
    with torch.autocast(probes.device.type, enabled=autocast):
        view1 = probes @ rows[0].T  # (B, D) @ (D, K) -> (B, K)
        renewed_columns = probes @ rows[1, renewed].T  # (B, D) @ (D, R) -> (B, R)
    view1 = view1.to(probes.dtype)
    view2 = view1.index_copy(1, renewed, renewed_columns.to(probes.dtype))

    positive, negative = (labels >= 0).nonzero()[:, 0], (labels < 0).nonzero()[:, 0]  # synchronises
    own = labels[positive]
    nowhere = labels[negative]
    loss = probes.sum() * 0  # keeps the graph whole when both terms are without probes
    for view in view1, view2:
        if len(positive):
            loss = loss + margin_softmax(view[positive], own, margin)
        if len(negative):
            loss = loss + hard_negatives(margin.filtered(view[negative], nowhere), num_hard_negatives).mean()
    with torch.no_grad():
        return PoolLoss(loss, (labels >= 0).to(loss.dtype).mean(), view1[positive, own].mean(),
                        hard_negatives(view1[negative], num_hard_negatives).mean())
