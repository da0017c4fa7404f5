"""Steps that a GPU repeats by itself: hundreds of small kernels, launched at once as CUDA graphs."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from f2c_plugin.utils.distributed import recording

_CALLS_BEFORE = 3  # in which libraries start up, and kernels are compiled and tuned: a recording cannot hold that

Number = float | Tensor  # float64 (), where it changes from step to step and a recording needs it on the GPU
Step = Callable[..., Sequence[Tensor]]


class Replay:
    """Calls a function of tensors; on a GPU the fourth call records what it launches, and later ones launch the recording.

    The function has fixed shapes, never waits for the GPU, changes tensors in place only, and gives the same work in each
    call. Collectives of ``utils.distributed`` are not recorded, but called between the parts of the recording.

    Args:
        function: from tensors, and ``numbers`` in a row, to tensors.
    """

    def __init__(self, function: Step):
        self.function = function
        self._of: Any = None  # what the calls had in common that are counted, and recorded
        self._calls = 0
        self._recording: _Recording | None = None

    def __call__(self, inputs: Sequence[Tensor], numbers: Sequence[float], state: Sequence[Tensor],
                 constants: Any = None) -> Sequence[Tensor]:
        """What the function returns, in tensors of the caller's own.

        Args:
            inputs: tensors on one device, without gradient.
            numbers: that differ between the calls. On a GPU the function gets them as float64 ().
            state: all tensors that the function uses beside.
            constants: all else that the function depends on.
        """
        device = inputs[0].device
        if not _can_record(device, state):
            return self.function(*inputs, *numbers)
        of = constants, [(each.shape, each.dtype) for each in inputs], [each.data_ptr() for each in state]
        if of != self._of:
            self._of, self._calls, self._recording = of, 0, None
        self._calls += 1
        # From locked memory, else the CPU would wait.
        there = torch.tensor(numbers, dtype=torch.float64, device="cpu", pin_memory=True).to(device, non_blocking=True)
        if self._calls <= _CALLS_BEFORE:
            return self.function(*inputs, *there.unbind())
        if self._recording is None:
            try:
                self._recording = _Recording(self.function, [*inputs, there])
            except RuntimeError as error:
                raise RuntimeError("the step cannot be recorded as CUDA graphs; f2c_fused=False goes without") from error
        return self._recording(*inputs, there)

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy or a pickle: without the recording, which belongs to the original's tensors."""
        return {"function": self.function, "_of": None, "_calls": 0, "_recording": None}


def _can_record(device: torch.device, state: Sequence[Tensor]) -> bool:
    """Whether the calls can be recorded: everything is on a GPU, and nobody else is recording."""
    return (device.type == "cuda" and torch.cuda.is_initialized() and all(each.is_cuda for each in state)
            and not torch.cuda.is_current_stream_capturing())


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Garbage is collected before, not within: it may hold memory that a GPU sees, and to let go of that ends a recording."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Recording:
    """CUDA graphs, and the collectives between them. They share memory, which is theirs for good."""

    def __init__(self, function: Step, inputs: Sequence[Tensor]):
        self._inputs = [each.clone() for each in inputs]
        self._parts: list[Callable[[], Any]] = []
        self._memory = torch.cuda.graph_pool_handle()
        self._graph: torch.cuda.CUDAGraph | None = None
        with no_garbage_collection(), torch.cuda.stream(torch.cuda.Stream()), recording(self._between):
            torch.cuda.synchronize()
            self._begin()
            try:
                self._outputs = list(function(*self._inputs[:-1], *self._inputs[-1].unbind()))
            finally:
                self._end()

    def _begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # Other threads, as those of loaders and of NCCL, may go on with what they do.
        self._graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")

    def _end(self) -> None:
        assert self._graph is not None
        self._graph.capture_end()
        self._parts.append(self._graph.replay)

    def _between(self, collective: Callable[[], Any]) -> None:
        self._end()
        self._parts.append(collective)
        self._begin()

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given)
        for part in self._parts:
            part()
        return torch._foreach_add(self._outputs, 0)  # pyright: ignore[reportPrivateImportUsage]  # copies them by one kernel
