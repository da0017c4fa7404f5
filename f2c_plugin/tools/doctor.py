"""Shows the installed packages and GPUs, and examines a checkout or a pack."""

import os
import platform
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch

from f2c_plugin.arcface_torch import patching
from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.errors import F2CError
from f2c_plugin.evaluation.verification import VerificationSet
from f2c_plugin.models import NETWORKS, get_model_on_meta
from f2c_plugin.tools.packs import describe, spread
from f2c_plugin.utils.extras import installing
from f2c_plugin.utils.registry import BACKBONES, HEADS, SAMPLERS, installed, load_plugin, origin

PACKAGES = ("f2c-plugin", "torch", "numpy", "easydict", "simplejpeg", "tqdm", "onnx")
# Optional packages, and the extra that installs each.
EXTRAS = {"onnxruntime": "onnxruntime", "matplotlib": "plot", "pillow": "plot", "tensorboard": "tensorboard",
          "wandb": "wandb", "mlflow-skinny": "mlflow", "scikit-learn": "host", "timm": "vit",
          "datasets": "huggingface"}
SAMPLE = 100  # images per set to decode as a test

Finding = tuple[bool, str, object]  # whether it is good, its name, what was found


def examine(checkout: str | Path | None = None, dataset: str | Path | None = None) -> bool:
    """Print all findings, line by line. Returns whether everything is in order."""
    healthy = True
    for good, name, found in _findings(checkout, dataset):
        print(f"{' ' if good else '!'} {name:<22} {found}")
        healthy = healthy and good
    return healthy


def _findings(checkout: str | Path | None, dataset: str | Path | None) -> Iterator[Finding]:
    yield True, "python", platform.python_version()
    yield from _versions()
    yield from _found("GPUs", _gpus)
    yield True, "CPU threads", f"{torch.get_num_threads()} of {os.cpu_count()}"
    for group, name in (HEADS, "f2c_dcp"), (SAMPLERS, "f2c_dual"):
        yield from _found(name, lambda group=group, name=name: _plugin(group, name))
    for name in installed(BACKBONES):
        yield from _found(name, lambda name=name: _backbone(name))
    if checkout:
        yield from _found("checkout", lambda: _checkout(checkout))
    if dataset:
        yield from _found("dataset", lambda: _pack(dataset))
        for path in sorted(Path(dataset).glob("*.bin")):
            yield from _found(path.name, lambda path=path: _verification_set(path))


def _found(name: str, find: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What ``find`` finds. An error of any kind is a finding, too: nothing ends the examination."""
    try:
        yield from find()
    except (F2CError, OSError) as error:
        yield False, name, error
    except Exception as error:
        yield False, name, f"{type(error).__name__}: {error}"


def _versions() -> Iterator[Finding]:
    for package in (*PACKAGES, *EXTRAS):
        try:
            yield True, package, metadata.version(package)
        except metadata.PackageNotFoundError:
            if extra := EXTRAS.get(package):
                yield True, package, f"not installed (optional): {installing(extra)}"
            else:
                yield False, package, "not installed: pip install f2c-plugin"


def _gpus() -> Iterator[Finding]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield True, "GPUs", ", ".join(gpus) or "none: training runs on the CPU"


def _plugin(group: str, name: str) -> Iterator[Finding]:
    yield True, name, f"found, {load_plugin(group, name).__module__} in {group}"


def _backbone(name: str) -> Iterator[Finding]:
    where = origin(BACKBONES, name)
    if where.startswith("f2c_plugin."):  # arcface_torch finds them so
        return
    if name in NETWORKS:
        yield False, name, f"{where} is hidden by this package's own net of that name: it needs another name in {BACKBONES}"
    else:
        get_model_on_meta(name)
        yield True, name, f"found, {where} in {BACKBONES}"


def _checkout(folder: str | Path) -> Iterator[Finding]:
    checkout = patching.find_checkout(folder)
    missing = sorted({reason for change in patching.plan_install(checkout) for reason in change.reasons})
    yield (not missing, "checkout", f"{checkout} lacks {', '.join(missing)}: f2c-plugin install {folder}" if missing else
           f"{checkout} has the patches and the configs")


def _pack(folder: str | Path) -> Iterator[Finding]:
    dataset = RecordDataset(folder)  # does not skip damage, so that damage is found
    for name, value in describe(dataset):
        yield True, name, value
    sample = spread(len(dataset), SAMPLE)
    dataset.faces(sample)
    yield True, "decoded", f"{len(sample)} images"


def _verification_set(path: Path) -> Iterator[Finding]:
    pairs = VerificationSet(path)
    pairs.check()
    yield True, path.name, f"{len(pairs.same)} pairs, {pairs.same.mean():.0%} same"
