"""The dual loader: batches of the dual sampler, decoded by workers, on the training device."""

import logging

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from f2c_plugin.data.dataset import RecordDataset, normalize_faces
from f2c_plugin.data.sampler import DualSampler


log = logging.getLogger(__name__)


class _Batches(Dataset):
    """Serves whole batches, so that workers hand over one uint8 array instead of many images."""

    def __init__(self, dataset: RecordDataset):
        self.dataset = dataset

    def __getitem__(self, positions: list[int]):
        faces, labels = self.dataset.faces(np.asarray(positions))
        damaged = [str(error) for error in self.dataset.damaged]
        self.dataset.damaged.clear()
        return faces, labels, damaged


class DualLoader(DataLoader):
    """Yields ``(images, labels)`` on ``device``, as arcface_torch's own loader does.

    images float32 (B, 3, 112, 112) in [-1, 1], RGB, mirrored at random; labels int64 (B,).
    The batch is copied and normalised one step ahead, on CUDA in a stream of its own.

    Args:
        dataset: the pack.
        sampler: says which images make up each batch.
        device: where the batches are wanted.
        num_workers: processes that decode; 0 decodes in this one.
    Attributes:
        num_damaged: images that were replaced, if the dataset replaces damaged ones.
    """

    def __init__(self, dataset: RecordDataset, sampler: DualSampler, device: torch.device, num_workers: int = 0):
        super().__init__(_Batches(dataset), sampler=sampler, batch_size=None, num_workers=num_workers,
                         pin_memory=device.type == "cuda", persistent_workers=num_workers > 0,
                         generator=torch.Generator())  # of its own: each epoch draws from it, also a resumed one
        self.dual_sampler = sampler
        self.device = device
        self.num_damaged = 0

    def __iter__(self):
        sampler, steps = self.dual_sampler, self.dual_sampler.steps
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        ahead = None
        for (faces, labels, damaged), step in zip(super().__iter__(), steps, strict=True):
            for error in damaged:
                self.num_damaged += 1
                log.warning("%s; replaced by another image of the identity (%d so far)", error, self.num_damaged)
            flip = torch.from_numpy(np.random.default_rng([sampler.seed, 3, step, sampler.rank]).random(len(faces)) < 0.5)
            with torch.cuda.stream(stream):  # no effect without a stream
                faces, labels, flip = (part.to(self.device, non_blocking=True) for part in (faces, labels, flip))
                batch = normalize_faces(faces, flip), labels
                copied = stream.record_event() if stream else None
            if ahead is not None:
                yield self._ready(*ahead)
            ahead = batch, copied
        if ahead is not None:
            yield self._ready(*ahead)

    def _ready(self, batch, copied):
        if copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            for tensor in batch:
                tensor.record_stream(current)  # keeps the allocator from reusing it too early
        return batch
