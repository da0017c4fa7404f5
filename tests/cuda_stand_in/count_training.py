"""What the loader and a whole step of the built-in trainer ask of a GPU, in a process with the stand-in: see `serve.py`.

A case has the keys of a config. Of the third step, this is counted:
    mixed, reads: as of `count.py`, in the step.
    settled: how often the trainer has asked whether a step was bad.
    loader: the copies between devices of a batch, and whether each waits.
"""

import itertools
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from f2c_plugin.config import DEFAULTS, TrainConfig
from f2c_plugin.data.loader import DualLoader
from f2c_plugin.models import NETWORKS
from f2c_plugin.trainer import bad_steps
from f2c_plugin.trainer.loop import build_state, train_step
from f2c_plugin.trainer.rendezvous import process_group
from tests.cuda_stand_in.count import COUNTER, Net, pretend

BATCH = 128


class Stream:
    """For the streams and events of PyTorch's builds for CUDA."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    record = synchronize = __enter__ = __exit__ = wait_event


class Copies(TorchDispatchMode):
    """Notes the copies between devices, and whether the CPU waits for each."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[bool] = []

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if str(function).startswith("aten._to_copy") and result.device != args[0].device:
            self.found.append(not (kwargs or {}).get("non_blocking"))
        return result


def batches(_: DualLoader) -> Any:
    """As the workers hand them over."""
    for _ in range(3):
        faces = torch.empty(BATCH, 8, 8, 3, dtype=torch.uint8, device="cpu")
        yield faces, torch.empty(BATCH, dtype=torch.int64, device="cpu"), []


def loaded(cfg: TrainConfig) -> tuple[list[bool], list[tuple[Tensor, Tensor]]]:
    sampler = mock.Mock(steps=range(3), seed=0, rank=0)
    loader = mock.Mock(dual_sampler=sampler, device=torch.device("cuda"), _decoded=lambda: batches(loader), num_damaged=0)
    loader._ready = lambda batch, _: batch
    with torch.device("cpu"), Copies() as copies, mock.patch.object(Tensor, "record_stream"):
        found = list(itertools.islice(DualLoader.__iter__(loader), 3))
    return copies.found, found


def main(case: dict[str, Any]) -> dict[str, Any]:
    cfg = TrainConfig(DEFAULTS | dict(
        head="f2c_dcp", network="counted", num_classes=100_000, num_image=10 * BATCH, embedding_size=512, batch_size=BATCH,
        num_epoch=1, rec=".", val_targets=[], seed=0, f2c_pool_rate=0.1, margin_list=(1.0, 0.0, 0.4)) | case)
    NETWORKS["counted"] = lambda num_features, fp16: Net()
    asked = 0

    def left_behind(number: Tensor) -> Any:
        def read() -> float:
            nonlocal asked
            asked += 1
            return 0.0
        assert number.is_cuda
        return read

    bad_steps.left_behind = left_behind
    torch.cuda.Stream, torch.cuda.Event, torch.cuda.stream = Stream, Stream, Stream
    with process_group(), FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        torch.nn.Module.to = lambda self, *_, **__: self
        state = build_state(cfg, torch.device("cuda"), 10)
        pretend(state.head)
        state.scaler = torch.amp.GradScaler("cuda", enabled=cfg.fp16, growth_interval=100)
        copies, found = loaded(cfg)
        for step, (images, labels) in enumerate(found):
            if step == 2:
                COUNTER.__enter__()
                COUNTER.part = "step"
            train_step(state, images, labels)
        COUNTER.__exit__(None, None, None)
    return dict(mixed=COUNTER.mixed, reads=COUNTER.reads, settled=asked, loader=copies, kernels=COUNTER.kernels)
