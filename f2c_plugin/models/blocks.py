"""What light backbones are built of."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

Activation = Callable[[int], nn.Module]  # takes the number of channels


class Row(nn.Module):
    """Modules in a row, called ``layers`` in arcface_torch."""

    def __init__(self, *modules: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Residual(Row):
    """A row, and beside it a shortcut, if it has one."""

    def __init__(self, *modules: nn.Module, shortcut: bool = True):
        super().__init__(*modules)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.shortcut else self.layers(x)


def normalized(convolution: nn.Module, outputs: int, activation: Activation | None = nn.PReLU) -> Row:
    """A convolution, batch norm and the activation, if any."""
    return Row(convolution, nn.BatchNorm2d(outputs), *([activation(outputs)] if activation else []))


def convolution(inputs: int, outputs: int, size: int = 1, stride: int = 1, groups: int = 1, padding: int | None = None,
                activation: Activation | None = nn.PReLU) -> Row:
    """Convolution, padded by half its size unless ``padding`` says otherwise, batch norm and the activation, if any."""
    padding = size // 2 if padding is None else padding
    return normalized(nn.Conv2d(inputs, outputs, size, stride, padding, groups=groups, bias=False), outputs, activation)


class SqueezeExcitation(nn.Module):
    """Weighs channels by what all of them are on average (arXiv 1709.01507), between 0 and 1."""

    def __init__(self, channels: int, squeezed: int, activation: Activation = nn.PReLU):
        super().__init__()
        self.weights = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, squeezed, 1), activation(squeezed),
                                     nn.Conv2d(squeezed, channels, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weights(x)


class LightNet(nn.Module):
    """A net of two parts.

    Args:
        body: from images to features (B, C, 7, 7); under autocast, if ``fp16``.
        embedding: from these, float32, to embeddings (B, D).
        fp16: whether the body runs under autocast.
    """

    def __init__(self, body: Iterable[nn.Module], embedding: Iterable[nn.Module], fp16: bool):
        super().__init__()
        self.fp16 = fp16
        self.body, self.embedding = nn.Sequential(*body), nn.Sequential(*embedding)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=self.fp16):
            x = self.body(x)
        return self.embedding(x.float())
