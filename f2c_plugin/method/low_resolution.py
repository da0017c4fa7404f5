"""Low resolution (LRFR; Ling et al., arXiv 2302.05621): small images in training, and their distance to sharp ones."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from f2c_plugin.method.beside import TermBeside
from f2c_plugin.method.gallery import GalleryNet
from f2c_plugin.utils.inputs import unwrapped
from f2c_plugin.utils.resolution import at_resolution
from f2c_plugin.utils.tensors import at_least_float32

# Pixels of the three levels of difficulty, from the easiest: the least, and one more than the most. The paper's boundaries
# are not at hand; these are those of 7, 14, 28 and 56 pixels.
LEVELS = (28, 57), (14, 28), (7, 14)


class LowResolution(TermBeside):
    """WEIGHT · mean LogExp distance between the embeddings of a small image and of the same one sharp.

    The probe net sees a share of the images at a lower resolution, each of a level drawn for it; the gallery net sees them as
    they are, and its embeddings have no gradient.

    Args:
        backbone: the probe net, wrapped in DDP or not.
        share: of the images that are made small.
        steps: returns the number of batches so far.
        momentum, gradient_acc: of a gallery net of its own; see ``Schedule``, ``GalleryHead``.
        gallery: one that the head has already.
        seed: of the levels. Ranks draw others from others.
    """

    WEIGHT = 1.0

    def __init__(self, backbone: nn.Module, share: float, steps: Callable[[], int], momentum: float = 0.99,
                 gradient_acc: int = 1, gallery: GalleryNet | None = None, seed: tuple[int, ...] = (0,)):
        super().__init__()
        self._probe_net = (unwrapped(backbone),)
        self._shared = (gallery,)
        if gallery is None:
            self.gallery = GalleryNet(self._probe_net[0])
        self.share, self.steps, self.momentum, self.gradient_acc, self.seed = share, steps, momentum, gradient_acc, seed

    @torch.no_grad()
    def see(self, images: Tensor) -> tuple[Tensor, Tensor]:
        step = self.steps()
        gallery = self._shared[0] or self.gallery
        gallery.follow_at(step, self._probe_net[0], self.momentum, self.gradient_acc)
        sharp = at_least_float32(gallery(images))

        random = np.random.default_rng([*self.seed, step])
        is_small, level = random.random(len(images)) < self.share, random.integers(len(LEVELS), size=len(images))
        level = torch.as_tensor(np.where(is_small, level, len(LEVELS)))
        level = level.to(images.device, non_blocking=True).view(-1, 1, 1, 1)
        for number, (least, end) in enumerate(LEVELS):
            images = torch.where(level == number, at_resolution(images, int(random.integers(least, end))), images)
        return images, sharp

    def forward(self, embeddings: Tensor, others: Tensor) -> Tensor:
        return self.WEIGHT * log_exp_distance(embeddings, others).mean()


def log_exp_distance(x: Tensor, y: Tensor, power: float = 2.0) -> Tensor:
    """log(1 + Σ (exp(|x_i − y_i|^p) − 1)) / (p·D) of embeddings (B, D), (B,). Dimensions that are far apart count most."""
    exponents = (x - y).abs().pow(power)
    largest = exponents.amax(1, keepdim=True)
    # Where an exponential would overflow, the ones beside it are nothing.
    total = torch.where(largest[:, 0] < 50, torch.expm1(exponents.clamp(max=50)).sum(1).log1p(), exponents.logsumexp(1))
    return total / (power * x.size(1))
