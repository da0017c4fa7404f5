"""Shows the installed packages and GPUs, and examines a checkout or a pack."""

import os
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

from f2c_plugin.arcface_torch import patching
from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.errors import CheckoutError, RecordError, UnknownPlugin, VerificationSetError
from f2c_plugin.evaluation.verification import VerificationSet
from f2c_plugin.tools.packs import describe, spread
from f2c_plugin.utils.registry import HEADS, SAMPLERS, load_plugin

PACKAGES = ("f2c-plugin", "torch", "numpy", "easydict", "simplejpeg", "tqdm", "onnx")
EXTRAS = ("onnxruntime", "matplotlib", "pillow", "tensorboard", "scikit-learn", "scipy", "insightface", "mxnet")
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
    yield from _versions()
    for group, name in (HEADS, "f2c_dcp"), (SAMPLERS, "f2c_dual"):
        try:
            yield True, name, f"found, {load_plugin(group, name).__module__} in {group}"
        except UnknownPlugin as error:
            yield False, name, error
    if checkout:
        yield _checkout(checkout)
    if dataset:
        yield from _dataset(Path(dataset))


def _versions() -> Iterator[Finding]:
    yield True, "python", platform.python_version()
    for package in PACKAGES + EXTRAS:
        try:
            yield True, package, metadata.version(package)
        except metadata.PackageNotFoundError:
            optional = package in EXTRAS
            yield optional, package, "not installed (optional)" if optional else "not installed: pip install f2c-plugin"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield True, "GPUs", ", ".join(gpus) or "none: training runs on the CPU"
    yield True, "CPU threads", f"{torch.get_num_threads()} of {os.cpu_count()}"


def _checkout(folder: str | Path) -> Finding:
    try:
        checkout = patching.find_checkout(folder)
        changes = patching.plan_install(checkout)
    except CheckoutError as error:
        return False, "checkout", error
    if not changes:
        return True, "checkout", f"{checkout} has the patches and the configs"
    missing = sorted({reason for change in changes for reason in change.reasons})
    return False, "checkout", f"{checkout} lacks {', '.join(missing)}: f2c-plugin install {folder}"


def _dataset(folder: Path) -> Iterator[Finding]:
    try:
        dataset = RecordDataset(folder)  # does not skip damage, so that damage is found
        for name, value in describe(dataset):
            yield True, name, value
        sample = spread(len(dataset), SAMPLE)
        dataset.faces(sample)
        yield True, "decoded", f"{len(sample)} images"
    except RecordError as error:
        yield False, "dataset", error
    for path in sorted(folder.glob("*.bin")):
        try:
            pairs = VerificationSet(path)
            pairs.faces(SAMPLE)
            yield True, path.name, f"{len(pairs.same)} pairs, {pairs.same.mean():.0%} same"
        except VerificationSetError as error:
            yield False, path.name, error
