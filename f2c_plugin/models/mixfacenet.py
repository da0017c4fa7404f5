"""MixFaceNet (arXiv 2107.13046), a MixNet (arXiv 1907.09595) for faces of 112 pixels."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from f2c_plugin.models.blocks import Activation, LightNet, Residual, SqueezeExcitation, convolution, normalized


class Stage(NamedTuple):
    """Blocks of the same kind.

    Attributes:
        count: of blocks.
        outputs: channels that leave each of them.
        stride: of the first block.
        widening: channels in a block, times those that enter it.
        groups: of the 1×1 convolutions that widen and that narrow.
        kernels: sizes of depthwise kernels in a block: 3, 5, 7 and so on.
        squeeze: channels that enter a block, divided by those to which it squeezes; 0 for no squeeze-and-excitation.
    """

    count: int
    outputs: int
    stride: int
    widening: int
    groups: tuple[int, int]
    kernels: int
    squeeze: int


# At 56 pixels, from 56 to 28, from 28 to 14, at 14 and from 14 to 7.
SMALL = (Stage(1, 24, 1, 6, (2, 2), 1, 0), Stage(1, 24, 1, 3, (2, 2), 1, 0),
         Stage(1, 40, 2, 6, (1, 1), 3, 2), Stage(3, 40, 1, 6, (2, 2), 2, 2),
         Stage(1, 80, 2, 6, (1, 2), 3, 4), Stage(2, 80, 1, 6, (1, 2), 2, 4),
         Stage(1, 120, 1, 6, (2, 2), 3, 2), Stage(2, 120, 1, 3, (2, 2), 4, 2),
         Stage(1, 200, 2, 6, (1, 1), 5, 2), Stage(2, 200, 1, 6, (1, 2), 4, 2))
MEDIUM = (Stage(1, 32, 1, 6, (2, 2), 3, 0), Stage(1, 32, 1, 3, (2, 2), 1, 0),
          Stage(1, 40, 2, 6, (1, 1), 4, 2), Stage(3, 40, 1, 6, (2, 2), 2, 2),
          Stage(1, 80, 2, 6, (1, 1), 3, 4), Stage(3, 80, 1, 6, (2, 2), 4, 4),
          Stage(1, 120, 1, 6, (1, 1), 1, 2), Stage(3, 120, 1, 3, (2, 2), 4, 2),
          Stage(1, 200, 2, 6, (1, 1), 4, 2), Stage(3, 200, 1, 6, (1, 2), 4, 2))


def _swish(_: int) -> nn.Module:
    return nn.SiLU()


class _Mixed(nn.ModuleList):
    """Equal shares of the channels, each through a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([convolve(share) for convolve, share in zip(self, x.chunk(len(self), 1), strict=True)], 1)


def _depthwise(channels: int, kernels: int, stride: int) -> nn.Module:
    share = channels // kernels
    convolutions = [nn.Conv2d(share, share, size, stride, size // 2, groups=share, bias=False)
                    for size in range(3, 3 + 2 * kernels, 2)]
    return _Mixed(convolutions) if kernels > 1 else convolutions[0]


def _block(inputs: int, stride: int, stage: Stage, activation: Activation) -> Residual:
    """MobileNetV2's bottleneck with depthwise kernels of several sizes, and squeeze-and-excitation of the wide features."""
    width = inputs * stage.widening
    excited = [SqueezeExcitation(width, inputs // stage.squeeze, activation)] if stage.squeeze else []
    return Residual(convolution(inputs, width, groups=stage.groups[0], activation=activation),
                    normalized(_depthwise(width, stage.kernels, stride), width, activation), *excited,
                    convolution(width, stage.outputs, groups=stage.groups[1], activation=None),
                    shortcut=stride == 1 and inputs == stage.outputs)


class MixFaceNet(LightNet):
    """Without the channel shuffle of ShuffleMixFaceNet, whose parameters are the same: no file would say which net it holds.

    Args:
        channels: of the first convolution.
        stages: of blocks. Those with squeeze-and-excitation have Swish, the others PReLU.
        num_features: D.
        fp16: whether all but the last layers run under autocast.
    """

    def __init__(self, channels: int, stages: Iterable[Stage], num_features: int = 512, fp16: bool = False):
        body = [convolution(3, channels, 3, stride=2), Residual(convolution(channels, channels, 3, groups=channels),
                                                                convolution(channels, channels, activation=None))]
        for stage in stages:
            for index in range(stage.count):
                body.append(_block(channels, 1 if index else stage.stride, stage, _swish if stage.squeeze else nn.PReLU))
                channels = stage.outputs
        features = nn.BatchNorm1d(num_features)
        features.weight.requires_grad = False
        super().__init__(body, [convolution(channels, 1024),
                                convolution(1024, 1024, 7, groups=1024, padding=0, activation=None), nn.Flatten(),
                                nn.Linear(1024, num_features, bias=False), features], fp16)
