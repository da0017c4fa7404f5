"""ONNX export of a trained backbone."""

import logging
import warnings
from copy import deepcopy

import numpy as np
import onnx
import torch
from torch import nn

from f2c_plugin.data.dataset import IMAGE_SIZE

SAME_EMBEDDING = 0.9999  # cosine between PyTorch's and ONNX Runtime's


def export_onnx(net: nn.Module, path) -> None:
    """Write a net as ONNX: input ``data`` float32 (N, 3, 112, 112) in [-1, 1] RGB, N free; output ``embedding`` (N, D)."""
    net = deepcopy(net).cpu().eval()
    net.fp16 = False  # an exported model computes in float32
    with warnings.catch_warnings():
        # The newer exporter needs onnxscript, a dependency more for the same graph.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        torch.onnx.export(net, torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE), str(path), input_names=["data"],
                          output_names=["embedding"], dynamic_axes={"data": {0: "N"}, "embedding": {0: "N"}},
                          opset_version=17, dynamo=False)
    onnx.checker.check_model(onnx.load(path))


def check_onnx(net: nn.Module, path, images: torch.Tensor) -> float | None:
    """Smallest cosine between the embeddings of PyTorch and ONNX Runtime; None without onnxruntime.

    Args:
        net: what was exported.
        path: the ONNX file.
        images: float32 (N, 3, 112, 112) in [-1, 1], N > 1.
    Raises:
        RuntimeError: the embeddings differ.
    """
    try:
        import onnxruntime
    except ImportError:
        logging.warning("the ONNX model is not compared with PyTorch: pip install f2c-plugin[onnxruntime]")
        return None
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    exported = session.run(None, {"data": images.numpy()})[0]
    net = deepcopy(net).cpu().eval()
    net.fp16 = False
    with torch.no_grad():
        original = net(images).numpy()
    norms = np.linalg.norm(exported, axis=1) * np.linalg.norm(original, axis=1)
    cosine = float(((exported * original).sum(1) / norms).min())
    if not cosine >= SAME_EMBEDDING:
        raise RuntimeError(f"{path}: its embeddings differ from PyTorch's, cosine {cosine:.6f} < {SAME_EMBEDDING}")
    return cosine
