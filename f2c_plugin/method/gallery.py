"""The gallery net G, the momentum encoder that follows the probe net (paper, section 3.1)."""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.optim.swa_utils import get_ema_multi_avg_fn

from f2c_plugin.utils.inputs import check_copyable, embeddings_in


class GalleryNet(nn.Module):
    """A copy of the probe net that follows it and takes no gradient.

    In training, BatchNorm layers use the statistics of the batch, as the probe net's do; everything
    else that is random in training (dropout, drop-path, token masking) is off. BatchNorm's running
    statistics follow the images that the gallery net sees, so in eval mode it is a complete net.

    Args:
        probe_net: the net to follow, not wrapped in DDP. It returns embeddings (B, D), or a tuple
            that begins with them.
    Raises:
        ConfigError: a copy of it would run the original.
    """

    def __init__(self, probe_net: nn.Module):
        super().__init__()
        check_copyable(probe_net)
        self.net = deepcopy(probe_net).requires_grad_(False)
        self.train()

    def train(self, mode: bool = True):
        super().train(mode)
        for module in self.net.modules():
            module.training = mode and isinstance(module, _BatchNorm)
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (B, D) of images (B, 3, H, W). Raises InputError if the net returns something else."""
        return embeddings_in(self.net(images))

    @torch.no_grad()
    def follow(self, probe_net: nn.Module, momentum: float):
        """G ← m·G + (1 − m)·P over the parameters. Values that are not finite in P leave G unchanged."""
        own = list(self.net.parameters())
        finite = [torch.where(theirs.isfinite(), theirs, mine)
                  for mine, theirs in zip(own, probe_net.parameters(), strict=True)]
        get_ema_multi_avg_fn(momentum)(own, finite, None)  # pyright: ignore[reportArgumentType]
