"""The full FC layer with the same margin: the baseline of the built-in host."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from f2c_plugin.loss import Margin, margin_softmax


class SoftmaxHead(nn.Module):
    """Margin softmax over a weight vector for every identity, scale and margin in full from the first step.

    Args:
        embedding_size: D.
        num_classes: N.
        margin: scale and margin.
    """

    def __init__(self, embedding_size: int, num_classes: int, margin: Margin):
        super().__init__()
        self.weight = nn.Parameter(torch.normal(0, 0.01, (num_classes, embedding_size)))
        self.margin = margin

    def forward(self, local_embeddings: Tensor, local_labels: Tensor) -> Tensor:
        """Scalar loss of embeddings (B, D) with labels int64 (B,)."""
        cosine = normalize(local_embeddings) @ normalize(self.weight).T  # (B, D) @ (D, N) -> (B, N)
        return margin_softmax(cosine, local_labels, self.margin)
