"""Trained nets, out of a model.pt or a checkpoint, and their export as ONNX."""

import logging
import os
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from f2c_plugin.data.dataset import IMAGE_SIZE, normalize_faces
from f2c_plugin.errors import CheckpointError, ExportError
from f2c_plugin.models import NETWORKS, get_model
from f2c_plugin.utils.safe_load import load_states

log = logging.getLogger(__name__)

SAME_EMBEDDING = 0.9999  # cosine between PyTorch's and ONNX Runtime's


def load_net(path, which: str = "probe") -> nn.Module:
    """A trained net, in eval mode on the CPU.

    Args:
        path: a ``model.pt``, or a checkpoint of the host (``checkpoint_gpu_*.pt``) or of the built-in host.
        which: "probe" or "gallery"; only checkpoints hold the gallery net.
    Raises:
        ExportError: the file holds no such net, or none of those that are known here.
    """
    path = Path(path)
    try:
        saved = load_states(path)
    except CheckpointError as error:
        raise ExportError(f"{path}: no file that holds a net ({error})") from error
    net_keys, head_keys = ("backbone", "state_dict_backbone"), ("head", "state_dict_softmax_fc")
    if not all(isinstance(saved.get(key, {}), dict) for key in net_keys + head_keys):
        raise ExportError(f"{path}: holds no net")
    if which == "probe":
        state = next((saved[key] for key in net_keys if key in saved), saved)
    else:
        head = next((saved[key] for key in head_keys if key in saved), {})
        state = {name.removeprefix("gallery.net."): value for name, value in head.items() if name.startswith("gallery.net.")}
        if not state:
            raise ExportError(f"{path}: holds no gallery net; a checkpoint of a training with head='f2c_dcp' and "
                              "save_all_states=True does")
    for name in NETWORKS:
        with torch.device("meta"):
            net = get_model(name)
        if net.state_dict().keys() == state.keys():
            try:
                net = get_model(name, len(state["features.weight"]))
                net.load_state_dict(state)
            except (RuntimeError, TypeError) as error:
                raise ExportError(f"{path}: its {name} cannot be used: {error}") from error
            return net.eval()
    raise ExportError(f"{path}: its weights are of none of the nets {', '.join(NETWORKS)}; nets of arcface_torch only are "
                      "exported by its own torch2onnx.py")


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
        log.warning("the ONNX model is not compared with PyTorch: pip install f2c-plugin[onnxruntime]")
        return None
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    exported = session.run(None, {"data": images.numpy()})[0]
    with torch.no_grad():
        original = net(images).numpy()
    norms = np.linalg.norm(exported, axis=1) * np.linalg.norm(original, axis=1)
    return float(((exported * original).sum(1) / norms).min())


def require_same_embedding(cosine: float | None, path) -> None:
    """Raise ExportError if what ``onnx_cosine`` found of the export at ``path`` is too little."""
    if cosine is not None and not cosine >= SAME_EMBEDDING:
        raise ExportError(f"{path} does not embed as model.pt does: the cosine is {cosine}, less than {SAME_EMBEDDING}")


def export_checked(net: nn.Module, path) -> float | None:
    """Export a net and compare it with ONNX Runtime's on random images, before the file gets its name.

    Returns:
        the smallest cosine, or None without onnxruntime.
    Raises:
        ExportError: the exported model does not embed as the net does.
    """
    partial = Path(f"{path}.partial")
    try:
        export_onnx(net, partial)
        faces = torch.randint(0, 256, (8, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=torch.uint8)
        cosine = onnx_cosine(net, partial, normalize_faces(faces))
        require_same_embedding(cosine, path)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return cosine
