"""MobileFaceNet (arXiv 1804.07573) in the two sizes of arcface_torch, with the same shapes and parameter names."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from f2c_plugin.models.blocks import Residual, Row, convolution


def _bottleneck(inputs: int, outputs: int, width: int, stride: int, shortcut: bool) -> Residual:
    """Widens to ``width`` channels, filters each by itself, and narrows without an activation (MobileNetV2's)."""
    return Residual(convolution(inputs, width), convolution(width, width, 3, stride, groups=width),
                    convolution(width, outputs, activation=None), shortcut=shortcut)


def _residual(channels: int, count: int, width: int) -> Row:
    return Row(*(_bottleneck(channels, channels, width, stride=1, shortcut=True) for _ in range(count)))


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
            convolution(3, narrow, 3, stride=2),
            convolution(narrow, narrow, 3, groups=64) if at_56 == 1 else _residual(narrow, at_56, 128),
            _bottleneck(narrow, narrow, 128, stride=2, shortcut=False), _residual(narrow, at_28, 128),
            _bottleneck(narrow, wide, 256, stride=2, shortcut=False), _residual(wide, at_14, 256),
            _bottleneck(wide, wide, 512, stride=2, shortcut=False), _residual(wide, at_7, 256)])
        self.conv_sep = convolution(wide, 512)
        self.features = Row(convolution(512, 512, 7, groups=512, padding=0, activation=None), nn.Flatten(),
                            nn.Linear(512, num_features, bias=False), nn.BatchNorm1d(num_features))
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=self.fp16):
            for layer in self.layers:
                x = layer(x)
        return self.features(self.conv_sep(x.float()))
