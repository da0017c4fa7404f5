"""The gallery net G, the momentum encoder that follows the probe net (paper, section 3.1)."""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from f2c_plugin.utils.inputs import check_copyable, embeddings_in
from f2c_plugin.utils.tensors import step_towards


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
        self.last_followed: int = 0  # the step before which it last followed
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

    def follow_at(self, step: int, probe_net: nn.Module, momentum: float, gradient_acc: int = 1) -> None:
        """Before batch ``step``, counted from 0: follow the probe net if an optimizer step has come since."""
        if step > self.last_followed and step % gradient_acc == 0:
            self.follow(probe_net, momentum)
            self.last_followed = step

    @torch.no_grad()
    def follow(self, probe_net: nn.Module, momentum: float):
        """G ← m·G + (1 − m)·P over the parameters. If anything in P is not finite, G stays as it is.

        As a step of plain SGD, which PyTorch makes in a few kernels for all parameters, and leaves out as it does where the
        gradients of mixed precision are not finite: the CPU does not wait to know.
        """
        by_dtype: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
        for pair in zip(self.net.parameters(), probe_net.parameters(), strict=True):
            by_dtype.setdefault(pair[0].dtype, []).append(pair)
        for pairs in by_dtype.values():
            step_towards([own for own, _ in pairs], [theirs for _, theirs in pairs], 1 - momentum)


def gallery_nets(head: nn.Module) -> list[GalleryNet]:
    """Those of a head, and of the loss terms beside it."""
    return [each for each in head.modules() if isinstance(each, GalleryNet)]
