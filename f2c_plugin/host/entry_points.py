"""The factories behind the entry points ``f2c_dcp`` (head) and ``f2c_dual`` (loader).

The host knows a group name, a name and a signature; these know the host's config.
"""

import logging
from pathlib import Path

import torch
from torch import nn

from f2c_plugin.config import ConfigError, F2CConfig
from f2c_plugin.data import DualLoader, DualSampler, RecordDataset
from f2c_plugin.head import F2CHead
from f2c_plugin.health import Health
from f2c_plugin.host.shipping import Shipping
from f2c_plugin.loss import Margin
from f2c_plugin.pool import DynamicClassPool
from f2c_plugin.ranks import WHOLE, Shard, this_rank
from f2c_plugin.recipe import Recipe


def f2c_dcp(cfg, backbone: nn.Module, margin_loss) -> F2CHead:
    """Head factory, group ``arcface_torch.heads``.

    Args:
        cfg: the host's config.
        backbone: the probe net, on its device and in DDP.
        margin_loss: the host's ``CombinedMarginLoss``, or anything with its attributes.
    Raises:
        ConfigError: lists everything that is wrong with the config.
    """
    rank, world_size = this_rank()
    settings = F2CConfig.read(cfg, world_size)
    pool = DynamicClassPool(settings.num_slots(cfg["num_classes"]), cfg["num_classes"], cfg["embedding_size"],
                            cfg.get("seed") or 0, getattr(torch, settings.pool_dtype),
                            Shard(rank, world_size) if settings.shard_pool else WHOLE)
    total_steps = steps_per_epoch(cfg, world_size) * cfg["num_epoch"]
    recipe = Recipe(settings.recipe, Margin.of_host(margin_loss), total_steps)
    logging.info("F²C head: a pool of %d slots for %d identities, %.0f MB on every rank; recipe %r", pool.num_slots,
                 cfg["num_classes"], pool.rows.nbytes / 2**20, settings.recipe)
    head = F2CHead(backbone, pool, recipe, settings.momentum, settings.symmetric, settings.hard_negatives,
                   cfg.get("gradient_acc", 1), bool(cfg.get("fp16")))
    if rank == 0:
        folder = Path(cfg["output"]) / "tensorboard" if cfg.get("output") else None
        head.health = Health(cfg.get("frequent", 10), total_steps, folder, settings.max_bad_steps)  # beside the host's own log
    shipping = Shipping(cfg, getattr(backbone, "module", backbone), head)
    head.verify, head.to_ship = shipping.verify, shipping.net  # which patch 0001 calls where a head has them
    return head.to(next(backbone.parameters()).device)


f2c_dcp.sampler = "f2c_dual"  # the loader that the head brings along


def f2c_dual(cfg, local_rank: int) -> DualLoader:
    """Loader factory, group ``arcface_torch.samplers``.

    Args:
        cfg: the host's config.
        local_rank: index of this process's GPU; without GPUs the batches stay on the CPU.
    Raises:
        ConfigError: the config is wrong in itself or unlike the pack.
        RecordError: the pack cannot be read.
    """
    _, world_size = this_rank()
    settings = F2CConfig.read(cfg, world_size)
    return record_loader(cfg, local_rank, settings.identity_rate)


def record_loader(cfg, local_rank: int, identity_rate: float) -> DualLoader:
    """Loader over the pack in ``cfg.rec`` with ``identity_rate`` of each batch in pairs."""
    rank, world_size = this_rank()
    dataset = open_pack(cfg)
    sampler = DualSampler(dataset.index, cfg["batch_size"], steps_per_epoch(cfg, world_size), identity_rate,
                          cfg.get("seed") or 0, rank, world_size)
    return DualLoader(dataset, sampler, training_device(local_rank), cfg.get("num_workers", 0))


def open_pack(cfg) -> RecordDataset:
    """The pack in ``cfg.rec``.

    Raises:
        ConfigError: there is none, or it is not what the config says.
        RecordError: it cannot be read.
    """
    if not (Path(cfg["rec"]) / "train.rec").is_file():
        raise ConfigError(f"rec={cfg['rec']!r}: there is no train.rec in {Path(cfg['rec']).absolute()}; give the folder of "
                          "a pack, or draw one with `f2c-plugin synth`")
    dataset = RecordDataset(cfg["rec"], skip_damaged=bool(cfg.get("f2c_skip_damaged")))
    _check_pack(cfg, dataset)
    return dataset


def training_device(local_rank: int) -> torch.device:
    """This process's GPU; the CPU where there are none."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def steps_per_epoch(cfg, world_size: int) -> int:
    """Steps of an epoch, as the host's schedule counts them."""
    steps = cfg["num_image"] // (cfg["batch_size"] * world_size)
    if steps == 0:
        raise ConfigError(f"num_image={cfg['num_image']} is less than one global batch, batch_size={cfg['batch_size']} "
                          f"× {world_size} ranks: an epoch would have no steps; lower batch_size")
    return steps


def _check_pack(cfg, dataset):
    largest = int(dataset.index.numbers[-1])
    problems = []
    if largest + 1 != cfg["num_classes"]:
        problems.append(f"num_classes={cfg['num_classes']}, but the last identity with an image in {dataset.records.path} is "
                        f"{largest}: set num_classes={largest + 1}")
    left_out = len(dataset.index.unreadable)
    if cfg["num_image"] != len(dataset) + left_out:
        problems.append(f"num_image={cfg['num_image']}, but {dataset.records.path} holds {len(dataset) + left_out} images: "
                        f"set num_image={len(dataset) + left_out}")
    if problems:
        raise ConfigError("\n".join(problems))
    if left_out:
        logging.warning("%s: %d records cannot be read and are left out: f2c-plugin index --verify lists them",
                        dataset.records.path, left_out)
