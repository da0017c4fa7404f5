"""An exported model as a net that embeds faces."""

from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from f2c_plugin.data.dataset import IMAGE_SIZE
from f2c_plugin.errors import ExportError
from f2c_plugin.utils.extras import require

_TAKEN = f"(N, 3, {IMAGE_SIZE}, {IMAGE_SIZE})"
_FIRST = 8  # nodes among which the insightface package, too, looks for a model's own normalisation


class OnnxNet(nn.Module):
    """Embeds images (B, 3, 112, 112) RGB in [-1, 1] by an ONNX model in ONNX Runtime, on the CPU; float32 (B, D).

    As the insightface package does, gives pixels from 0 to 255 to a model that begins by normalising them itself. A model of
    fixed batch gets batches of that size, the last of them filled up.

    Args:
        path: of the ``.onnx`` file.
    Raises:
        ExportError: it cannot be read, or does not embed such images.
        F2CError: onnxruntime is missing.
    """

    def __init__(self, path: str | Path):
        super().__init__()
        runtime = require("onnxruntime", extra="onnxruntime")
        self.path = Path(path)
        try:
            nodes = {node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node[:_FIRST]}
            options = runtime.SessionOptions()
            options.log_severity_level = 4  # its errors come as exceptions, too
            self._session: Any = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # both raise almost anything
            raise ExportError(f"{path}: no ONNX model that can be run: {error}") from error
        self._takes_pixels = {"Sub", "Mul"} <= nodes
        given = self._session.get_inputs()
        shape = given[0].shape if given else []
        if len(given) != 1 or len(shape) != 4 or any(isinstance(size, int) and size != wanted for size, wanted in
                                                     zip(shape[1:], (3, IMAGE_SIZE, IMAGE_SIZE), strict=True)):
            self._refuse(", ".join(f"{each.name} {each.shape}" for each in given) or "nothing")
        if given[0].type != "tensor(float)":
            self._refuse(f"{given[0].name} {shape} of {given[0].type}")
        self._batch = shape[0] if isinstance(shape[0], int) and shape[0] > 0 else None
        self._run(np.zeros((self._batch or 2, 3, IMAGE_SIZE, IMAGE_SIZE), np.float32))  # its errors come before the work

    def forward(self, images: Tensor) -> Tensor:
        pixels = ((images * 127.5 + 127.5) if self._takes_pixels else images).numpy().astype(np.float32)
        if self._batch is None:
            return torch.from_numpy(self._run(pixels))
        filled = np.concatenate([pixels, np.repeat(pixels[-1:], -len(pixels) % self._batch, 0)])
        found = [self._run(filled[i:i + self._batch]) for i in range(0, len(filled), self._batch)]
        return torch.from_numpy(np.concatenate(found)[:len(pixels)])

    def _run(self, batch: NDArray[np.float32]) -> NDArray[Any]:
        try:
            found = self._session.run(None, {self._session.get_inputs()[0].name: batch})[0]
        except Exception as error:  # of ONNX Runtime's own kinds
            reason = str(error).strip()
            raise ExportError(f"{self.path}: fails for {batch.shape}, but a face model takes {_TAKEN}: {reason}") from error
        if found.ndim != 2 or len(found) != len(batch):
            raise ExportError(f"{self.path}: gives {found.shape} for {len(batch)} faces, but a face model gives a row for each")
        return found

    def _refuse(self, taken: str) -> NoReturn:
        raise ExportError(f"{self.path}: takes {taken}, but a face model takes {_TAKEN} of float32")
