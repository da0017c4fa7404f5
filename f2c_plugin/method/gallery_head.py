"""What heads with a gallery net share: it embeds images of the batch before the probe net sees it."""

from collections.abc import Callable

from torch import Tensor, nn

from f2c_plugin.errors import InputError
from f2c_plugin.method.gallery import GalleryNet
from f2c_plugin.method.pool_head import PoolHead
from f2c_plugin.method.schedule import Schedule
from f2c_plugin.method.slots import SlotTable
from f2c_plugin.utils.distributed import gather_meanwhile, this_rank
from f2c_plugin.utils.inputs import ImageHook, check_batch, embeddings_in, identities_in
from f2c_plugin.utils.tensors import at_least_float32


class GalleryHead(PoolHead):
    """A head that compares probes with gallery features.

    Called as ``head(embeddings, labels, images=images)``; or, with ``hook=True``, as
    ``head(embeddings, labels)``: the images then come from a forward pre-hook on the backbone, which is
    silent in eval mode. The hook embeds them by the gallery net before the probe net runs, so that the
    gallery net's working memory is free again when the probe net begins to keep activations.

    A batch is two halves x and y, with two images of each identity of the pairs, one in each half. x is gallery and y
    probe; with ``symmetric`` the other way round, too. Without it and with the hook the probe net sees y alone.

    Args:
        backbone, pool, schedule, autocast: see ``PoolHead``.
        symmetric: whether each half is gallery and probe in turn.
        gradient_acc: batches per optimizer step. The gallery net follows once per optimizer step.
        hook: whether the images come from the backbone's forward pass.

    Attributes:
        gallery: the GalleryNet.
    Raises:
        ConfigError: the backbone already has a head with a hook, or a copy of it would run the original.
    """

    def __init__(self, backbone: nn.Module, pool: SlotTable, schedule: Schedule, symmetric: bool, gradient_acc: int = 1,
                 autocast: bool = False, hook: bool = True):
        super().__init__(backbone, pool, schedule, autocast)
        self.gallery = GalleryNet(self.probe_net)
        self.symmetric = symmetric
        self.gradient_acc = gradient_acc
        # Number of images, and what returns the gallery features of all ranks: they are gathered while the probe net runs.
        self._hooked: tuple[int, Callable[[], Tensor]] | None = None
        self._hook = ImageHook(backbone, self._take_images) if hook else None

    def forward(self, local_embeddings: Tensor, local_labels: Tensor, images: Tensor | None = None) -> Tensor:
        """Loss of a batch.

        Args:
            local_embeddings: (B, D) of this rank's batch; if not symmetric, its second half is used, or (B/2, D) taken.
            local_labels: int64 (B,) identities.
            images: (B, 3, H, W) the batch; None with the hook.
        Returns:
            Scalar, with gradient to the embeddings.
        Raises:
            InputError: no images, an odd batch, or embeddings or labels that do not fit them or the pool. Wrong
                labels are noticed on the CPU only: reading them from a GPU would stall the step.
            ConfigError: a pool without room for the gathered batch.
        """
        num_images, gather_features = self._gallery_features(images)
        labels = identities_in(local_labels)
        probes = at_least_float32(embeddings_in(local_embeddings))
        if not self.symmetric and len(probes) == num_images:
            probes = probes.chunk(2)[1]
        check_batch(num_images, probes, labels, self.symmetric, self.pool.embedding_size, self.pool.num_identities)
        num_writes = num_images // 2 * this_rank()[1]
        self.pool.require_room(num_writes)
        return self._loss_of_step((probes, labels, gather_features()), num_writes)

    def _take_images(self, images: Tensor) -> Tensor:
        """What the hook does with a batch: its gallery features are gathered, and the probe images returned."""
        if len(images) < 2:
            raise InputError(f"a batch of {len(images)} images: F²C needs an even batch, gallery and probe")
        self._hooked = len(images), gather_meanwhile(self._embed(images))
        return images if self.symmetric else images.chunk(2)[1]

    def _gallery_features(self, images: Tensor | None) -> tuple[int, Callable[[], Tensor]]:
        """(B, what returns the gallery features of all ranks), of the images given or of those that the hook saw."""
        if images is not None:
            if self._hook is not None:
                raise InputError("the head already takes the images from the backbone's forward pass: leave out images=, or "
                                 "build the head with hook=False")
            return len(images), gather_meanwhile(self._embed(images))
        if self._hooked is None:
            raise InputError("the F²C head has seen no images: " + (
                "pass them, head(embeddings, labels, images=images)" if self._hook is None else
                "call the backbone in training mode before the head, once for each call of the head"))
        hooked, self._hooked = self._hooked, None
        return hooked

    def _embed(self, images: Tensor) -> Tensor:
        """Gallery features of the images that gallery features are needed of, after the gallery net has followed."""
        assert self.gallery
        self.gallery.follow_at(self.steps, self.probe_net, self.schedule.momentum, self.gradient_acc)
        return at_least_float32(self.gallery(images if self.symmetric else images.chunk(2)[0]))
