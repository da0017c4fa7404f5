"""What a head takes from any backbone and loop: embeddings, images, labels; and whether the backbone can be copied."""

from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from f2c_plugin.errors import ConfigError, InputError


def unwrapped(backbone: nn.Module) -> nn.Module:
    """The net itself, without DDP around it."""
    return cast(nn.Module, backbone.module) if isinstance(backbone, nn.parallel.DistributedDataParallel) else backbone


def check_copyable(net: nn.Module) -> None:
    """Check that a copy of the net would run by itself.

    Raises:
        ConfigError: it would run the original.
    """
    if "forward" in vars(net):
        raise ConfigError("the backbone's forward method has been replaced (by accelerate's prepare, or by compile), so its "
                          "copy, the gallery net, would run the original: build the head before")


def embeddings_in(output: object) -> Tensor:
    """The embeddings (B, D) in a backbone's output: the output itself, or the first entry of a tuple.

    Raises:
        InputError: there are none.
    """
    if isinstance(output, (tuple, list)) and output:
        output = cast(object, output[0])
    if isinstance(output, Tensor) and output.dim() == 2:
        return output
    found = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
    keys = f" with {', '.join(map(str, cast(Mapping[Any, Any], output)))}" if isinstance(output, Mapping) else ""
    raise InputError(f"the backbone returns {found}{keys}: F²C needs embeddings (B, D), or a tuple that begins with them; wrap "
                     "the backbone in a module that returns them")


def identities_in(labels: Tensor) -> Tensor:
    """Labels (B,) or (B, 1) as int64 (B,).

    Raises:
        InputError: they are no tensor of whole numbers.
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point():  # pyright: ignore[reportUnnecessaryIsInstance]
        found = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"labels of {found}: they must be a tensor of whole numbers from 0")
    return labels.reshape(-1).long()


def check_batch(num_images: int, probes: Tensor, labels: Tensor, symmetric: bool, embedding_size: int,
                num_identities: int) -> None:
    """Check that embeddings (B, D), or (B/2, D) if not symmetric, and labels (B,) belong to ``num_images`` images.

    Raises:
        InputError: they do not.
    """
    if num_images < 2 or num_images % 2 or len(labels) != num_images:
        raise InputError(f"a batch of {num_images} images and {len(labels)} labels: "
                         "F²C needs an even batch with a label for each image")
    if len(probes) != num_images // (1 if symmetric else 2):
        raise InputError(f"{len(probes)} embeddings for {num_images} images with symmetric={symmetric}: "
                         "the head takes what the backbone made of the same batch")
    check_numbers(probes, labels, embedding_size, num_identities)


def check_numbers(embeddings: Tensor, labels: Tensor, embedding_size: int, num_identities: int) -> None:
    """Check the size of embeddings (…, D), and labels (…,) against the number of identities.

    Raises:
        InputError: they are wrong.
    """
    if embeddings.size(1) != embedding_size:
        raise InputError(f"embeddings of {embeddings.size(1)} numbers for a pool of {embedding_size}: set embedding_size to "
                         "what the backbone returns")
    if labels.device.type == "cpu" and not 0 <= labels.min() <= labels.max() < num_identities:
        raise InputError(f"labels from {labels.min()} to {labels.max()}, but num_identities (num_classes) is {num_identities}: "
                         "identities are numbered from 0")


def check_room(num_images: int, num_identities: int, num_slots: int) -> None:
    """Check that the pool has a slot for every identity that ``num_images`` gathered images may show.

    Raises:
        ConfigError: it does not.
    """
    gathered = min(num_images, num_identities)
    if gathered > num_slots:
        raise ConfigError(f"a pool of {num_slots} slots, but a gathered batch holds up to {gathered} identities: give the pool "
                          f"at least {gathered} slots (pool_rate={gathered / num_identities:.3g}), or lower the batch size")


class ImageHook:
    """Hands the images of every training batch from a backbone's forward pass to ``take``.

    Silent in eval mode. The backbone goes on with the images that ``take`` returns.

    Args:
        backbone: called with one tensor of images, by position or by keyword, whatever else it takes.
        take: from images (B, …) to the images that the backbone is to see.
        alone: whether there may be no other one. Of several, those made first take the images first.
    Raises:
        ConfigError: the backbone already has a hook that is to be alone, as this one.
    """

    def __init__(self, backbone: nn.Module, take: Callable[[Tensor], Tensor], alone: bool = True):
        hooks = cast(dict[int, Any], backbone._forward_pre_hooks)  # type: ignore[reportPrivateUsage]
        others = [each for hook in hooks.values() if isinstance(each := getattr(hook, "__self__", None), ImageHook)]
        if alone and any(each._take and each._alone for each in others):
            raise ConfigError("this backbone already has an F²C head with a hook, which would embed every batch, too: call its "
                              "remove_hook() first, or build both with hook=False")
        self._take: Callable[[Tensor], Tensor] | None = take
        self._alone = alone
        self._handle = backbone.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ImageHook":
        """A hook that does nothing: a copy of the backbone must not bring a copy of the head along."""
        copy = object.__new__(ImageHook)
        copy._take = None
        return copy

    def remove(self) -> None:
        self._handle.remove()

    def _before_forward(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        if not backbone.training or self._take is None:
            return None
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor) and each.dim() >= 2]
        if len(tensors) != 1:
            raise InputError(f"the backbone is called with {len(tensors)} tensors that could be the images: build the head "
                             "with hook=False and pass it the images, head(embeddings, labels, images=images)")
        images = tensors[0]
        seen = self._take(images)
        return (tuple(seen if each is images else each for each in args),
                {name: seen if each is images else each for name, each in kwargs.items()})
