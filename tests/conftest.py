"""Shared fixtures: packs, mxnet, configs."""

import importlib
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tests.meta  # noqa: F401
from f2c_plugin.arcface_torch import patching
from f2c_plugin.synthetic.dataset import write_dataset
from f2c_plugin.utils.replay import Replay
from tests.runs import IDENTITIES, IMAGES


def pytest_configure(config):
    """Tests marked gpu run by themselves, with `pytest -m gpu`. All others are for the CPU, also where there is a GPU."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: kernels run on the CPU
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as of a job in the background of a shell
        signal.signal(signal.SIGINT, signal.default_int_handler)


FIXTURES = Path(__file__).parent / "fixtures"
PACKS = sorted(folder.name for folder in FIXTURES.iterdir() if (folder / "train.rec").is_file())


@pytest.fixture
def pack(tmp_path):
    """Copies a pack written by mxnet, for tests that damage it."""
    def copy(name):
        return Path(shutil.copytree(FIXTURES / name, tmp_path / name, ignore=shutil.ignore_patterns("*.f2c-index*")))
    return copy


@pytest.fixture(autouse=True)
def few_threads():
    torch.set_num_threads(1)  # the tensors here are small, and tests start processes beside this one


# Files that take minutes come first, so that no process is left alone with one of them at the end.
SLOWEST = ("trainer/test_checkpoint.py", "test_examples.py", "trainer/test_kills.py", "trainer/test_two_nodes.py",
           "trainer/test_signals.py", "test_tutorial.py", "method/test_head.py", "trainer/test_train.py", "test_fuzz.py",
           "arcface_torch/test_checkout.py", "tools/test_report.py", "models/test_vit.py", "tools/test_align.py")


def pytest_collection_modifyitems(items):
    order = {Path(__file__).parent / name: number for number, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.fixture(scope="session")
def mxnet_python():
    """An interpreter that can import mxnet."""
    default = Path(__file__).parent.parent / ".venv-mxnet" / "bin" / "python"
    python = os.environ.get("MXNET_PYTHON", str(default))
    if not Path(python).is_file():
        pytest.skip("NOT COMPARED WITH MXNET ITSELF: set MXNET_PYTHON or run `make mxnet`")
    return python


@pytest.fixture(scope="session")
def checkout():
    """An unpatched checkout of arcface_torch."""
    if not os.environ.get("ARCFACE_TORCH") and not patching.clone_folder().is_dir():
        pytest.skip("NOT RUN IN THE REAL ARCFACE_TORCH: set ARCFACE_TORCH to an arcface_torch checkout or run "
                    "`f2c-plugin fetch-host`")
    return patching.known_checkout()


@pytest.fixture(scope="session")
def faces(tmp_path_factory):
    """A pack of 12 synthetic identities, ten faces each, with a verification set."""
    folder = tmp_path_factory.mktemp("faces")
    write_dataset(folder, IDENTITIES, IMAGES, num_pairs=60, processes=1)
    return folder


@pytest.fixture
def config(faces, tmp_path, monkeypatch):
    """Writes a config file for ``faces`` into an empty working folder; returns its path."""
    monkeypatch.chdir(tmp_path)

    def write(**keys):
        keys = dict(head="f2c_dcp", f2c_pool_rate=1.0, network="tiny", embedding_size=32, batch_size=12, lr=0.05,
                    margin_list=(1.0, 0.0, 0.2), scale=16.0, rec=str(faces), num_classes=IDENTITIES,
                    num_image=IDENTITIES * IMAGES, num_epoch=2, num_workers=0, val_targets=["synth"], frequent=2,
                    verbose=5, output="out") | keys
        lines = [f"config.{key} = {value!r}" for key, value in keys.items()]
        Path("config.py").write_text("from easydict import EasyDict as edict\nconfig = edict()\n" + "\n".join(lines))
        return "config.py"
    return write


@pytest.fixture
def as_recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Steps work as those that a GPU repeats: in the same tensors each time, also for numbers. Lists their constants."""
    mine: list[torch.Tensor] = []
    called: list[Any] = []

    def call(self: Replay, inputs: Any, numbers: Any, state: Any, constants: Any) -> Any:
        given = [*inputs, torch.tensor(numbers, dtype=torch.float64)]
        if [each.shape for each in mine] != [each.shape for each in given]:
            mine[:] = [each.clone() for each in given]
        for kept, new in zip(mine, given, strict=True):
            kept.copy_(new)
        called.append(constants)
        return [each.clone() for each in self.function(*mine[:-1], *mine[-1].unbind())]
    monkeypatch.setattr(Replay, "__call__", call)
    return called


PACKAGE = """
import torch
from torch import nn

class Pixels(nn.Module):
    def __init__(self, num_features, fp16, dropout):
        super().__init__()
        assert dropout == 0.0
        self.dense = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(588, num_features), nn.BatchNorm1d(num_features))

    def forward(self, x):
        return self.dense(x.float())

def make(num_features, fp16, dropout):
    return Pixels(num_features, fp16, dropout)
"""


@pytest.fixture
def install_backbones(tmp_path, monkeypatch):
    """Installs a package: its name, its code, and {name of a backbone: its function there, or "module:function"}."""
    site = tmp_path / "site"

    def install(package, code, backbones):
        (site / f"{package}-1.0.dist-info").mkdir(parents=True)
        (site / f"{package}_nets.py").write_text(code)
        (site / f"{package}-1.0.dist-info/METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [f"{name} = {where if ':' in where else f'{package}_nets:{where}'}\n" for name, where in backbones.items()]
        (site / f"{package}-1.0.dist-info/entry_points.txt").write_text("[arcface_torch.backbones]\n" + "".join(lines))
        installed.append(f"{package}_nets")
        if str(site) not in sys.path:
            monkeypatch.syspath_prepend(str(site))
        importlib.invalidate_caches()
        return site
    installed: list[str] = []
    yield install
    for module in installed:
        sys.modules.pop(module, None)


@pytest.fixture
def other_package(install_backbones):
    """A package with the backbone "pixels", installed; the folder that holds it."""
    return install_backbones("others", PACKAGE, {"pixels": "make"})
