"""ONNX export of a trained backbone."""

import logging
import warnings

import numpy as np
import onnx
import torch
from torch import nn

from f2c_plugin.data.dataset import IMAGE_SIZE

SAME_EMBEDDING = 0.9999  # cosine between PyTorch's and ONNX Runtime's


class ExportError(RuntimeError):
    """An exported model that does not embed as the original does."""


def export_onnx(net: nn.Module, path) -> None:
    """Write a net as ONNX: input ``data`` float32 (N, 3, 112, 112) in [-1, 1] RGB, N free; output ``embedding`` (N, D).

    The net is left on the CPU, in eval mode.
    """
    net = net.cpu().eval()
    with warnings.catch_warnings():
        # The newer exporter needs onnxscript, a dependency more for the same graph.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        torch.onnx.export(net, torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE), str(path), input_names=["data"],
                          output_names=["embedding"], dynamic_axes={"data": {0: "N"}, "embedding": {0: "N"}},
                          opset_version=17, dynamo=False)
    onnx.checker.check_model(onnx.load(path))


def onnx_cosine(net: nn.Module, path, images: torch.Tensor) -> float | None:
    """Smallest cosine between the embeddings of PyTorch and ONNX Runtime, NaN if one is; None without onnxruntime.

    Args:
        net: what was exported, in eval mode.
        path: the ONNX file.
        images: float32 (N, 3, 112, 112) in [-1, 1].
    """
    try:
        import onnxruntime
    except ImportError:
        logging.warning("the ONNX model is not compared with PyTorch: pip install f2c-plugin[onnxruntime]")
        return None
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    exported = session.run(None, {"data": images.numpy()})[0]
    with torch.no_grad():
        original = net(images).numpy()
    norms = np.linalg.norm(exported, axis=1) * np.linalg.norm(original, axis=1)
    return float(((exported * original).sum(1) / norms).min())
