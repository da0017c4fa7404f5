"""What a training is made of, from a config: nets, head, optimizer, learning rate, loader, verification sets."""

import random
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

from f2c_plugin.build import CombinedMargin, margin_from
from f2c_plugin.config import Config
from f2c_plugin.data.from_config import record_loader, steps_per_epoch
from f2c_plugin.data.loader import DualLoader
from f2c_plugin.errors import ConfigError, UnknownPlugin, VerificationSetError
from f2c_plugin.evaluation.verification import VerificationSet
from f2c_plugin.method.schedule import Schedule
from f2c_plugin.terms import put_terms_beside
from f2c_plugin.trainer.full_fc import FullFC
from f2c_plugin.utils.registry import HEADS, SAMPLERS, load_plugin

HeadFactory = Callable[[Any, nn.Module, CombinedMargin], nn.Module]


def softmax(cfg: Config, backbone: nn.Module, margin_loss: CombinedMargin) -> nn.Module:
    """Head factory of the full FC layer. Scale and margin are in full from the first step, unless ``softmax_ramp``."""
    margin = margin_from(margin_loss, cfg.get("f2c_margin"))
    if cfg["softmax_ramp"]:
        total_steps = cfg["num_epoch"] * steps_per_epoch(cfg, distributed.get_world_size())
        schedule = Schedule.resident(margin, total_steps, pretrained=bool(cfg.get("f2c_init")))
    else:
        schedule = Schedule(margin)
    head = FullFC(cfg["embedding_size"], cfg["num_classes"], schedule, cfg.get("f2c_sub_centers", 1))
    put_terms_beside(cfg, backbone, head)
    return wrap(head.to(next(backbone.parameters()).device))


BUILT_IN_HEADS: dict[str, HeadFactory] = {"softmax": softmax}


def head_factory(name: str | None) -> HeadFactory:
    """The factory of the head that ``config.head`` names.

    Raises:
        ConfigError: none is named.
        UnknownPlugin: there is no such head.
    """
    if name is None:
        raise ConfigError("head is not set, and the built-in trainer has no Partial FC: set head='f2c_dcp', or 'softmax' "
                          "for the full FC layer")
    if name in BUILT_IN_HEADS:
        return BUILT_IN_HEADS[name]
    try:
        return load_plugin(HEADS, name)
    except UnknownPlugin as error:
        raise UnknownPlugin(f"{error}; built in: {', '.join(BUILT_IN_HEADS)}") from None


def build_loader(cfg: Config, factory: HeadFactory, local_rank: int) -> DualLoader:
    """The loader that ``config.sampler`` names, or the head's, or one that serves every image once a pass."""
    sampler = cfg["sampler"] or getattr(factory, "sampler", None)
    if sampler:
        return load_plugin(SAMPLERS, sampler)(cfg, local_rank)
    return record_loader(cfg, local_rank, identity_rate=0.0)


def verification_sets(cfg: Config) -> dict[str, VerificationSet]:
    """The sets that ``config.val_targets`` names, by name.

    Raises:
        ConfigError: lists those that cannot be read; or there is none to choose a net by.
    """
    if cfg.get("f2c_export") == "best" and not cfg["val_targets"]:
        raise ConfigError("f2c_export='best', but val_targets is empty: name a verification set to choose by")
    sets: dict[str, VerificationSet] = {}
    wrong: list[str] = []
    for name in cfg["val_targets"]:
        try:
            sets[name] = VerificationSet(Path(cfg["rec"]) / f"{name}.bin")
        except VerificationSetError as error:
            wrong.append(f"val_targets names {name!r}: {error}")
    if wrong:
        raise ConfigError("\n".join(wrong))
    return sets


def wrap(module: nn.Module) -> nn.Module:
    """The module in DDP, where there are several ranks. GPUs exchange gradients in float16, as in arcface_torch."""
    if distributed.get_world_size() == 1:
        return module
    device = next(module.parameters()).device
    if device.type != "cuda":
        return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)
    wrapped = nn.parallel.DistributedDataParallel(module, [device.index], broadcast_buffers=False, static_graph=True)
    wrapped.register_comm_hook(None, fp16_compress_hook)
    return wrapped


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def margin_loss(cfg: Config) -> CombinedMargin:
    """The attributes of arcface_torch's CombinedMarginLoss that head factories read."""
    m1, m2, m3 = cfg["margin_list"]
    margin = SimpleNamespace(s=cfg["scale"], m1=m1, m2=m2, m3=m3,
                             interclass_filtering_threshold=cfg["interclass_filtering_threshold"])
    return cast(CombinedMargin, margin)


def build_optimizer(cfg: Config, parameters: Iterable[Any]) -> torch.optim.Optimizer:
    """The optimizer that ``config.optimizer`` names, fused: it leaves a step out by itself if its ``found_inf`` says so.

    Raises:
        ConfigError: there is no such optimizer.
    """
    if cfg["optimizer"] == "sgd":
        optimizer = torch.optim.SGD(parameters, cfg["lr"], cfg["momentum"], weight_decay=cfg["weight_decay"], fused=True)
    elif cfg["optimizer"] == "adamw":
        optimizer = torch.optim.AdamW(parameters, cfg["lr"], weight_decay=cfg["weight_decay"], fused=True)
    else:
        raise ConfigError(f"optimizer={cfg['optimizer']!r}: must be 'sgd' or 'adamw'")
    _fit_for_fused_steps(optimizer)
    optimizer.register_load_state_dict_post_hook(_fit_for_fused_steps)
    return optimizer


def _fit_for_fused_steps(optimizer: torch.optim.Optimizer) -> None:
    """What fused steps need, and neither PyTorch nor a checkpoint of 0.2 gives them.

    A fused step goes over memory, whatever the strides, so that state in another layout would be that of other numbers: nets
    of 0.2 were not channels_last. And if the very first step is left out, as with float16 it nearly always is, PyTorch begins
    with momentum that nobody has initialised.
    """
    for group in optimizer.param_groups:
        group["fused"] = True
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if group.get("momentum") and state.get("momentum_buffer") is None:
                state = optimizer.state[parameter]
                state["momentum_buffer"] = torch.zeros_like(parameter)
            for name, value in state.items():
                if value.shape == parameter.shape:
                    state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
                elif name == "step":  # AdamW's
                    state[name] = value.to(parameter.device)


def learning_rate(cfg: Config, step: int, total_steps: int) -> float:
    """arcface_torch's schedule: the learning rate of a batch, counted from 0: linear warm-up, then linear to 0."""
    warmup = total_steps // cfg["num_epoch"] * cfg["warmup_epoch"]
    share = (step + 1) / warmup if step < warmup else (total_steps - step) / max(total_steps - warmup, 1)
    return cfg["lr"] * share
