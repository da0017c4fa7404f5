"""What a GPU would be asked to do, counted without one.

``device.cpp`` is a CUDA device that does nothing. A process that starts with it runs the product on fake tensors of the device
"cuda": they have shapes and types, but no values, so a read of a value by the CPU fails or is seen. ``count.py`` counts the
operations. Kernels are as many as PyTorch's operators would launch at least; what an operator does inside is not seen.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

SOURCE = Path(__file__).with_name("device.cpp")


def device() -> Path:
    """The compiled device. Skips the test where there is no compiler for it."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if torch.version.cuda or not compiler:
        pytest.skip("the CUDA stand-in needs a C++ compiler and a CPU build of PyTorch")
    digest = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode() + torch.__file__.encode()).hexdigest()[:16]
    made = Path(tempfile.gettempdir(), f"f2c-cuda-stand-in-{os.getuid()}-{digest}.so")
    if not made.is_file():
        home = Path(torch.__file__).parent
        abi = int(torch.compiled_with_cxx11_abi())
        with tempfile.TemporaryDirectory(dir=made.parent) as folder:
            library = Path(folder, "device.so")
            subprocess.run([compiler, "-std=c++20", "-O1", "-shared", "-fPIC", f"-D_GLIBCXX_USE_CXX11_ABI={abi}", "-I",
                            str(home / "include"), str(SOURCE), "-o", str(library), "-L", str(home / "lib"), "-lc10",
                            "-ltorch_cpu"], check=True)
            library.rename(made)
    return made


@cache
def server() -> subprocess.Popen[str]:
    """``serve.py``, until this process ends."""
    environment = os.environ | {"LD_PRELOAD": str(device()), "LD_LIBRARY_PATH": str(Path(torch.__file__).parent / "lib"),
                                "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-W", "ignore", "-m", "tests.cuda_stand_in.serve"], env=environment, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)


@cache
def _answer(case: str) -> str:
    process = server()
    assert process.stdin and process.stdout
    try:
        print(case, file=process.stdin, flush=True)
        return process.stdout.readline()
    except BaseException:  # the test takes too long; the next one begins with a new process
        process.kill()
        server.cache_clear()
        raise


def counts(script: str = "count", **case: Any) -> dict[str, Any]:
    """What ``count.py``, or the other script, counts in a step, see there. The same case is counted once."""
    counted = json.loads(_answer(json.dumps({"script": script, **case})))
    assert "error" not in counted, counted["error"]
    return counted
