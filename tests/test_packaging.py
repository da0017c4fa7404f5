"""The wheel: what it carries and what it asks for."""

import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not in a git checkout")
    for name in tracked.stdout.splitlines():  # a clean copy: building leaves folders behind
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source], check=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_carries_configs_patches_and_all_code(wheel):
    names = set(wheel.namelist())
    for folder in "configs", "patches", "f2c_plugin":
        prefix = "" if folder == "f2c_plugin" else "f2c_plugin/"
        files = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".patch")]
        assert files and {prefix + path.relative_to(ROOT).as_posix() for path in files} <= names
    assert "f2c_plugin/py.typed" in names
    assert not [name for name in names if "test" in name or "benchmark" in name]


def test_the_wheel_announces_the_entry_points(wheel):
    text = wheel.read(next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))).decode()
    assert "[arcface_torch.heads]\ndcq = " in text and "\nf2c_dcp = " in text
    assert "[arcface_torch.samplers]\nf2c_dual = " in text
    for name in "mixfacenet_s", "mixfacenet_m", "vargfacenet":
        assert f"\n{name} = " in text.split("[arcface_torch.backbones]")[1].split("[")[0]


def test_the_plugin_asks_for_no_more_than_it_needs():
    required = {line.split(">")[0].split(";")[0].strip() for line in metadata.requires("f2c-plugin") if "extra ==" not in line}
    assert required == {"torch", "numpy", "easydict", "simplejpeg", "tqdm", "onnx"}
