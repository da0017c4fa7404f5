"""The factories behind the entry points ``f2c_dcp`` and ``dcq`` (heads) and ``f2c_dual`` (loader), which read arcface_torch's
config, and of the backbones that arcface_torch does not have."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from f2c_plugin.arcface_torch.adapter import (
    ArcFaceTorchDCQHead,
    ArcFaceTorchF2CHead,
    ArcFaceTorchHead,
    ArcFaceTorchResidentHead,
)
from f2c_plugin.build import CombinedMargin, build_head, margin_from
from f2c_plugin.config import Config, F2CConfig
from f2c_plugin.data.from_config import record_loader, steps_per_epoch
from f2c_plugin.data.loader import DualLoader
from f2c_plugin.initial import initialize
from f2c_plugin.models import get_model
from f2c_plugin.terms import put_terms_beside
from f2c_plugin.utils.distributed import this_rank

log = logging.getLogger(__name__)


def f2c_dcp(cfg: Config, backbone: nn.Module, margin_loss: CombinedMargin) -> ArcFaceTorchHead:
    """Head factory, group ``arcface_torch.heads``, for a backbone on its device and in DDP. Raises ConfigError.

    As ``dcq`` it makes DCQ's head, because ``config.head`` says so.
    """
    head = _head(cfg, backbone, margin_loss)
    initialize(cfg, backbone, head, resumed=bool(cfg.get("resume")))
    return head


def _head(cfg: Config, backbone: nn.Module, margin_loss: CombinedMargin) -> ArcFaceTorchHead:
    """The head, on the backbone as it is."""
    _, world_size = this_rank()
    settings = F2CConfig.read(cfg, world_size)
    total_steps = steps_per_epoch(cfg, world_size) * cfg["num_epoch"]
    margin = margin_from(margin_loss, settings.margin)
    if "scale" in cfg:  # a key of the built-in trainer; arcface_torch's margin always has 64
        margin = replace(margin, scale=float(cfg["scale"]))
    folder = Path(cfg.get("output") or ".") if settings.kept_weights == "file" else None
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    head = build_head(
        backbone, cfg["num_classes"], total_steps, embedding_size=cfg["embedding_size"],
        margin=margin,
        pool_rate=settings.pool_rate, pool_dtype=getattr(torch, settings.pool_dtype), recipe=settings.recipe,
        kept_weights=folder, shard_pool=settings.shard_pool, momentum=settings.momentum, symmetric=settings.symmetric,
        num_hard_negatives=settings.hard_negatives, sub_centers=settings.sub_centers, forget_rate=settings.forget_rate,
        queue_size=settings.queue_size, gallery_images=settings.gallery_images, seed=cfg.get("seed") or 0,
        gradient_acc=cfg.get("gradient_acc", 1), autocast=bool(cfg.get("fp16")), hook=True,
        pretrained=settings.init is not None, fused=settings.fused,
        classes=(ArcFaceTorchResidentHead, ArcFaceTorchF2CHead, ArcFaceTorchDCQHead))
    assert isinstance(head, ArcFaceTorchHead)
    put_terms_beside(cfg, backbone, head)
    head.configure(cfg, settings, total_steps)
    log.info("F²C head: a pool of %d slots for %d identities, %.1f MB on every rank; recipe %r", head.pool.num_slots,
             cfg["num_classes"], head.pool.rows.nbytes / 2**20, settings.recipe)
    return head


f2c_dcp.sampler = "f2c_dual"  # type: ignore[attr-defined]  # the loader that the head brings along
f2c_dcp.without_init = _head  # type: ignore[attr-defined]  # for loops that load f2c_init after they have tried to resume


def f2c_dual(cfg: Any, local_rank: int) -> DualLoader:
    """Loader factory, group ``arcface_torch.samplers``. The batches are on the GPU, if any. Raises ConfigError, RecordError."""
    return record_loader(cfg, local_rank, F2CConfig.read(cfg, this_rank()[1]).share_of_pairs)


def _backbone(name: str) -> Callable[..., nn.Module]:
    """Backbone factory, group ``arcface_torch.backbones``. Like most of arcface_torch's, these nets have no dropout."""
    return lambda num_features=512, fp16=False, dropout=0.0: get_model(name, num_features, fp16)


mixfacenet_s, mixfacenet_m, vargfacenet = map(_backbone, ("mixfacenet_s", "mixfacenet_m", "vargfacenet"))
small, tiny = map(_backbone, ("small", "tiny"))
