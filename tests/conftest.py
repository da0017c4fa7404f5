"""Shared fixtures: packs, the real host, mxnet, and processes over gloo."""

import os
import shutil
from pathlib import Path

import pytest
import torch

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


@pytest.fixture(scope="session")
def mxnet_python():
    """An interpreter that can import mxnet."""
    default = Path(__file__).parent.parent / ".venv-mxnet" / "bin" / "python"
    python = os.environ.get("MXNET_PYTHON", str(default))
    if not Path(python).is_file():
        pytest.skip("NOT COMPARED WITH MXNET ITSELF: set MXNET_PYTHON or run `make mxnet`")
    return python
