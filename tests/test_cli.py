"""The command line: version, doctor, and errors as one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import f2c_plugin
from f2c_plugin.arcface_torch import patching
from f2c_plugin.cli import COMMANDS, main as cli
from f2c_plugin.models import get_model
from tests.conftest import FIXTURES
from tests.runs import with_room_for

OPTIONAL = ("matplotlib", "PIL", "tensorboard", "onnxruntime", "sklearn", "scipy", "torchvision", "timm", "mxnet", "cv2")


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


def without(modules):
    """The start of a script in which ``modules`` cannot be imported."""
    return f"import sys; sys.modules.update(dict.fromkeys({modules!r}));"


def test_importing_the_plugin_needs_no_extra():
    """Entry points must load where only the hard requirements are."""
    script = (without(OPTIONAL) + "import f2c_plugin.arcface_torch.entry_points, f2c_plugin.train, f2c_plugin.cli as cli;"
              "cli.main(['plan', '--identities', '1000000', '--network', 'r18']);"
              f"cli.main(['index', {str(FIXTURES / 'insightface')!r}]); cli.main(['doctor'])")
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert "Use F²C" in done.stdout and "identities           4" in done.stdout and not done.stderr


@pytest.fixture
def given(tmp_path, faces, monkeypatch):
    """A folder in which every command finds what it needs, and to which it writes."""
    monkeypatch.chdir(tmp_path)
    torch.save(get_model("tiny", 8).state_dict(), "model.pt")
    Path("given").mkdir()
    Path("given/training.log").write_text("2026-11-22 12:25:32,123 : head                     softmax\n")
    Path("given/history.jsonl").write_text(json.dumps({"step": 1, "images": 8, "loss": 5}))
    np.savez("given/synth_scores.npz", scores=np.linspace(0, 1, 20), same=np.arange(20) % 2 == 0)
    return {"plan": ["plan", "--identities", "1000000", "--network", "r18", "--plot", "given/plan.png"],
            "index": ["index", str(faces), "--plot", "given/plot.png"],
            "inspect": ["inspect", str(faces), "--out", "given/sheet.png"],
            "report": ["report", "given"],
            "export": ["export", "model.pt", "given/model.onnx"],
            "synth": ["synth", "given", "--identities", "2", "--images-per-identity", "1", "--pairs", "2", "--processes", "1"]}


@pytest.mark.parametrize("command", ["plan --help", "report given"])
def test_who_asks_for_help_or_a_report_does_not_wait_for_pytorch(command, given):
    script = without(["torch"]) + f"from f2c_plugin.cli import main; main({command.split()})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr


WRITTEN = {"plan": ["plan.png"], "index": ["plot.png"], "inspect": ["sheet.png"], "export": ["model.onnx"],
           "report": ["curves.png", "scores.png", "roc.png", "report.html"],
           "synth": ["property", "synth.bin", "contact_sheet.png", "train.idx"]}


@pytest.mark.parametrize("command", WRITTEN)
def test_what_a_command_writes_is_readable_for_others_and_goes_through_no_link(command, given):
    precious = Path("precious")
    precious.write_text("precious")
    for name in WRITTEN[command]:
        for suffix in "", ".partial":
            Path("given", name + suffix).symlink_to(precious.resolve())
    before = os.umask(0o022)
    try:
        cli(given[command])
    finally:
        os.umask(before)
    assert precious.read_text() == "precious"
    for file in (Path("given", name) for name in WRITTEN[command]):
        assert not file.is_symlink() and file.stat().st_mode & 0o777 == 0o644 and file.read_bytes()
    assert not list(Path("given").glob("*.????????.partial"))


@pytest.mark.parametrize("command, file", [("report", "curves.png"), ("export", "model.onnx"), ("synth", "synth.bin")])
def test_a_file_that_finds_no_room_is_named_and_all_stays_as_it_was(command, file, given):
    for name in WRITTEN[command]:
        Path("given", name).write_text("old")
    done = with_room_for(2000, *given[command])
    assert done.returncode == 1 and done.stderr == f"f2c-plugin {command}: [Errno 27] File too large: 'given/{file}'\n"
    assert [Path("given", name).read_text() for name in WRITTEN[command]] == ["old"] * len(WRITTEN[command])
    assert not list(Path("given").glob("*.partial"))


def test_the_folder_of_what_is_written_is_made(given):
    cli(["synth", "pack", "--identities", "3", "--images-per-identity", "20", "--pairs", "20", "--processes", "1"])
    for command in (["plan", "--identities", "9000", "--gpus", "1", "--network", "tiny", "--plot", "new/1/plan.png"],
                    ["index", "pack", "--plot", "new/2/index.svg"], ["inspect", "pack", "--out", "new/3/sheet.png"],
                    ["export", "model.pt", "new/4/model.onnx"], ["verification-set", "pack", "new/5/set.bin", "--pairs", "20"],
                    ["evaluate", "model.pt", "pack/synth.bin", "--plot", "new/6/roc.png", "--quality", "new/7/quality.tsv"],
                    ["duplicates", "pack", "new/8/same.tsv", "--model", "model.pt"]):
        cli(command)
    assert sorted(path.name for path in Path("new").glob("*/*")) == [
        "index.svg", "model.onnx", "plan.png", "quality.tsv", "roc.png", "same.tsv", "set.bin", "sheet.png"]


@pytest.mark.parametrize("command", [
    ["clean", "pack", "no model", "file/out"], ["thin", "pack", "no model", "file/out"],
    ["inspect", "pack", "--out", "file/a.png"], ["duplicates", "pack", "file/list", "--model", "no model"],
    ["verification-set", "pack", "file/set.bin", "--pairs", "20"],
    ["pack", "photos", "file/out"], ["unpack", "pack", "file/out"], ["merge", "pack", "pack", "file/out"],
    ["evaluate", "no model", "no set", "--quality", "file/quality.tsv"], ["export", "model.pt", "file/model.onnx"],
    ["convert", "pack", "list", "file/out"], ["split", "pack", "file/a", "b", "--identities", "1"]])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(command, given):
    cli(["synth", "pack", "--identities", "3", "--images-per-identity", "20", "--pairs", "2", "--processes", "1"])
    cli(["unpack", "pack", "photos"])
    Path("file").touch()
    Path("list").write_text("1\t0\n")
    with pytest.raises(SystemExit, match=rf"^f2c-plugin {command[0]}: .*Its folder cannot be made, because .*/file is not a f"):
        cli(command)


@pytest.mark.parametrize("command, size, file", [
    (["pack", "photos", "new"], 200, "new/train.rec"), (["merge", "pack", "pack", "new"], 2000, "new/train.rec"),
    (["split", "pack", "new", "new2", "--identities", "1"], 2000, "new/train.rec"),
    (["unpack", "pack", "new"], 200, "new/0/01.jpg"), (["duplicates", "pack", "new", "--model", "model.pt"], 50, "new"),
    (["verification-set", "pack", "new", "--pairs", "20"], 2000, "new")])
def test_a_full_disk_is_named_by_what_it_has_no_room_for_and_nothing_new_stays(command, size, file, given):
    cli(["synth", "pack", "--identities", "5", "--images-per-identity", "5", "--pairs", "2", "--processes", "1"])
    cli(["index", "pack"])
    cli(["unpack", "pack", "photos"])
    before = sorted(Path().iterdir())
    done = with_room_for(size, *command)
    assert done.returncode == 1 and done.stderr.endswith(f"f2c-plugin {command[0]}: [Errno 27] File too large: '{file}'\n")
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize("command", [["split", "pack", "a", "b", "--identities", "1"], ["verification-set", "pack", "a"],
                                     ["synth", "a", "--identities", "2"]])
def test_a_seed_below_0_and_an_argument_that_is_empty_are_refused(command, capsys):
    with pytest.raises(SystemExit) as exit:
        cli([*command, "--seed", "-1"])
    assert exit.value.code == 2 and "argument --seed: '-1' must be a whole number from 0" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        cli([command[0], "", *command[2:]])
    assert exit.value.code == 2 and f"{command[0]}: an argument is empty" in capsys.readouterr().err


@pytest.mark.parametrize("command, module", [("plan", "matplotlib"), ("index", "matplotlib"), ("report", "matplotlib"),
                                             ("inspect", "PIL.Image")])
def test_a_missing_package_is_named_with_the_command_that_installs_it(command, module, given, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=rf"^f2c-plugin {command}: {module} cannot be imported .*: "
                                         r"pip install 'f2c-plugin\[plot\]'$"):
        cli(given[command])
    assert not [name for name in WRITTEN[command] if Path("given", name).exists()]


def test_windows_is_refused_in_one_sentence():
    done = subprocess.run([sys.executable, "-c", "import sys; sys.platform = 'win32'; import f2c_plugin"], capture_output=True,
                          text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ImportError: f2c_plugin runs on Linux and macOS: on Windows, install it in WSL 2"


def test_commands_run_without_docstrings_and_assertions(tmp_path):
    script = f"""
from f2c_plugin.cli import COMMANDS, main
for command in COMMANDS:
    try:
        main([command, "--help"])
    except SystemExit as end:
        print(command, "ends with", end.code)
main(["synth", {str(tmp_path)!r}, "--identities", "3", "--images-per-identity", "2", "--pairs", "4", "--processes", "1"])
main(["doctor", "--dataset", {str(tmp_path)!r}])
"""
    done = subprocess.run([sys.executable, "-OO", "-c", script], check=True, capture_output=True, text=True)
    assert [f"{command} ends with 0" in done.stdout for command in COMMANDS] == [True] * len(COMMANDS)
    assert "decoded                6 images" in done.stdout and "synth.bin              4 pairs" in done.stdout


@pytest.mark.parametrize("command, names_it", [
    (["plan", "pack/train.rec"], ", pack"), (["plan", "model.pt"], ""), (["index", "pack/train.idx", "--verify"], ", pack"),
    (["index", "pack/property"], ", pack"), (["inspect", "model.pt"], ""), (["reindex", "pack/train.rec"], ", pack"),
    (["merge", "pack", "model.pt", "new"], ""), (["split", "model.pt", "a", "b", "--identities", "1"], ""),
    (["filter", "pack/train.rec", "new"], ", pack"), (["clean", "pack/train.rec", "model.pt", "new"], ", pack"),
    (["thin", "pack/train.rec", "model.pt", "new"], ", pack"), (["convert", "pack/train.rec", "list", "new"], ", pack"),
    (["unpack", "pack/train.rec", "new"], ", pack"), (["duplicates", "pack/train.rec", "new", "--model", "model.pt"], ", pack"),
    (["verification-set", "pack/train.rec", "new"], ", pack"), (["align", "model.pt", "new"], ""),
    (["install", "model.pt"], ""), (["checkpoint", "merge", "model.pt", "new", "--ranks", "1"], ""),
    (["report", "given/training.log"], ", given"), (["report", "given/history.jsonl"], ", given"),
    (["report", "model.pt"], "")])
def test_a_file_where_a_folder_is_needed_is_called_one(command, names_it, given):
    cli(["synth", "pack", "--identities", "3", "--images-per-identity", "2", "--pairs", "2", "--processes", "1"])
    with pytest.raises(SystemExit, match=rf"^f2c-plugin {command[0]}: \S+: a file: give the .+{names_it}$") as refused:
        cli(command)
    assert bool(names_it) == str(refused.value).endswith((", pack", ", given"))
    assert not Path("new").exists()
