"""The residual nets of arcface_torch, with the same shapes and parameter names."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    """A padded convolution without bias: the output has the size of the input divided by the stride."""
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


class IResNetBlock(nn.Module):
    """Improved residual block: BN-conv-BN-PReLU-conv-BN, strided in the second convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv(inputs, outputs, 3)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.prelu = nn.PReLU(outputs)
        self.conv2 = conv(outputs, outputs, 3, stride)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return self.bn3(self.conv2(x)) + shortcut


def _stage(inputs: int, outputs: int, count: int) -> nn.Sequential:
    """``count`` blocks, of which the first halves the size."""
    others = (IResNetBlock(outputs, outputs, stride=1) for _ in range(count - 1))
    return nn.Sequential(IResNetBlock(inputs, outputs, stride=2), *others)


class IResNet(nn.Module):
    """The residual net of ArcFace (arXiv 1801.07698, section 3.2.2). Ends in BN-dropout-FC-BN on 7×7 features.

    Args:
        blocks: in each of the four stages.
        num_features: D.
        dropout: of the features before the last layer.
        fp16: whether all but the last layers run under autocast.
        segments: parts of the second and the third stage of which activations are computed again in the backward pass, but
            for the last part's, to save their memory; None keeps them.
    """

    def __init__(self, blocks: Sequence[int], num_features: int = 512, dropout: float = 0.0, fp16: bool = False,
                 segments: tuple[int, int] | None = None):
        super().__init__()
        self.fp16, self.segments = fp16, segments
        self.conv1 = conv(3, 64, 3)
        self.bn1 = nn.BatchNorm2d(64)
        self.prelu = nn.PReLU(64)
        at_56, at_28, at_14, at_7 = blocks  # pixels
        self.layer1 = _stage(64, 64, at_56)
        self.layer2 = _stage(64, 128, at_28)
        self.layer3 = _stage(128, 256, at_14)
        self.layer4 = _stage(256, 512, at_7)
        self.bn2 = nn.BatchNorm2d(512)
        self.dropout = nn.Dropout(dropout, inplace=True)
        self.fc = nn.Linear(512 * 7 * 7, num_features)
        self.features = nn.BatchNorm1d(num_features)
        self.features.weight.requires_grad = False  # embeddings are normalized, so a common scale has no effect
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=self.fp16):
            x = self.prelu(self.bn1(self.conv1(x)))  # (B, 64, 112, 112)
            x = self.layer1(x)  # (B, 64, 56, 56)
            if self.segments and self.training:
                for stage, parts in zip((self.layer2, self.layer3), self.segments, strict=True):
                    x = checkpoint_sequential(stage, parts, x, use_reentrant=False)
            else:
                x = self.layer3(self.layer2(x))
            x = self.layer4(x)  # (B, 512, 7, 7)
            x = self.dropout(self.bn2(x).flatten(1))
        return self.features(self.fc(x.float()))
