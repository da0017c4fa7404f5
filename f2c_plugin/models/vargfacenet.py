"""VarGFaceNet (arXiv 1910.04985): convolutions in groups of 8 channels, however many groups that makes."""

from functools import reduce

import torch
from torch import Tensor, nn

from f2c_plugin.models.blocks import LightNet, Row, SqueezeExcitation, convolution

_GROUP = 8  # channels
_SQUEEZE = 4


def _separable(inputs: int, outputs: int, stride: int, widening: int) -> Row:
    """A 3×3 convolution in groups, which widens, and a 1×1 convolution, without an activation behind it."""
    width = inputs * widening
    return Row(convolution(inputs, width, 3, stride, groups=inputs // _GROUP), convolution(width, outputs, activation=None))


class _Block(nn.Module):
    """The blocks of figure 1: normal (a), down sampling (b) and of the head (c).

    Args:
        branches: that are added up in the first half; with two there is no squeeze-and-excitation.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, branches: int = 1, widening: int = 2):
        super().__init__()
        self.branches = nn.ModuleList(_separable(inputs, outputs, stride, widening) for _ in range(branches))
        excited = [SqueezeExcitation(outputs, outputs // _SQUEEZE)] if branches == 1 else []
        self.second = Row(nn.PReLU(outputs), _separable(outputs, outputs, 1, widening), *excited)
        self.shortcut = nn.Identity() if stride == 1 else _separable(inputs, outputs, stride, widening)
        self.activation = nn.PReLU(outputs)

    def forward(self, x: Tensor) -> Tensor:
        first = reduce(torch.add, [branch(x) for branch in self.branches])
        return self.activation(self.second(first) + self.shortcut(x))


class VarGFaceNet(LightNet):
    """The net of table 1.

    Args:
        num_features: D.
        fp16: whether all but the last layers run under autocast.
    """

    def __init__(self, num_features: int = 512, fp16: bool = False):
        body: list[nn.Module] = [convolution(3, 40, 3), _Block(40, 40, 2, widening=1)]  # at 112 pixels, and to 56
        for channels, normal in (80, 2), (160, 6), (320, 3):  # to 28, 14 and 7 pixels
            body += [_Block(channels // 2, channels, 2, branches=2), *(_Block(channels, channels, 1) for _ in range(normal))]
        super().__init__(body, [convolution(320, 1024),
                                convolution(1024, 1024, 7, groups=1024 // _GROUP, padding=0, activation=None),
                                convolution(1024, 512), nn.Flatten(), nn.Linear(512, num_features),
                                nn.BatchNorm1d(num_features)], fp16)
