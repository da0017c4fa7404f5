"""Backbones by name.

The IResNets carry arcface_torch's names, shapes and parameter names, so that a ``model.pt`` loads in
either with ``strict=True``. ``small`` and ``tiny`` are for CPUs: demo, tests and benchmarks.
"""

from collections.abc import Callable
from functools import partial

from torch import nn

from f2c_plugin.errors import ConfigError
from f2c_plugin.models.iresnet import IResNet
from f2c_plugin.models.plain import PlainNet


def _iresnet(*blocks: int) -> Callable[[int, bool], nn.Module]:
    return lambda num_features, fp16: IResNet(blocks, num_features, fp16=fp16)


def _plain(*layers: tuple[int, int], before: Callable[[], nn.Module] = nn.Identity) -> Callable[[int, bool], nn.Module]:
    """``layers``: channels and stride of every convolution, from 112 pixels to 7."""
    return lambda num_features, fp16: PlainNet(layers, before, num_features, fp16)


# What makes each net, from (num_features, fp16).
NETWORKS: dict[str, Callable[[int, bool], nn.Module]] = {
    "r18": _iresnet(2, 2, 2, 2), "r34": _iresnet(3, 4, 6, 3), "r50": _iresnet(3, 4, 14, 3),
    "r100": _iresnet(3, 13, 30, 3), "r200": _iresnet(6, 26, 60, 6),
    "small": _plain((16, 2), (32, 2), (32, 1), (64, 2), (64, 1), (128, 2), (128, 1)),
    "tiny": _plain((16, 2), (32, 2), (64, 2), (128, 1), before=partial(nn.AvgPool2d, 2)),
}


def get_model(name: str, num_features: int = 512, fp16: bool = False) -> nn.Module:
    """A net from images (B, 3, 112, 112) in [-1, 1] to embeddings float32 (B, num_features).

    Args:
        name: one of NETWORKS.
        fp16: whether everything but the last layer runs in the autocast type.
    Raises:
        ConfigError: an unknown name; lists those there are.
    """
    if name not in NETWORKS:
        raise ConfigError(f"network={name!r}: must be one of {', '.join(NETWORKS)}")
    return NETWORKS[name](num_features, fp16)
