"""What is installed, what is found, and what a checkout or a pack holds."""

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.errors import RecordError
from f2c_plugin.arcface_torch import patching
from f2c_plugin.errors import UnknownPlugin
from f2c_plugin.utils.registry import HEADS, SAMPLERS, load_plugin
from f2c_plugin.tools.packs import describe, spread
from f2c_plugin.errors import VerificationSetError
from f2c_plugin.evaluation.verification import VerificationSet

PACKAGES = ("f2c-plugin", "torch", "numpy", "easydict", "simplejpeg", "tqdm", "onnx")
EXTRAS = ("onnxruntime", "matplotlib", "pillow", "tensorboard", "scikit-learn", "scipy", "insightface", "mxnet")
SAMPLE = 100  # images of a set that are decoded to see whether they can be


class Examination:
    """Prints findings line by line and remembers whether one of them is bad."""

    def __init__(self):
        self.healthy = True

    def note(self, what, finding):
        print(f"  {what:<22} {finding}")

    def complain(self, what, finding):
        self.healthy = False
        print(f"! {what:<22} {finding}")


def examine(checkout=None, dataset=None) -> bool:
    """Print what there is; returns whether all that was asked for is in order."""
    examination = Examination()
    _versions(examination)
    _entry_points(examination)
    if checkout:
        _checkout(examination, checkout)
    if dataset:
        _dataset(examination, Path(dataset))
    return examination.healthy


def _versions(examination):
    examination.note("python", platform.python_version())
    for package in PACKAGES:
        try:
            examination.note(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            examination.complain(package, "not installed: pip install f2c-plugin")
    for package in EXTRAS:
        try:
            examination.note(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            examination.note(package, "not installed (optional)")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    examination.note("GPUs", ", ".join(gpus) or "none: training runs on the CPU")
    examination.note("CPU threads", f"{torch.get_num_threads()} of {os.cpu_count()}")


def _entry_points(examination):
    for group, name in (HEADS, "f2c_dcp"), (SAMPLERS, "f2c_dual"):
        try:
            examination.note(name, f"found, {load_plugin(group, name).__module__} in {group}")
        except UnknownPlugin as error:
            examination.complain(name, error)


def _checkout(examination, folder):
    try:
        host = patching.find_host(folder)
        changes = patching.plan_install(host)
        present, files = patching.applied_patches(host), patching.patches()
    except patching.CheckoutError as error:
        examination.complain("checkout", error)
        return
    if not changes:
        examination.note("checkout", f"{host} is patched, configs are in")
    elif present == 0:
        examination.complain("checkout", f"{host} is not patched: f2c-plugin install {folder}")
    else:
        missing = [patch.stem for patch in files[present:]] or [str(change.path) for change in changes]
        examination.complain("checkout", f"{host} lacks {', '.join(missing)}: f2c-plugin install {folder}")


def _dataset(examination, folder):
    try:
        dataset = RecordDataset(folder)  # without leave to skip damage: it is to be found
        for what, finding in describe(dataset):
            examination.note(what, finding)
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
