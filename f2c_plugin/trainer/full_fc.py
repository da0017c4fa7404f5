"""The full FC layer with the same margin: the baseline of the built-in trainer."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from f2c_plugin.method.margin import ImageQuality, margin_loss
from f2c_plugin.method.schedule import Schedule


class FullFC(nn.Module):
    """Margin softmax over a weight vector for every identity.

    Args:
        embedding_size: D.
        num_classes: N.
        schedule: scale and margin of each step.
        sub_centers: weights of an identity, of which the one nearest to an image counts (Deng et al., ECCV 2020).

    Attributes:
        quality: of images, if the margin follows it.
        steps: batches seen.
    """

    def __init__(self, embedding_size: int, num_classes: int, schedule: Schedule, sub_centers: int = 1):
        super().__init__()
        self.weight = nn.Parameter(torch.normal(0, 0.01, (num_classes * sub_centers, embedding_size)))
        self.sub_centers = sub_centers
        self.schedule = schedule
        self.quality = ImageQuality() if schedule.margin.adaptive else None
        self.steps = 0

    def forward(self, local_embeddings: Tensor, local_labels: Tensor) -> Tensor:
        """Scalar loss of embeddings (B, D) with labels int64 (B,)."""
        cosine = normalize(local_embeddings) @ normalize(self.weight).T  # (B, D) @ (D, N·C) -> (B, N·C)
        if self.sub_centers > 1:
            cosine = cosine.unflatten(1, (-1, self.sub_centers)).amax(2)
        margin = self.schedule.margin_at(self.steps)
        self.steps += 1
        quality = self.quality(local_embeddings) if self.quality else None
        return margin_loss(cosine, local_labels, margin, quality).mean()

    @torch.no_grad()
    def put_class_weights(self, identities: Tensor, weights: Tensor) -> None:
        """Start from the weights (n, D) of identities int64 (n,), as their first sub-centres."""
        self.weight[self.sub_centers * identities.to(self.weight.device)] = weights.to(self.weight)

    def continue_at(self, step: int) -> None:
        """Count on from ``step`` batches."""
        self.steps = step
