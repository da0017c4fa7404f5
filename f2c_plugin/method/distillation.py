"""Angular distillation from a teacher (VarGFaceNet; Yan et al., arXiv 1910.04985, section 3.3)."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from f2c_plugin.method.beside import TermBeside
from f2c_plugin.utils.inputs import embeddings_in
from f2c_plugin.utils.tensors import at_least_float32


class Distillation(TermBeside):
    """WEIGHT · mean (1 − cos)² of the angles between the embeddings of student and teacher, equation 3.

    Recursive distillation: the student of one training is where the next starts from (``config.f2c_init``), with the same
    teacher.

    Args:
        teacher: from images (B, 3, H, W) to embeddings (B, D), on the images' device. It is not part of the head's states.
        autocast: whether it runs in the autocast type.
    """

    WEIGHT = 7.0  # α as published

    def __init__(self, teacher: nn.Module, autocast: bool = False):
        super().__init__()
        self._teacher = (teacher.eval().requires_grad_(False),)
        self.autocast = autocast

    @torch.no_grad()
    def see(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(images.device.type, enabled=self.autocast):
            return images, at_least_float32(embeddings_in(self._teacher[0](images)))

    def forward(self, embeddings: Tensor, others: Tensor) -> Tensor:
        return self.WEIGHT * (1 - cosine_similarity(embeddings, others)).square().mean()
