"""Loss terms beside the head's, of the images that the backbone sees and of the embeddings that it makes of them."""

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from f2c_plugin.errors import InputError
from f2c_plugin.utils.inputs import ImageHook, embeddings_in
from f2c_plugin.utils.tensors import at_least_float32


class TermBeside(nn.Module):
    """A term that is added to the loss of any head.

    In training it sees the images before the backbone does, and may change them; later it gets their embeddings. Its states
    are part of the head's.
    """

    def __init__(self):
        super().__init__()
        self._seen: Tensor | None = None

    @abstractmethod
    def see(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """From images (B, 3, H, W) to what the backbone sees, and embeddings (B, D) of another net to compare its own with."""

    @abstractmethod
    def forward(self, embeddings: Tensor, others: Tensor) -> Tensor:
        """The term, scalar, of the backbone's embeddings and the other net's, (B, D) both."""

    def put(self, name: str, backbone: nn.Module, head: nn.Module) -> None:
        """Add the term to the head's loss.

        Args:
            name: of the term among the head's states.
            backbone: the probe net as the training loop calls it, wrapped in DDP or not. Its head may have a hook, but before.
            head: not yet wrapped in DDP; called with embeddings (B, D) first.
        """
        def before_backbone(images: Tensor) -> Tensor:
            images, self._seen = self.see(images)
            return images

        def after_head(_: nn.Module, inputs: tuple[Any, ...], loss: Tensor) -> Tensor:
            others, self._seen = self._seen, None
            embeddings = at_least_float32(embeddings_in(inputs[0]))
            if others is None or len(others) != len(embeddings):
                raise InputError(f"{name}: {0 if others is None else len(others)} images for {len(embeddings)} embeddings: "
                                 "call the backbone in training mode before the head, once for each call of the head")
            return loss + self(embeddings, others)

        ImageHook(backbone, before_backbone, alone=False)
        head.register_forward_hook(after_head)
        head.add_module(name, self)
