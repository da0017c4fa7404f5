"""The dual loader: batches of the dual sampler, decoded by workers, on the training device."""

import atexit
import logging
import signal
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from f2c_plugin.data.dataset import RecordDataset, normalize_faces
from f2c_plugin.data.sampler import DualSampler
from f2c_plugin.errors import RecordError
from f2c_plugin.utils.workers import end_with_parent

log = logging.getLogger(__name__)

Decoded = tuple[Tensor, Tensor, list[str]]  # faces, labels, errors of the images that were replaced
Batch = tuple[Tensor, Tensor]


class _Batches(Dataset[Decoded]):
    """Serves whole batches: a worker then hands over one uint8 array instead of many images."""

    def __init__(self, dataset: RecordDataset):
        self.dataset = dataset

    def __getitem__(self, positions: list[int]) -> Decoded:
        faces, labels = self.dataset.faces(np.asarray(positions))
        damaged = [str(error) for error in self.dataset.damaged]
        self.dataset.damaged.clear()
        return faces, labels, damaged


def _start_worker(_: int) -> None:
    """Signals to a whole process group are for the ranks, which save and then end their workers."""
    for number in signal.SIGTERM, signal.SIGINT:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()  # PyTorch's watch on the parent begins later, and does not see one that has died before


class DualLoader(DataLoader[Decoded]):
    """Yields ``(images, labels)`` on ``device``, as arcface_torch's own loader does.

    images float32 (B, 3, 112, 112) in [-1, 1], RGB, mirrored at random; labels int64 (B,).
    Each batch is copied and normalised one step ahead; on CUDA, this runs in a separate stream.
    ``num_workers`` processes decode; with 0, this process decodes. ``num_damaged`` counts the images
    that were replaced, if the dataset skips damaged ones.
    """

    def __init__(self, dataset: RecordDataset, sampler: DualSampler, device: torch.device, num_workers: int = 0):
        super().__init__(  # pyright: ignore[reportUnknownMemberType]
            _Batches(dataset), sampler=sampler, batch_size=None, num_workers=num_workers, pin_memory=device.type == "cuda",
            persistent_workers=num_workers > 0, worker_init_fn=_start_worker,
            generator=torch.Generator())  # DataLoader draws from it each epoch, which leaves the global generator alone
        self.dual_sampler, self.device = sampler, device
        self.num_damaged = 0

    # DataLoader declares its private iterator class as the return type.
    def __iter__(self) -> Iterator[Batch]:  # pyright: ignore[reportIncompatibleMethodOverride]
        sampler, steps = self.dual_sampler, self.dual_sampler.steps
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        ahead = None
        for (faces, labels, damaged), step in zip(self._decoded(), steps, strict=True):
            for error in damaged:
                self.num_damaged += 1
                log.warning("%s; replaced by another image of the identity (%d so far)", error, self.num_damaged)
            flip = torch.as_tensor(np.random.default_rng([sampler.seed, 3, step, sampler.rank]).random(len(faces)) < 0.5)
            copied = torch.cuda.Event() if stream else None
            with torch.cuda.stream(stream):  # does nothing if there is no stream
                faces, labels, flip = (part.to(self.device, non_blocking=True) for part in (faces, labels, flip))
                batch = normalize_faces(faces, flip), labels
                if copied:
                    copied.record(stream)
            if ahead is not None:
                yield self._ready(*ahead)
            ahead = batch, copied
        if ahead is not None:
            yield self._ready(*ahead)

    def _decoded(self) -> Iterator[Decoded]:
        starts_workers = self.num_workers > 0 and self._iterator is None
        batches: Any = super().__iter__()
        if starts_workers:  # PyTorch and multiprocessing end them by SIGTERM where they do not end by themselves
            for worker in batches._workers:
                worker.terminate = worker.kill
            alive: Callable[[], Any] = weakref.ref(batches)
            atexit.register(lambda: (batches := alive()) and batches._shutdown_workers())
        try:
            yield from batches
        except RecordError:
            if self.num_workers:
                batches._shutdown_workers()
                self._iterator = None
            raise

    def _ready(self, batch: Batch, copied: torch.cuda.Event | None) -> Batch:
        """The batch, once the current stream may use it."""
        if copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            for tensor in batch:
                tensor.record_stream(current)  # keeps the allocator from reusing it too early
        return batch
