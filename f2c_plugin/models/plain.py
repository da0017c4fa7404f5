"""Small nets for CPUs: demo, tests and benchmarks."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from f2c_plugin.models.iresnet import conv


class PlainNet(nn.Module):
    """Convolutions of (channels, stride), from 112 pixels to 7. One core does hundreds of faces a second; IResNets, ten."""

    def __init__(self, layers: Iterable[tuple[int, int]], before: Callable[[], nn.Module] = nn.Identity,
                 num_features: int = 128, fp16: bool = False):
        super().__init__()
        self.fp16 = fp16
        modules: list[nn.Module] = [before()]
        inputs = 3
        for outputs, stride in layers:
            modules += [conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            inputs = outputs
        self.layers = nn.Sequential(*modules)
        self.fc = nn.Linear(inputs * 7 * 7, num_features)
        self.features = nn.BatchNorm1d(num_features)
        self.features.weight.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=self.fp16):
            x = self.layers(x).flatten(1)  # (B, channels · 7 · 7)
        return self.features(self.fc(x.float()))
