"""Finds everything that is wrong with a config before the training starts."""

import os
from collections.abc import Callable
from typing import Any

import torch

from f2c_plugin import initial
from f2c_plugin.build import margin_from
from f2c_plugin.config import DEFAULTS, TrainConfig, bad_keys, problems
from f2c_plugin.data.from_config import open_pack, steps_per_epoch
from f2c_plugin.errors import ConfigError, F2CError
from f2c_plugin.evaluation.onnx_export import rehearse_export, require_exportable
from f2c_plugin.models import NETWORKS, get_model, get_model_on_meta
from f2c_plugin.terms import read_teacher
from f2c_plugin.trainer.build import build_optimizer, head_factory, margin_loss, verification_sets
from f2c_plugin.trainer.output import checkpoints_in
from f2c_plugin.utils.registry import BACKBONES, SAMPLERS, load_plugin, origin


def check(cfg: TrainConfig, world_size: int = 1) -> None:
    """Try everything that the training is going to need, except the other ranks.

    Args:
        cfg: a config as ``load_config`` returns it.
        world_size: number of ranks there will be.
    Raises:
        ConfigError: with a line for everything that is wrong: the key or file, the value found, the remedy.
    """
    found, bad = problems(cfg, world_size), bad_keys(cfg)
    # Defaults in place of bad values, so that each key is judged by itself.
    rest = TrainConfig(cfg | {key: DEFAULTS[key] for key in bad.keys() & DEFAULTS.keys()})
    attempts: list[tuple[list[str], Callable[[], Any]]] = [
        (["head"], lambda: head_factory(cfg.head)),
        (["sampler"], lambda: cfg.sampler and load_plugin(SAMPLERS, cfg.sampler)),
        (["network", "embedding_size"], lambda: _network(rest)),
        (["margin_list"], lambda: margin_from(margin_loss(rest), None if "f2c_margin" in bad else cfg.get("f2c_margin"))),
        (["network", "embedding_size", "num_classes", "f2c_init"], lambda: _init_file(rest)),
        (["f2c_teacher"], lambda: cfg.get("f2c_teacher") and read_teacher(rest)),
        (["optimizer"], lambda: build_optimizer(rest, [torch.zeros(1)])),
        (["num_image", "batch_size"], lambda: _require_optimizer_steps(rest, world_size)),
        (["rec", "num_classes", "num_image"], lambda: open_pack(cfg)),
        (["rec", "val_targets"], lambda: [each.check() for each in verification_sets(cfg).values()]),
    ]
    for keys, attempt in attempts:
        if bad.keys().isdisjoint(keys):
            try:
                attempt()
            except (F2CError, OSError) as error:
                found += str(error).splitlines()
    if found:
        raise ConfigError("\n".join(found))


def _require_optimizer_steps(cfg: TrainConfig, world_size: int) -> None:
    steps = steps_per_epoch(cfg, world_size) * cfg.num_epoch
    if steps < cfg.gradient_acc:
        raise ConfigError(f"gradient_acc={cfg.gradient_acc}: the training has {steps} batches, so its optimizer would take no "
                          f"step: lower it to {steps} or less")


def _network(cfg: TrainConfig) -> None:
    name = f"network={cfg.network!r}"
    require_exportable(get_model_on_meta(cfg.network, cfg.embedding_size), name)
    if cfg.network not in NETWORKS and int(os.environ.get("RANK", 0)) == 0:  # the export would fail after days
        rehearse_export(get_model(cfg.network, cfg.embedding_size), cfg.embedding_size, f"{name}: "
                        + origin(BACKBONES, cfg.network))


def _init_file(cfg: TrainConfig) -> None:
    if cfg.get("f2c_init") and not checkpoints_in(cfg.output):  # a training that resumes does not need it
        initial.read(cfg, get_model_on_meta(cfg.network, cfg.embedding_size))
