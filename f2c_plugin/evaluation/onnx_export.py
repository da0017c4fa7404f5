"""Loads trained nets from a model.pt or a checkpoint and exports them as ONNX."""

import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from f2c_plugin.data.dataset import IMAGE_SIZE, normalize_faces
from f2c_plugin.errors import CheckpointError, ExportError, F2CError
from f2c_plugin.evaluation.verification import embed
from f2c_plugin.models import get_model, get_model_on_meta, networks
from f2c_plugin.utils.atomic import naming, require_writable, written_whole
from f2c_plugin.utils.extras import require
from f2c_plugin.utils.finite import not_finite, some
from f2c_plugin.utils.safe_load import load_states

log = logging.getLogger(__name__)
SAME_EMBEDDING = 0.9999  # smallest cosine between embeddings of PyTorch and ONNX Runtime that counts as equal
ONNX_BYTES = 2**31  # a file holds fewer: protobuf's limit


def load_net(path: str | Path, which: str = "probe") -> nn.Module:
    """Load a net, in eval mode on the CPU, from a ``model.pt`` or a checkpoint of arcface_torch or the built-in trainer.

    ``which`` is "probe" or "gallery"; only checkpoints hold the gallery net. Raises ExportError if the file does not
    hold that net, or its architecture is none of ``networks()``.
    """
    path = Path(path)
    try:
        saved = load_states(path)
    except CheckpointError as error:
        raise ExportError(f"{path}: holds no net ({error})") from error
    state = saved.get("backbone", saved.get("state_dict_backbone", saved))
    head = saved.get("head", saved.get("state_dict_softmax_fc", {}))
    if not isinstance(state, dict) or not isinstance(head, dict):
        raise ExportError(f"{path}: holds no net")
    if which != "probe":
        state = {str(name).removeprefix("gallery.net."): value for name, value in head.items()
                 if str(name).startswith("gallery.net.")}
        if not state:
            raise ExportError(f"{path}: holds no gallery net: give a checkpoint of a training with head='f2c_dcp' and "
                              "save_all_states=True")
    name, wrong = _network_of(state)
    if not name:
        raise ExportError(f"{path}: its weights fit none of the nets {', '.join(networks())}: export other nets of "
                          "arcface_torch with its own torch2onnx.py")
    if wrong:
        raise ExportError(f"{path}: its weights do not fit {name}: {some(wrong)} of other shapes")
    try:
        net = get_model(name, embedding_size(state))
        net.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ExportError(f"{path}: its weights do not fit {name}: {error}") from error
    return net.eval()


def embedding_size(state: dict[str, Any]) -> int:
    """D, from the state of the batch norm in which all nets of arcface_torch end; 1 if what should say it is no vector."""
    last = [value for name, value in state.items() if name.endswith("running_mean")][-1:]
    return len(last[0]) if last and torch.is_tensor(last[0]) and last[0].dim() else 1


def _network_of(state: dict[str, Any]) -> tuple[str, list[str]]:
    """The net whose parameters have these names, "" if there is none, and which of them have other shapes there.

    Of several nets, the first of those that fit best. Found without building one, for a small file can ask for a net of many
    gigabytes.
    """
    wrong: dict[str, list[str]] = {}
    for network in networks():
        expected = get_model_on_meta(network, embedding_size(state)).state_dict()
        if expected.keys() == state.keys():
            wrong[network] = [name for name, value in expected.items() if getattr(state[name], "shape", None) != value.shape]
            if not wrong[network]:
                break
    name = min(wrong, key=lambda network: len(wrong[network]), default="")
    return name, wrong.get(name, [])


def unusable(net: nn.Module) -> list[str]:
    """What of a net is not finite: names of parameters and buffers, or "its embeddings" of a random face; [] if nothing is."""
    face = torch.randint(0, 256, (1, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return not_finite(net.state_dict()) or ([] if embed(net, face).isfinite().all() else ["its embeddings"])


def require_exportable(net: nn.Module, name: str) -> None:
    """Raise ExportError, which begins with ``name``, if a net, on any device, is too large for an ONNX file."""
    size = sum(tensor.nbytes for tensor in net.state_dict().values())
    if size >= ONNX_BYTES:
        raise ExportError(f"{name}: its weights take {size / 2**30:.1f} GiB, and an ONNX file holds less than 2 GiB: choose a "
                          "smaller net")


def export_checked(net: nn.Module, path: str | Path, images: torch.Tensor | None = None) -> float | None:
    """Write a net as ONNX, from ``data``, float32 (N, 3, 112, 112) RGB in [-1, 1], to ``embedding``, float32 (N, D).

    Args:
        images: float32 (N, 3, 112, 112) in [-1, 1] to compare net and export with; None takes random ones.
    Returns:
        The smallest cosine between the embeddings of both; None, with a warning, without onnxruntime.
    Raises:
        ExportError: the net is too large or not finite, or its export gives other embeddings. Nothing is written.
        OSError: the file cannot be written.
    """
    require_exportable(net, f"{path}: not written")
    require_writable(path)
    net = net.cpu().eval()  # and leave it there, in that mode
    if found := unusable(net):
        raise ExportError(f"{path}: not written, because the net is not finite: {some(found)}: export an earlier checkpoint")
    if images is None:
        images = normalize_faces(torch.randint(0, 256, (8, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=torch.uint8))
    with naming(Path(path)):  # the temporary folder may be full, too
        model = _as_onnx(net)
    cosine = _onnx_cosine(net, model, images)
    if cosine is not None and not cosine >= SAME_EMBEDDING:
        raise ExportError(f"{path}: not written: the export gives other embeddings than the net; their cosine is {cosine}, "
                          f"below {SAME_EMBEDDING}")
    with written_whole(path) as file:
        file.write(model)
    return cosine


def _as_onnx(net: nn.Module) -> bytes:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        file = Path(folder) / "model.onnx"
        # The newer exporter gives the same graph but needs another dependency, onnxscript.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        torch.onnx.export(net, (torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE),), str(file), input_names=["data"],
                          output_names=["embedding"], dynamic_axes={"data": {0: "N"}, "embedding": {0: "N"}},
                          opset_version=17, dynamo=False)
        model = file.read_bytes()
    onnx.checker.check_model(model)
    return model


def _onnx_cosine(net: nn.Module, model: bytes, images: torch.Tensor) -> float | None:
    try:
        onnxruntime = require("onnxruntime", extra="onnxruntime")
    except F2CError as error:
        log.warning("the ONNX model is not compared with PyTorch: %s", error)
        return None
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    exported = session.run(None, {"data": images.numpy()})[0]
    with torch.no_grad():
        original = net(images).numpy()
    norms = np.linalg.norm(exported, axis=1) * np.linalg.norm(original, axis=1)
    return float(((exported * original).sum(1) / norms).min())
