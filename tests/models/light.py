"""Light backbones, and how operations were counted in their papers."""

from math import prod

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from f2c_plugin.models import get_model

LIGHT = ["mixfacenet_s", "mixfacenet_m", "vargfacenet"]


def _mixfacenets(module, inputs, outputs):
    """Two for each multiplication and addition, two for each value in batch norm, one in activations and pooling."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        return (2 * prod(module.weight.shape[1:]) + (module.bias is not None)) * outputs.numel()
    if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)):
        return 2 * inputs.numel()
    return inputs.numel() if isinstance(module, (nn.PReLU, nn.SiLU, nn.Sigmoid, nn.AdaptiveAvgPool2d)) else 0


def _challenges(module, _, outputs):
    """As the Lightweight Face Recognition Challenge (2019) counts: n products without a bias take n - 1 additions, or fewer."""
    if isinstance(module, nn.Conv2d):
        return 2 * prod(module.weight.shape[1:]) * outputs.numel() - (module.bias is None) * outputs.numel() // module.groups
    return 2 * module.weight.numel() if isinstance(module, nn.Linear) else 0


def parameters_and_operations(name, count):
    """Of a net, and of one image in it."""
    counted = []
    with FakeTensorMode():
        net = get_model(name).eval()
        for module in net.modules():
            if not list(module.children()):
                module.register_forward_hook(lambda module, inputs, outputs: counted.append(count(module, inputs[0], outputs)))
        net(torch.empty(1, 3, 112, 112))
    return sum(each.numel() for each in net.parameters()), sum(counted)


# {network: (parameters, how operations were counted, MFLOPs)}
PUBLISHED = {"mixfacenet_s": ("3.07", _mixfacenets, "451.7"), "mixfacenet_m": ("3.95", _mixfacenets, "626.1"),
             "vargfacenet": ("5.20", _challenges, "1022.9")}
