"""Backbones of the built-in host.

The IResNets carry arcface_torch's names, shapes and parameter names, so that a ``model.pt`` loads
in either with ``strict=True``. ``small`` and ``tiny`` are for CPUs: demo, tests and benchmarks.
"""

from functools import partial

import torch
from torch import Tensor, nn

from f2c_plugin.config import ConfigError

_BLOCKS = {"r18": (2, 2, 2, 2), "r34": (3, 4, 6, 3), "r50": (3, 4, 14, 3), "r100": (3, 13, 30, 3), "r200": (6, 26, 60, 6)}
# Of the plain nets: channels and stride of every convolution, from 112 pixels to 7, and what comes before.
_PLAIN = {"small": (((16, 2), (32, 2), (32, 1), (64, 2), (64, 1), (128, 2), (128, 1)), nn.Identity),
          "tiny": (((16, 2), (32, 2), (64, 2), (128, 1)), partial(nn.AvgPool2d, 2))}
NETWORKS = (*_BLOCKS, *_PLAIN)


def get_model(name: str, num_features: int = 512, dropout: float = 0.0, fp16: bool = False) -> nn.Module:
    """A net from images (B, 3, 112, 112) in [-1, 1] to embeddings float32 (B, num_features).

    Args:
        name: one of NETWORKS.
        fp16: whether everything but the last layer runs in the autocast type.
    Raises:
        ConfigError: an unknown name; lists those there are.
    """
    if name in _PLAIN:
        return PlainNet(*_PLAIN[name], num_features, fp16)
    if name not in _BLOCKS:
        raise ConfigError(f"network={name!r}: the built-in host has {', '.join(NETWORKS)}")
    return IResNet(_BLOCKS[name], num_features, dropout, fp16)


def _conv(inputs, outputs, size, stride=1):
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


class IResNetBlock(nn.Module):
    """Improved residual block: BN-conv-BN-PReLU-conv-BN, strided in the second convolution."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv(inputs, outputs, 3)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.prelu = nn.PReLU(outputs)
        self.conv2 = _conv(outputs, outputs, 3, stride)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return self.bn3(self.conv2(x)) + shortcut


class IResNet(nn.Module):
    """The residual net of ArcFace (arXiv 1801.07698, section 3.2.2): 7×7 features, BN-dropout-FC-BN at the end.

    Args:
        blocks: number of blocks at 56, 28, 14 and 7 pixels.
    """

    def __init__(self, blocks, num_features=512, dropout=0.0, fp16=False):
        super().__init__()
        self.fp16 = fp16
        self.conv1 = _conv(3, 64, 3)
        self.bn1 = nn.BatchNorm2d(64)
        self.prelu = nn.PReLU(64)
        inputs = 64
        for stage, (outputs, count) in enumerate(zip((64, 128, 256, 512), blocks), start=1):
            layer = [IResNetBlock(inputs if i == 0 else outputs, outputs, 2 if i == 0 else 1) for i in range(count)]
            setattr(self, f"layer{stage}", nn.Sequential(*layer))
            inputs = outputs
        self.bn2 = nn.BatchNorm2d(512)
        self.dropout = nn.Dropout(dropout, inplace=True)
        self.fc = nn.Linear(512 * 7 * 7, num_features)
        self.features = nn.BatchNorm1d(num_features)
        self.features.weight.requires_grad = False  # the scale of an embedding is nobody's business
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=self.fp16):
            x = self.prelu(self.bn1(self.conv1(x)))  # (B, 64, 112, 112)
            x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (B, 512, 7, 7)
            x = self.dropout(self.bn2(x).flatten(1))
        return self.features(self.fc(x.float()))


class PlainNet(nn.Module):
    """Convolutions one after the other, a few hundred faces a second on a core where an IResNet sees ten.

    Args:
        layers: (channels, stride) of every convolution.
        before: makes the module that the images go through first.
    """

    def __init__(self, layers, before=nn.Identity, num_features=128, fp16=False):
        super().__init__()
        self.fp16 = fp16
        modules, inputs = [before()], 3
        for outputs, stride in layers:
            modules += [_conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            inputs = outputs
        self.layers = nn.Sequential(*modules)
        self.fc = nn.Linear(inputs * 7 * 7, num_features)
        self.features = nn.BatchNorm1d(num_features)
        self.features.weight.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=self.fp16):
            x = self.layers(x).flatten(1)  # (B, channels · 7 · 7)
        return self.features(self.fc(x.float()))
