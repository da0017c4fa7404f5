"""Backbones by name.

The IResNets have the names, shapes and parameter names of arcface_torch, so a ``model.pt`` of one loads in
the other with ``strict=True``. ``small`` and ``tiny`` are for CPUs: demo, tests and benchmarks.
"""

from collections.abc import Callable
from functools import partial

from torch import nn

from f2c_plugin.errors import ConfigError
from f2c_plugin.models.iresnet import IResNet
from f2c_plugin.models.plain import PlainNet

Net = IResNet | PlainNet
Factory = Callable[[int, bool], Net]  # takes num_features and fp16


def _iresnet(*blocks: int) -> Factory:
    return lambda num_features, fp16: IResNet(blocks, num_features, fp16=fp16)


def _plain(*layers: tuple[int, int], before: Callable[[], nn.Module] = nn.Identity) -> Factory:
    return lambda num_features, fp16: PlainNet(layers, before, num_features, fp16)


NETWORKS: dict[str, Factory] = {
    "r18": _iresnet(2, 2, 2, 2), "r34": _iresnet(3, 4, 6, 3), "r50": _iresnet(3, 4, 14, 3),
    "r100": _iresnet(3, 13, 30, 3), "r200": _iresnet(6, 26, 60, 6),
    "small": _plain((16, 2), (32, 2), (32, 1), (64, 2), (64, 1), (128, 2), (128, 1)),
    "tiny": _plain((16, 2), (32, 2), (64, 2), (128, 1), before=partial(nn.AvgPool2d, 2)),
}


def get_model(name: str, num_features: int = 512, fp16: bool = False) -> Net:
    """A new net, from images (B, 3, 112, 112) in [-1, 1] to embeddings, float32 (B, num_features).

    With fp16, all but the last two layers run under autocast. Raises ConfigError if the name is not in NETWORKS.
    """
    if name not in NETWORKS:
        raise ConfigError(f"network={name!r}: must be one of {', '.join(NETWORKS)}")
    return NETWORKS[name](num_features, fp16)
