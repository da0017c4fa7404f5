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
from f2c_plugin.errors import CheckpointError, ConfigError, ExportError, F2CError
from f2c_plugin.evaluation.verification import embed
from f2c_plugin.models import NETWORKS, TOO_LARGE, get_model, get_model_on_meta, networks
from f2c_plugin.utils.atomic import naming, require_writable, written_whole
from f2c_plugin.utils.extras import require
from f2c_plugin.utils.finite import not_finite, some
from f2c_plugin.utils.inputs import embeddings_in
from f2c_plugin.utils.safe_load import load_states
from f2c_plugin.utils.schema import FORMAT

log = logging.getLogger(__name__)
SAME_EMBEDDING = 0.9999  # smallest cosine between embeddings of PyTorch and ONNX Runtime that counts as equal
ONNX_BYTES = 2**31  # a file holds fewer: protobuf's limit
LARGEST_EMBEDDING = 1 << 16  # numbers; of a config, too
HAVE_GALLERY_NETS = "f2c_recipe='paper', head='dcq' or f2c_forget_rate above 0"


def load_net(path: str | Path, which: str = "probe", network: str | None = None) -> nn.Module:
    """Load a net, in eval mode on the CPU, from a ``model.pt`` or a checkpoint of arcface_torch or the built-in trainer.

    Args:
        path: of the file.
        which: "probe" or "gallery"; only checkpoints hold the gallery net.
        network: one of ``networks()``. None takes the one that a checkpoint of the built-in trainer names; other files name
            none, and are of the one that their weights fit.
    Raises:
        ExportError: the file does not hold that net, does not fit it, or fits several that may embed differently.
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
            raise ExportError(f"{path}: holds no gallery net" + (
                ", because its training had none: with the recipe 'resident' there is one only with f2c_forget_rate above 0, "
                "and with head='softmax' none" if head else
                ": give a checkpoint of a training with save_all_states=True")
                + f"; trainings with {HAVE_GALLERY_NETS} have one")
    settings = saved.get("settings") if saved.get("format") == FORMAT else None
    named = settings if isinstance(settings, dict) else {}
    size = named.get("embedding_size")
    size = min(size if type(size) is int and size > 0 else _embedding_size_in(state), LARGEST_EMBEDDING)
    if network is None and isinstance(named.get("network"), str):
        network = named["network"]
        if network not in networks():
            raise ExportError(f"{path}: is of a training with network={network!r}, which is not installed here: install the "
                              "package that offers it")
    name = network or _network_of(path, state, size)
    try:
        others, wrong = _misfits(name, state, size)
        if found := [f"{some(names)} {what}" for names, what in ((others, "only in one of both"), (wrong, "of other shapes"))
                     if names]:
            raise ExportError(f"{path}: its weights do not fit {name}: {'; '.join(found)}")
        net = get_model(name, size)
        net.load_state_dict(state)
    except ConfigError as error:
        raise ExportError(f"{path}: {error}") from error
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ExportError(f"{path}: its weights do not fit {name}: {error}") from error
    return net.eval()


def _embedding_size_in(state: dict[Any, Any]) -> int:
    """D, from the state of the batch norm in which all nets of arcface_torch end, or without one from the last tensor's rows;
    1 if what should say it has none."""
    last = ([value for name, value in state.items() if str(name).endswith("running_mean")] or [*state.values()])[-1:]
    return max(len(last[0]), 1) if last and torch.is_tensor(last[0]) and last[0].dim() else 1


def _network_of(path: Path, state: dict[Any, Any], size: int) -> str:
    """The net that the state fits, or of several that have its names, the first of those that fit best.

    Raises ExportError if there is none, or several of which one is another package's. This package's own nets of the same
    shapes differ in training alone.
    """
    fits: list[str] = []
    near: dict[str, list[str]] = {}
    broken: list[str] = []
    for network in sorted(networks(), key=TOO_LARGE.__contains__):  # those last, which take the longest to build
        if network in NETWORKS and not NETWORKS.keys().isdisjoint(fits):
            continue
        try:
            others, wrong = _misfits(network, state, size)
        except ConfigError as error:
            broken.append(str(error))
            continue
        if not others and not wrong:
            fits.append(network)
        elif not others:
            near[network] = wrong
    if len(fits) > 1:
        raise ExportError(f"{path}: its weights fit {' and '.join(fits)}, which may embed faces differently, and the file does "
                          "not say which of them it is: give a checkpoint of the built-in trainer, which does; or name it, "
                          "--network NAME, to f2c-plugin export or evaluate")
    if not fits and not near:
        raise ExportError(f"{path}: its weights fit none of the nets {', '.join(networks())}: export other nets of "
                          "arcface_torch with its own torch2onnx.py" + "".join(f"; left out: {each}" for each in broken))
    return fits[0] if fits else min(near, key=lambda network: len(near[network]))


def _misfits(network: str, state: dict[Any, Any], size: int) -> tuple[list[str], list[str]]:
    """Names that only one of state and net has, and those of other shapes. Raises ConfigError if there is no such net.

    Found without building one where that can be, for a small file can ask for a net of many gigabytes.
    """
    expected = get_model_on_meta(network, size).state_dict()
    others = sorted(map(str, expected.keys() ^ state.keys()))
    return others, [name for name, value in expected.items() if name in state and
                    getattr(state[name], "shape", None) != value.shape]


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
        model = _as_onnx(net, f"{path}: not written")
    cosine = _onnx_cosine(net, model, images, f"{path}: not written")
    if cosine is not None and not cosine >= SAME_EMBEDDING:
        raise ExportError(f"{path}: not written: the export gives other embeddings than the net; their cosine is {cosine}, "
                          f"below {SAME_EMBEDDING}")
    with written_whole(path) as file:
        file.write(model)
    return cosine


def rehearse_export(net: nn.Module, embedding_size: int, name: str) -> None:
    """Raise ExportError, which begins with ``name``, unless a net, trained or not, gives each face of a batch an embedding,
    itself and as ONNX."""
    images = torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    try:
        with torch.no_grad():
            embeddings = embeddings_in(net.eval()(images))
    except F2CError as error:
        raise ExportError(f"{name}: {error}") from error
    except Exception as error:  # another package's
        raise ExportError(f"{name}: cannot embed faces: {type(error).__name__}: {error}: set another network") from error
    if embeddings.shape != (len(images), embedding_size):
        raise ExportError(f"{name}: gives embeddings {tuple(embeddings.shape)} of {len(images)} faces, but must give "
                          f"{(len(images), embedding_size)}: set embedding_size to what it gives, or another network")
    _run_onnx(_as_onnx(net, name), images, embedding_size, name)


def _as_onnx(net: nn.Module, name: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        file = Path(folder) / "model.onnx"
        # The newer exporter gives the same graph but needs another dependency, onnxscript.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        try:
            torch.onnx.export(net, (torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE),), str(file), input_names=["data"],
                              output_names=["embedding"], dynamic_axes={"data": {0: "N"}, "embedding": {0: "N"}},
                              opset_version=17, dynamo=False)
            model = file.read_bytes()
            onnx.checker.check_model(model)
        except OSError:
            raise
        except Exception as error:  # the exporter raises almost anything, as for an operator that it does not know
            raise ExportError(f"{name}: the net cannot be exported: {type(error).__name__}: {error}") from error
    return model


def _onnx_cosine(net: nn.Module, model: bytes, images: torch.Tensor, name: str) -> float | None:
    with torch.no_grad():
        original = net(images).numpy()
    exported = _run_onnx(model, images, original.shape[1], name)
    if exported is None:
        return None
    norms = np.linalg.norm(exported, axis=1) * np.linalg.norm(original, axis=1)
    return float(((exported * original).sum(1) / norms).min())


def _run_onnx(model: bytes, images: torch.Tensor, embedding_size: int, name: str) -> np.ndarray | None:
    """Embeddings (N, D) of images (N, 3, 112, 112); None, with a warning, without onnxruntime."""
    try:
        onnxruntime = require("onnxruntime", extra="onnxruntime")
    except F2CError as error:
        log.warning("the ONNX model is not compared with PyTorch: %s", error)
        return None
    try:
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        exported = session.run(None, {"data": images.numpy()})[0]
    except Exception as error:  # the runtime has errors of its own
        raise ExportError(f"{name}: the export cannot be run with {len(images)} faces: {error}") from error
    if exported.shape != (len(images), embedding_size):
        raise ExportError(f"{name}: the export gives {exported.shape} for {len(images)} faces: its graph is fixed to the one "
                          "face that it was made with: let the net's forward pass keep the number of faces as it comes, "
                          "x.flatten(1) or x.size(0), without int()")
    return exported
