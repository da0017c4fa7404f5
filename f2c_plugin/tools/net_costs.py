"""What a step of a backbone takes of a GPU, counted on tensors that have shapes but no values."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from f2c_plugin.errors import BrokenPlugin, ConfigError
from f2c_plugin.models import get_model, get_model_on_meta, import_package_of
from f2c_plugin.utils.live_memory import LiveMemory


@dataclass(frozen=True)
class NetCosts:
    """Of a batch on one GPU.

    Attributes:
        parameters: bytes of parameters and buffers, float32.
        gradients: bytes of all gradients; momentum takes as many.
        images: bytes of a batch of them, float32.
        peak: most bytes that forward and backward pass hold at a time beside parameters and images: what autograd
            saves, weights in half precision, the operation at work, gradients.
        flops: floating point operations of forward and backward pass in convolutions and matrix products, two for each
            multiplication and addition.
        forward_flops: of these, the forward pass's.
    """

    parameters: int
    gradients: int
    images: int
    peak: int
    flops: int
    forward_flops: int


class CostsByBatch:
    """The costs of a net with any batch, from those with two: they grow evenly."""

    def __init__(self, network: str, embedding_size: int, batch_size: int, fp16: bool):
        self._batch_size = batch_size
        self._here, self._twice = (count(network, embedding_size, times * batch_size, fp16) for times in (1, 2))

    def __call__(self, batch_size: int) -> NetCosts:
        more, twice = batch_size / self._batch_size - 1, vars(self._twice)
        return NetCosts(**{key: value + int(more * (twice[key] - value)) for key, value in vars(self._here).items()})


class _Outputs(TorchDispatchMode):
    """Holds all tensors that operations make in ``memory``."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = LiveMemory()

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.memory.hold(tensor)
        return result


def _backward_of_convolution(grad: Any, images: Any, weights: Any, *others: Any, output_mask: Any = None, **_: Any) -> int:
    """By images and by weights each as many operations as forward. PyTorch's own count takes no notice of groups."""
    return conv_flop_count(images, weights, grad) * sum((output_mask or others[7])[:2])


_PRODUCTS = {torch.ops.aten.convolution_backward: _backward_of_convolution}


@cache
def count(network: str, embedding_size: int, batch_size: int, fp16: bool) -> NetCosts:
    """Count a training step of a net, without the optimizer.

    The tensors say that they are on the CPU, which in mixed precision computes in bfloat16: as large as float16.

    Raises:
        ConfigError: there is no such net, or it needs values, as a net whose shapes depend on them.
    """
    import_package_of(network)
    try:
        # Inputs that are not fake: a net that needs values comes from outside, without its own any more.
        with FakeTensorMode(allow_non_fake_inputs=True), _Outputs() as outputs:
            memory = outputs.memory
            try:
                net = get_model(network, embedding_size, fp16)
            except BrokenPlugin:
                with unset_fake_temporarily():
                    net = get_model_on_meta(network, embedding_size, fp16)
                net.to_empty(device="cpu")
            net.train()
            images = torch.empty(batch_size, 3, 112, 112)
            before = memory.peak = memory.live
            with FlopCounterMode(display=False, custom_mapping=_PRODUCTS) as flops:
                embeddings = net(images)
                forward_flops = flops.get_total_flops()
                embeddings.sum().backward()
            return NetCosts(sum(tensor.nbytes for tensor in net.state_dict().values()),
                            sum(parameter.nbytes for parameter in net.parameters() if parameter.requires_grad), images.nbytes,
                            memory.peak - before, flops.get_total_flops(), forward_flops)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"--network {network}: cannot be counted with a batch of {batch_size}: {error}") from error
