"""Checks of the batch that a head is called with, by shapes alone where values are on a GPU."""

from torch import Tensor

from f2c_plugin.errors import ConfigError, InputError
from f2c_plugin.utils.distributed import this_rank


def check_batch(num_images: int, probes: Tensor, labels: Tensor, symmetric: bool, embedding_size: int,
                num_identities: int) -> None:
    """Check that embeddings (B, D), or (B/2, D) if not symmetric, and labels (B,) belong to ``num_images`` images.

    Raises:
        InputError: they do not.
    """
    if num_images % 2 or len(labels) != num_images:
        raise InputError(f"a batch of {num_images} images and {len(labels)} labels: "
                         "F²C needs an even batch with a label for each image")
    if len(probes) != num_images // (1 if symmetric else 2):
        raise InputError(f"{len(probes)} embeddings for {num_images} images with symmetric={symmetric}: "
                         "the head takes what the backbone made of the same batch")
    if probes.size(1) != embedding_size:
        raise InputError(f"embeddings of {probes.size(1)} numbers for a pool of {embedding_size}: set embedding_size to what "
                         "the backbone returns")
    if labels.device.type == "cpu" and not 0 <= labels.min() <= labels.max() < num_identities:
        raise InputError(f"labels from {labels.min()} to {labels.max()}, but num_classes={num_identities}: "
                         "identities are numbered from 0")


def check_room(num_images: int, num_identities: int, num_slots: int) -> None:
    """Check that the pool has a slot for every identity that a gathered batch may hold.

    Raises:
        ConfigError: it does not.
    """
    gathered = min(num_images // 2 * this_rank()[1], num_identities)
    if gathered > num_slots:
        raise ConfigError(f"a pool of {num_slots} slots, but a gathered batch holds up to {gathered} identities: give the pool "
                          f"at least {gathered} slots (pool_rate={gathered / num_identities:.3g}), or lower the batch size")
