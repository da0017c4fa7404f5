"""Shows the installed packages and GPUs, and examines a checkout or a pack."""

import os
import platform
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


class Examination:
    """Prints findings line by line and records whether one of them is bad."""

    def __init__(self) -> None:
        self.healthy = True

    def note(self, name: str, finding: object) -> None:
        print(f"  {name:<22} {finding}")

    def complain(self, name: str, finding: object) -> None:
        self.healthy = False
        print(f"! {name:<22} {finding}")


def examine(checkout: str | Path | None = None, dataset: str | Path | None = None) -> bool:
    """Print all findings. Returns whether everything is in order."""
    examination = Examination()
    _versions(examination)
    _entry_points(examination)
    if checkout:
        _checkout(examination, checkout)
    if dataset:
        _dataset(examination, Path(dataset))
    return examination.healthy


def _versions(examination: Examination) -> None:
    examination.note("python", platform.python_version())
    for package in PACKAGES + EXTRAS:
        try:
            examination.note(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            if package in EXTRAS:
                examination.note(package, "not installed (optional)")
            else:
                examination.complain(package, "not installed: pip install f2c-plugin")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    examination.note("GPUs", ", ".join(gpus) or "none: training runs on the CPU")
    examination.note("CPU threads", f"{torch.get_num_threads()} of {os.cpu_count()}")


def _entry_points(examination: Examination) -> None:
    for group, name in (HEADS, "f2c_dcp"), (SAMPLERS, "f2c_dual"):
        try:
            examination.note(name, f"found, {load_plugin(group, name).__module__} in {group}")
        except UnknownPlugin as error:
            examination.complain(name, error)


def _checkout(examination: Examination, folder: str | Path) -> None:
    try:
        checkout = patching.find_checkout(folder)
        changes = patching.plan_install(checkout)
        present, patches = patching.applied_patches(checkout), patching.patches()
    except CheckoutError as error:
        examination.complain("checkout", error)
        return
    if not changes:
        examination.note("checkout", f"{checkout} has the patches and the configs")
    elif present == 0:
        examination.complain("checkout", f"{checkout} is not patched: f2c-plugin install {folder}")
    else:
        missing = [patch.stem for patch in patches[present:]] or [str(change.path) for change in changes]
        examination.complain("checkout", f"{checkout} lacks {', '.join(missing)}: f2c-plugin install {folder}")


def _dataset(examination: Examination, folder: Path) -> None:
    try:
        dataset = RecordDataset(folder)  # does not skip damage, so that damage is found
        for name, value in describe(dataset):
            examination.note(name, value)
        sample = spread(len(dataset), SAMPLE)
        dataset.faces(sample)
        examination.note("decoded", f"{len(sample)} images")
    except RecordError as error:
        examination.complain("dataset", error)
    for path in sorted(folder.glob("*.bin")):
        try:
            verification_set = VerificationSet(path)
            verification_set.faces(SAMPLE)
            examination.note(path.name, f"{len(verification_set.same)} pairs, {verification_set.same.mean():.0%} same")
        except VerificationSetError as error:
            examination.complain(path.name, error)
