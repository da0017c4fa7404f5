"""Sums of the embeddings of many images, split over the ranks."""

from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from f2c_plugin.data.dataset import Pixels
from f2c_plugin.errors import F2CError
from f2c_plugin.evaluation.verification import embed, embedding_size
from f2c_plugin.utils.distributed import Shard, this_rank
from f2c_plugin.utils.workers import worker_pool

Item = TypeVar("Item")
_BATCH, _CHUNK = 256, 16  # images that the net embeds at a time, and that a worker process decodes at a time


def pooled(net: nn.Module, face: Callable[[Item], Pixels], items: Iterable[Item], rows: Tensor, weights: Tensor,
           name: str | Path) -> Tensor:
    """Sum the embeddings of images by rows: row r is Σ weight · (embedding + embedding of the mirror image) over its images.

    All ranks call it together; each embeds its share of the images. No embeddings of single images are kept.

    Args:
        net: embeds images (B, 3, 112, 112).
        face: makes uint8 (112, 112, 3) RGB of an item, in a worker process.
        items: n of them.
        rows: int64 (n,); every row from 0 to R - 1 occurs.
        weights: float64 (n,).
        name: of the set, for the progress bar and errors.
    Returns:
        float64 (R, D), the same on all ranks; on the GPU where there is one.
    Raises:
        F2CError: embeddings are not finite, another rank has ended, or what ``face`` raises.
    """
    shard = Shard(*this_rank())
    first, end = shard.range_of(len(rows))
    sums = torch.zeros(int(rows.max()) + 1, embedding_size(net), dtype=torch.float64)
    with (worker_pool() as workers,
          tqdm(total=end - first, desc=f"embedding {Path(name).name}", unit=" images",
               disable=True if shard.rank else None) as bar):
        faces = workers.imap(face, islice(items, first, end), _CHUNK)
        for begin in range(first, end, _BATCH):
            part = slice(begin, min(begin + _BATCH, end))
            batch = torch.from_numpy(np.stack([*islice(faces, part.stop - begin)]))
            sums.index_add_(0, rows[part], embed(net, batch).sum(1) * weights[part, None])
            bar.update(len(batch))
    sums = sums.to("cuda" if torch.cuda.is_available() else "cpu")  # NCCL takes no tensors in main memory
    try:
        sums = shard.sum(sums)
    except RuntimeError as error:  # of gloo, when the connection to a rank is closed
        raise F2CError(f"rank {shard.rank} has embedded its images of {name}, but another rank has ended: see its "
                       "error") from error
    if not sums.isfinite().all():
        raise F2CError(f"the model's embeddings of {name} are not finite")
    return sums
