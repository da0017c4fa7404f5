"""doctor: whatever is broken is a finding, and the findings behind it are made all the same."""

import os
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import pytest
import torch

from f2c_plugin.cli import main as cli
from f2c_plugin.tools import doctor


def findings(capsys, *arguments):
    """(exit code, {name: text of a finding, with its mark})"""
    code = 0
    try:
        cli(["doctor", *map(str, arguments)])
    except SystemExit as end:
        code = end.code
    lines = [line for line in capsys.readouterr().out.splitlines() if line[:2] in ("! ", "  ") and line[2:3].strip()]
    return code, {line[2:24].strip(): line[:2] + line[25:] for line in lines}


def test_a_healthy_environment_has_no_mark(capsys, faces):
    code, found = findings(capsys, "--dataset", faces)
    assert code == 0 and not [text for text in found.values() if text.startswith("!")]
    assert found["synth.bin"] == "  60 pairs, 50% same" and found["decoded"] == "  100 images"


def test_missing_packages_are_named_with_the_command_that_installs_them(capsys, monkeypatch):
    def version(package, version=metadata.version):
        if package in ("pillow", "simplejpeg"):
            raise metadata.PackageNotFoundError(package)
        return version(package)
    monkeypatch.setattr(metadata, "version", version)
    code, found = findings(capsys)
    assert found["pillow"] == "  not installed (optional): pip install 'f2c-plugin[plot]'"
    assert found["simplejpeg"] == "! not installed: pip install f2c-plugin" and code == 1


def test_every_optional_package_is_installed_by_the_extra_that_is_named():
    setup = ConfigParser()
    setup.read(Path(__file__).parents[2] / "setup.cfg")
    for package, extra in doctor.EXTRAS.items():
        assert package in setup["options.extras_require"][extra].split()


def test_a_broken_driver_or_plugin_is_a_finding(capsys, monkeypatch):
    def broken(*_):
        raise RuntimeError("CUDA driver initialization failed")
    monkeypatch.setattr(torch.cuda, "device_count", broken)
    monkeypatch.setattr(doctor, "load_plugin", broken)
    code, found = findings(capsys)
    assert code == 1 and found["GPUs"] == found["f2c_dcp"] == "! RuntimeError: CUDA driver initialization failed"
    assert "CPU threads" in found


def lacks_idx(folder):
    (folder / "train.idx").unlink()


def is_cut(folder):
    os.truncate(folder / "train.rec", 100)


def is_a_folder(folder):
    (folder / "train.rec").unlink()
    (folder / "train.rec").mkdir()


def is_missing(folder):
    (folder / "train.rec").unlink()


@pytest.mark.parametrize("damage", [lacks_idx, is_cut, is_a_folder, is_missing])
def test_a_broken_pack_does_not_hide_its_verification_sets(capsys, pack, faces, damage):
    folder = pack("insightface")
    damage(folder)
    (folder / "agedb.bin").mkdir()
    (folder / "lfw.bin").write_bytes(b"no pickle")
    (folder / "synth.bin").write_bytes((faces / "synth.bin").read_bytes())
    code, found = findings(capsys, "--dataset", folder, "--checkout", folder)
    assert code == 1 and "no arcface_torch here" in found["checkout"] and found["dataset"].startswith("! ")
    assert found["agedb.bin"].endswith("agedb.bin: a folder, not a .bin file") and found["lfw.bin"].startswith("! ")
    assert found["synth.bin"].startswith("  60 pairs")


def test_a_checkout_that_cannot_be_read_is_a_finding(capsys, tmp_path, monkeypatch):
    for name in "train_v2.py", "partial_fc_v2.py":
        (tmp_path / name).write_bytes(bytes(range(256)))
    assert "does not fit" in findings(capsys, "--checkout", tmp_path)[1]["checkout"]
    monkeypatch.setenv("PATH", "")
    code, found = findings(capsys, "--checkout", tmp_path)
    assert code == 1 and found["checkout"] == "! git is required but was not found on the PATH: install git"
