"""Counts what a training step asks of a GPU, in a process with the stand-in: see `serve.py`.

A case has the keys of a config, and "ranks". Of a step after the first two, this is counted:
    kernels: {"head": …, "gallery net": …} operations that launch one.
    collectives: of the head's kernels, those that wait for other ranks.
    mixed: operations over tensors of both devices, each a wait.
    reads: operations that bring a value to the CPU, or whose result has a shape that depends on values.
    strided: softmaxes and reductions of a large tensor over a dimension that is not the last, which run in few threads.
    bytes_per_slot: that the head reads and writes, for each slot of this rank.
    peak: bytes above the state.
    pool: bytes of the head's state, without the gallery net.
"""

import collections
import types
from importlib.metadata import entry_points
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tests.meta  # noqa: F401
from f2c_plugin.method import kept_weights
from f2c_plugin.utils.live_memory import LiveMemory
from f2c_plugin.utils.replay import Replay

FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh", "detach", "alias",
        "_unsafe_view", "view", "_local_scalar_dense"}
READS = "_local_scalar_dense", "nonzero", "unique", "masked_select", "equal", "is_nonzero"
REDUCTIONS = "_softmax", "_log_softmax", "sum", "amax", "max", "mean", "logsumexp", "norm", "argmax", "topk", "sort", "cumsum"
LARGE = 1 << 20  # entries


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Counter(TorchDispatchMode):
    """Counts operations, by the part of the step at work; "" is not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.part = ""
        self.kernels: collections.Counter[str] = collections.Counter()
        self.operations: collections.Counter[str] = collections.Counter()
        self.mixed: list[str] = []
        self.reads: list[str] = []
        self.strided: list[str] = []
        self.bytes = self.collectives = 0
        self.memory = LiveMemory()

    def hold(self, tensor: Tensor) -> None:
        """Count the memory of a tensor on the GPU as long as it lives."""
        if tensor.device.type == "cuda":
            self.memory.hold(tensor)

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        inputs, outputs = tensors((args, kwargs)), tensors(result)
        for tensor in outputs:
            self.hold(tensor)
        name = str(function).split(".")[1]
        if not self.part:
            return result
        if any(read in name for read in READS):
            self.reads.append(name)
        if {"cpu", "cuda"} <= {tensor.device.type for tensor in inputs + outputs}:
            self.mixed.append(name)
        if name in FREE or function.is_view or not str(function).startswith(("aten.", "c10d.", "f2c_plugin.")):
            return result
        self.kernels[self.part] += 1
        self.operations[name] += 1
        self.collectives += str(function).startswith("c10d.")
        if self.part == "head" and not name.startswith("index"):  # these would count all that they choose from
            written = tensors([args[at] for at, argument in enumerate(function._schema.arguments[:len(args)])
                               if argument.is_write and str(function).startswith("f2c_plugin.")])
            self.bytes += sum(tensor.nbytes for tensor in inputs + outputs + written if tensor.device.type == "cuda")
        dims = args[2:] or [-1] if name == "topk" else args[1:]
        if name in REDUCTIONS and inputs[0].numel() >= LARGE and self._over_a_stride(inputs[0], dims):
            self.strided.append(f"{name} {list(inputs[0].shape)}")
        return result

    @staticmethod
    def _over_a_stride(tensor: Tensor, args: Any) -> bool:
        dims = next((arg for arg in args if isinstance(arg, (int, list, tuple))), [])
        return any(tensor.stride(dim) != 1 for dim in ([dims] if isinstance(dims, int) else dims))


COUNTER = Counter()


class Net(nn.Module):
    """Of many parameters, so that the update of its twin shows. Its own operations, and its twin's, are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 512), nn.BatchNorm1d(512),
                                    *[nn.Linear(512, 512) for _ in range(100)])

    def forward(self, images: Tensor) -> Tensor:
        with mock.patch.object(COUNTER, "part", ""):
            return self.layers(images)


def pretend(head: nn.Module) -> None:
    """That there is a GPU, once a head is built: with one, tensors would be made on the CPU first."""
    torch.cuda.is_available, torch.cuda.device_count, torch.cuda.current_device = lambda: True, lambda: 1, lambda: 0
    if kept := getattr(getattr(head, "pool", None), "kept", None):
        kept_weights.seen_by = lambda device, tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        kept._apply(lambda tensor: tensor.to("cuda"))


def call(replay: Replay, inputs: Any, numbers: Any, *_: Any) -> Any:
    """With the numbers of a step on the GPU, as in each step there."""
    return replay.function(*inputs, *torch.empty(len(numbers), dtype=torch.float64).unbind())


def main(case: dict[str, Any]) -> dict[str, Any]:
    case = dict(fp16=True, ranks=1, autocast="float16", f2c_pool_dtype="float16") | case
    ranks, autocast, slots = case.pop("ranks"), getattr(torch, case.pop("autocast")), case.pop("slots", 200_000)
    if ranks > 1:
        from torch.testing._internal.distributed.fake_pg import FakeStore
        distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    identities = case.pop("identities", 2_000_000)
    cfg: dict[str, Any] = dict(
        head="f2c_dcp", num_classes=identities, num_image=20 * identities, embedding_size=512, batch_size=128, num_epoch=1,
        frequent=10**9, rec=".", val_targets=[], seed=0, f2c_pool_rate=slots / identities, margin_list=(1.0, 0.0, 0.4)) | case
    factory = next(iter(entry_points(group="arcface_torch.heads", name="f2c_dcp"))).load()
    margin = types.SimpleNamespace(s=64.0, m1=1.0, m2=0.0, m3=0.4, interclass_filtering_threshold=0)
    counter = COUNTER
    Replay.__call__ = call
    nn.Module.to = lambda self, *_, **__: self  # fake parameters cannot be moved; all is made on the device here
    torch.set_autocast_dtype("cuda", autocast)

    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        net = Net().train()
        head = factory(cfg, net, margin).train()
        pretend(head)
        images = torch.empty(cfg["batch_size"], 3, 8, 8)
        labels = torch.empty(cfg["batch_size"], dtype=torch.int64)
        for step in range(3):
            if step == 2:
                counter.__enter__()
                for tensor in (*net.parameters(), *net.buffers(), *head.buffers(), *head.parameters()):
                    counter.hold(tensor)
                counter.part = "gallery net"
            embeddings = net(images)
            counter.part = "head" * (step == 2)
            counter.memory.peak = state = counter.memory.live  # with what the net keeps for its backward pass
            loss = head(embeddings, labels)
            torch.autograd.grad(loss, embeddings)
        counter.__exit__(None, None, None)
    return {
        "kernels": counter.kernels, "collectives": counter.collectives,
        "mixed": counter.mixed, "reads": counter.reads, "strided": counter.strided,
        "bytes_per_slot": round(counter.bytes / (slots / ranks)), "peak": counter.memory.peak - state,
        "pool": sum(tensor.nbytes for name, tensor in head.pool.named_buffers() if not name.startswith("kept.")),
        "most": dict(counter.operations.most_common(15))}
