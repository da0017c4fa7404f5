"""The memory of tensors that are alive."""

import weakref
from typing import Any

from torch import Tensor


class LiveMemory:
    """Adds up the bytes of the tensors that it holds, each as long as it lives, and tensors that share a storage once.

    Attributes:
        live: bytes now.
        peak: most bytes at a time.
    """

    def __init__(self) -> None:
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        known = self._known.get(id(storage))  # which another had, if that one is gone
        if known and known() is storage:
            return
        size = storage.nbytes()

        def free(_: Any) -> None:
            self.live -= size
        self._known[id(storage)] = weakref.ref(storage, free)
        self.live += size
        self.peak = max(self.peak, self.live)
