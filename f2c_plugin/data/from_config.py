"""Builds the pack, the loader and the epoch length from a config."""

import logging
from pathlib import Path

import torch

from f2c_plugin.config import Config
from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.data.loader import DualLoader
from f2c_plugin.data.sampler import DualSampler
from f2c_plugin.data.tail import images_per_identity, large_identities
from f2c_plugin.errors import ConfigError
from f2c_plugin.utils.distributed import this_rank
from f2c_plugin.utils.paths import require_no_file

log = logging.getLogger(__name__)


def record_loader(cfg: Config, local_rank: int, identity_rate: float) -> DualLoader:
    """Loader over the pack in ``cfg.rec``. ``identity_rate``, 0 to 1, is the share of each batch that holds pairs.

    Raises ConfigError and RecordError as ``open_pack`` and ``steps_per_epoch`` do.
    """
    rank, world_size = this_rank()
    dataset = open_pack(cfg)
    sampler = DualSampler(dataset.index, cfg["batch_size"], steps_per_epoch(cfg, world_size), identity_rate,
                          cfg.get("seed") or 0, rank, world_size)
    return DualLoader(dataset, sampler, training_device(local_rank), cfg.get("num_workers", 0))


def open_pack(cfg: Config) -> RecordDataset:
    """The pack in ``cfg.rec``. Raises ConfigError if it is missing or does not fit, RecordError if it cannot be read."""
    require_no_file(cfg["rec"], "rec the folder of train.rec and train.idx", "train.rec", ConfigError)
    if not (Path(cfg["rec"]) / "train.rec").is_file():
        raise ConfigError(f"rec={cfg['rec']!r}: there is no train.rec in {Path(cfg['rec']).absolute()}; give the folder of "
                          "a pack, or draw one with `f2c-plugin synth`")
    dataset = RecordDataset(cfg["rec"], skip_damaged=bool(cfg.get("f2c_skip_damaged")))
    problems: list[str] = []
    left_out = len(dataset.index.unusable)
    num_classes, num_image = dataset.num_classes, len(dataset) + left_out
    if cfg["num_classes"] != num_classes:
        problems.append(f"num_classes={cfg['num_classes']}, but the last label of an image in {dataset.records.path} is "
                        f"{num_classes - 1}: set num_classes={num_classes}")
    if cfg["num_image"] != num_image:
        problems.append(f"num_image={cfg['num_image']}, but {dataset.records.path} holds {num_image} images: "
                        f"set num_image={num_image}")
    if problems:
        raise ConfigError("\n".join(problems))
    log.info("%s: images per identity: %s", dataset.records.path, images_per_identity(dataset.index))
    for warning in filter(None, (dataset.index.describe_conflict(), large_identities(dataset.index))):
        log.warning("%s: %s", dataset.records.path, warning)
    if left_out:
        log.warning("%s: %d records cannot be used and are left out: f2c-plugin index --verify lists them",
                    dataset.records.path, left_out)
    return dataset


def training_device(local_rank: int) -> torch.device:
    """The GPU of this process, or the CPU on a machine without GPUs."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def steps_per_epoch(cfg: Config, world_size: int) -> int:
    """Steps per epoch, counted as in arcface_torch's schedule. Raises ConfigError if there are none."""
    steps = cfg["num_image"] // (cfg["batch_size"] * world_size)
    if steps == 0:
        raise ConfigError(f"num_image={cfg['num_image']} is less than one global batch, batch_size={cfg['batch_size']} "
                          f"× {world_size} ranks: an epoch would have no steps; lower batch_size")
    return steps
