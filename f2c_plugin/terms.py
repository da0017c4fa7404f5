"""The loss terms beside a head that a config asks for."""

from pathlib import Path
from typing import Protocol, cast

import torch
from torch import nn

from f2c_plugin.config import Config, F2CConfig
from f2c_plugin.errors import ConfigError, F2CError
from f2c_plugin.evaluation.onnx_export import load_net
from f2c_plugin.evaluation.verification import embedding_size
from f2c_plugin.method.distillation import Distillation
from f2c_plugin.method.low_resolution import LowResolution
from f2c_plugin.utils.distributed import this_rank
from f2c_plugin.utils.finite import not_finite, some


class CountsSteps(Protocol):
    """A head that counts its batches."""

    steps: int


def put_terms_beside(cfg: Config, backbone: nn.Module, head: nn.Module) -> None:
    """Add the terms of ``f2c_low_resolution`` and ``f2c_teacher`` to the head's loss.

    Args:
        cfg: the keys of the config.
        backbone: the probe net as the training loop calls it.
        head: with a number of ``steps``; not yet wrapped in DDP.
    Raises:
        ConfigError: the teacher does not fit.
    """
    settings, counting = F2CConfig.of(cfg), cast(CountsSteps, head)
    if settings.teacher:  # before images are made small, so that it sees them sharp
        teacher = read_teacher(cfg).to(next(backbone.parameters()).device)
        teacher.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        Distillation(teacher, bool(cfg.get("fp16"))).put("distillation", backbone, head)
    if settings.low_resolution:
        seed = cfg.get("seed") or 0, 5, this_rank()[0]
        term = LowResolution(backbone, settings.low_resolution, lambda: counting.steps, settings.momentum,
                             cfg.get("gradient_acc", 1), getattr(head, "gallery", None), seed)
        term.put("low_resolution", backbone, head)


def read_teacher(cfg: Config) -> nn.Module:
    """The net of ``config.f2c_teacher``.

    Raises ConfigError unless it can be read, is finite, and has embeddings of the config's size.
    """
    path = Path(cfg["f2c_teacher"])
    try:
        teacher = load_net(path)
    except (F2CError, OSError) as error:
        raise ConfigError(f"f2c_teacher: {error}") from error
    if (found := embedding_size(teacher)) != cfg["embedding_size"]:
        raise ConfigError(f"f2c_teacher={str(path)!r}: its embeddings have {found} numbers: set embedding_size={found}")
    if names := not_finite(teacher.state_dict()):
        raise ConfigError(f"f2c_teacher={str(path)!r}: {some(names)} not finite: choose another file")
    return teacher
