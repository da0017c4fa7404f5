"""An exported model as a net that embeds faces."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from f2c_plugin.data.dataset import IMAGE_SIZE
from f2c_plugin.errors import ExportError
from f2c_plugin.utils.extras import require

_FIRST = 8  # nodes among which the insightface package, too, looks for a model's own normalisation


class OnnxNet(nn.Module):
    """Embeds images (B, 3, 112, 112) RGB in [-1, 1] by an ONNX model in ONNX Runtime, on the CPU; float32 (B, D).

    As the insightface package does, gives pixels from 0 to 255 to a model that begins by normalising them itself, and one
    image at a time to a model of fixed batch.

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
            self._session: Any = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # both raise almost anything
            raise ExportError(f"{path}: no ONNX model that can be run: {error}") from error
        self._takes_pixels = {"Sub", "Mul"} <= nodes
        given = self._session.get_inputs()
        shape = given[0].shape
        if len(given) != 1 or len(shape) != 4 or any(isinstance(size, int) and size != wanted for size, wanted in
                                                     zip(shape[1:], (3, IMAGE_SIZE, IMAGE_SIZE), strict=True)):
            shapes = ", ".join(f"{each.name} {each.shape}" for each in given)
            raise ExportError(f"{path}: takes {shapes}, but a face model takes (N, 3, {IMAGE_SIZE}, {IMAGE_SIZE})")
        self._one_by_one = shape[0] == 1

    def forward(self, images: Tensor) -> Tensor:
        pixels = (images * 127.5 + 127.5) if self._takes_pixels else images
        batches = pixels.split(1) if self._one_by_one else [pixels]
        name = self._session.get_inputs()[0].name
        found = [self._session.run(None, {name: batch.numpy().astype(np.float32)})[0] for batch in batches]
        if any(each.ndim != 2 or len(each) != len(batch) for each, batch in zip(found, batches, strict=True)):
            raise ExportError(f"{self.path}: gives {found[0].shape} for {len(batches[0])} faces, but a face model gives a row "
                              "for each")
        return torch.from_numpy(np.concatenate(found))
