"""MobileFaceNet (arXiv 1804.07573) in the two sizes of arcface_torch, with the same shapes and parameter names."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class _Row(nn.Module):
    """Modules in a row, called ``layers`` in arcface_torch."""

    def __init__(self, *modules: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def _convolution(inputs: int, outputs: int, size: int = 1, stride: int = 1, groups: int = 1, padding: int | None = None,
                 linear: bool = False) -> _Row:
    """Convolution, batch norm and, unless ``linear``, PReLU."""
    padding = size // 2 if padding is None else padding
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding, groups=groups, bias=False)
    return _Row(convolution, nn.BatchNorm2d(outputs), *([] if linear else [nn.PReLU(outputs)]))


class _Bottleneck(_Row):
    """Widens to ``width`` channels, filters each by itself, and narrows without an activation (MobileNetV2's)."""

    def __init__(self, inputs: int, outputs: int, width: int, stride: int, shortcut: bool):
        super().__init__(_convolution(inputs, width), _convolution(width, width, 3, stride, groups=width),
                         _convolution(width, outputs, linear=True))
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.shortcut else self.layers(x)


def _residual(channels: int, count: int, width: int) -> _Row:
    return _Row(*(_Bottleneck(channels, channels, width, stride=1, shortcut=True) for _ in range(count)))


class MobileFaceNet(nn.Module):
    """Bottlenecks from 112 pixels to 7, and a depthwise convolution over all of these, which weighs each place by itself.

    Args:
        blocks: bottlenecks at 56 (or 1, a depthwise convolution), 28, 14 and 7 pixels.
        scale: times the paper's channels.
        num_features: D.
        fp16: whether all but the last layers run under autocast.
    """

    def __init__(self, blocks: Sequence[int], scale: int, num_features: int = 512, fp16: bool = False):
        super().__init__()
        self.fp16 = fp16
        narrow, wide = 64 * scale, 128 * scale
        at_56, at_28, at_14, at_7 = blocks
        self.layers = nn.ModuleList([
            _convolution(3, narrow, 3, stride=2),
            _convolution(narrow, narrow, 3, groups=64) if at_56 == 1 else _residual(narrow, at_56, 128),
            _Bottleneck(narrow, narrow, 128, stride=2, shortcut=False), _residual(narrow, at_28, 128),
            _Bottleneck(narrow, wide, 256, stride=2, shortcut=False), _residual(wide, at_14, 256),
            _Bottleneck(wide, wide, 512, stride=2, shortcut=False), _residual(wide, at_7, 256)])
        self.conv_sep = _convolution(wide, 512)
        self.features = _Row(_convolution(512, 512, 7, groups=512, padding=0, linear=True), nn.Flatten(),
                             nn.Linear(512, num_features, bias=False), nn.BatchNorm1d(num_features))
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=self.fp16):
            for layer in self.layers:
                x = layer(x)
        return self.features(self.conv_sep(x.float()))
