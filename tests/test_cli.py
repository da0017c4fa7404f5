"""The command line: version, doctor, and errors as one line."""

import subprocess
import sys

import pytest

import f2c_plugin
from f2c_plugin.arcface_torch import patching
from f2c_plugin.cli import COMMANDS, main as cli
from tests.conftest import FIXTURES


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as exit:
        cli(["--version"])
    assert exit.value.code == 0 and capsys.readouterr().out == f"f2c-plugin {f2c_plugin.__version__}\n"


def test_the_package_runs_as_a_module_and_its_errors_are_one_line(tmp_path):
    module = [sys.executable, "-m", "f2c_plugin"]
    assert subprocess.run([*module, "--version"], capture_output=True, text=True, check=True).stdout.startswith("f2c-plugin ")
    done = subprocess.run([*module, "report", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith(f"f2c-plugin report: {tmp_path}: no training.log")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as exit:
        cli([command, "--help"])
    assert exit.value.code == 0 and str(COMMANDS[command][0].__doc__) in " ".join(capsys.readouterr().out.split())


def test_doctor_finds_the_entry_points_and_summarizes_a_dataset(capsys):
    cli(["doctor", "--dataset", str(FIXTURES / "insightface")])
    text = capsys.readouterr().out
    assert "f2c_dcp                found" in text and "f2c_dual               found" in text
    assert "images                 10" in text and "identities             4, numbered up to 3" in text
    assert "1 to 4, median 2.5, 25.0% with one image" in text and "112×112" in text
    assert "config.num_classes = 4; config.num_image = 10" in text


def test_doctor_fails_on_a_pack_that_cannot_be_read_and_a_folder_that_is_no_checkout(pack, tmp_path, capsys):
    folder = pack("insightface")
    (folder / "train.idx").unlink()
    (folder / "lfw.bin").write_bytes(b"no pickle")
    with pytest.raises(SystemExit) as exit:
        cli(["doctor", "--dataset", str(folder), "--checkout", str(tmp_path)])
    text = capsys.readouterr().out
    assert exit.value.code == 1
    assert "! dataset" in text and "! checkout" in text and "! lfw.bin" in text


def test_a_folder_that_is_no_checkout_is_not_patched(tmp_path):
    with pytest.raises(SystemExit, match="no arcface_torch here"):
        cli(["install", str(tmp_path)])


def test_a_source_that_is_no_repository_leaves_no_trace_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("F2C_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SystemExit, match="git clone"):
        cli(["fetch-host", "--from", str(tmp_path / "nothing")])
    assert not list((tmp_path / "cache").iterdir())


def test_patches_hold_no_more_context_than_git_needs_and_the_first_needs_no_plugin():
    first, *_ = patching.patches()
    assert "f2c" not in first.read_text().split("diff --git", 1)[1]
    for patch in patching.patches():
        run = longest = 0
        for line in patch.read_text().split("diff --git", 1)[1].splitlines():
            run = run + 1 if line.startswith(" ") else 0
            longest = max(longest, run)
        assert longest <= 2


def test_a_report_of_no_run_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="no training.log"):
        cli(["report", str(tmp_path)])


def test_importing_the_plugin_needs_no_extra():
    """Entry points must load where only the hard requirements are."""
    script = ("import sys; [sys.modules.__setitem__(name, None) for name in "
              "('matplotlib', 'PIL', 'tensorboard', 'onnxruntime', 'sklearn', 'scipy', 'torchvision', 'mxnet', 'cv2')];"
              "import f2c_plugin.arcface_torch.entry_points, f2c_plugin.train, f2c_plugin.cli, f2c_plugin.synthetic.dataset,"
              "f2c_plugin.tools.report, f2c_plugin.tools.doctor")
    subprocess.run([sys.executable, "-c", script], check=True)
