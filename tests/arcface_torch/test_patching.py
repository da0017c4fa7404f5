"""Installing into a small made-up checkout: killed at every moment, behind links, half patched by hand."""

import os
import subprocess
from pathlib import Path

import pytest

from f2c_plugin.arcface_torch import patching
from f2c_plugin.cli import main as cli
from tests.arcface_torch.killed import die_at_change, tree

TRAIN = ["import os", "", "def main():", "    setup()", "    for batch in loader:", "        step(batch)", "    save()", ""]
SECOND = {3: "    setup(backend)", 4: "    for images, labels in loader:"}  # line: what patch 2 makes of it
FILES = {"train_v2.py": TRAIN, "partial_fc_v2.py": ["a", "b", "c", "d", ""], "other.py": ["other", ""]}


def versions():
    """The files before and after each of two patches, which both change train_v2.py; the first adds a file."""
    first = FILES | {"train_v2.py": ["import os", "import plugin", *TRAIN[1:]], "utils/plugin.py": ["new", ""]}
    second = first | {"train_v2.py": [SECOND.get(number - 1, line) for number, line in enumerate(first["train_v2.py"])],
                      "partial_fc_v2.py": ["a", "b", "C", "d", ""]}
    return [{name: "\n".join(lines) for name, lines in files.items()} for files in (FILES, first, second)]


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """A checkout, and the files it has with both patches and a config."""
    patches = []
    for number, (before, after) in enumerate(zip(versions()[:-1], versions()[1:], strict=True), 1):
        write(tmp_path / "a", before), write(tmp_path / "b", after)
        patches.append(tmp_path / f"000{number}.patch")
        done = subprocess.run(["git", "diff", "--no-index", "--no-prefix", "-U1", "a", "b"], cwd=tmp_path, capture_output=True)
        patches[-1].write_bytes(done.stdout)
    config = tmp_path / "f2c.py"
    config.write_text("config")
    monkeypatch.setattr(patching, "patches", lambda: patches)
    monkeypatch.setattr(patching, "arcface_torch_configs", lambda: [config])
    checkout = write(tmp_path / "checkout", versions()[0] | {"configs/base.py": "base"})
    (checkout / "utils").mkdir()
    (checkout / "train_v2.py").chmod(0o755)
    configs = {"configs/base.py": "base", "configs/f2c.py": "config"}
    return checkout, tree(write(tmp_path / "installed", versions()[2] | configs))


def test_an_installation_killed_at_any_moment_is_completed_and_undone(made_up):
    checkout, installed = made_up
    before = tree(checkout)
    for options, old, new in ([], before, installed), (["--reverse"], installed, before):
        for changes in range(4):  # of the four files
            for after in ["install"], ["install", "--reverse"]:
                cli(["install", str(checkout), *([] if old == installed else ["--reverse"])])
                assert tree(checkout) == old
                assert die_at_change(changes, ["install", str(checkout), *options])
                assert old != tree(checkout) != new
                cli([*after, str(checkout)])
                assert tree(checkout) == (before if "--reverse" in after else installed)
        assert not die_at_change(4, ["install", str(checkout), *options])
        assert tree(checkout) == new and (checkout / "train_v2.py").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("files", [("train_v2.py",), ("utils/plugin.py",), ("train_v2.py", "utils/plugin.py")])
@pytest.mark.parametrize("version", [1, 2])
def test_files_that_have_some_of_their_patches_get_the_others(made_up, files, version, capsys):
    checkout, installed = made_up
    before = tree(checkout)
    write(checkout, {name: versions()[version][name] for name in files})
    with pytest.raises(SystemExit):
        cli(["doctor", "--checkout", str(checkout)])
    lacking = "0002, config" if len(files) == 2 else "0001, 0002, config"
    assert f"{checkout} lacks {lacking}: f2c-plugin install" in capsys.readouterr().out
    cli(["install", str(checkout)])
    assert tree(checkout) == installed
    cli(["doctor", "--checkout", str(checkout)])
    write(checkout, {name: versions()[version][name] for name in files})
    cli(["install", str(checkout), "--reverse"])
    assert tree(checkout) == before


@pytest.mark.parametrize("patched", [False, True])
def test_a_file_that_does_not_fit_is_named_with_the_patch_and_the_line_and_all_stays(made_up, patched):
    checkout, _ = made_up
    if patched:
        cli(["install", str(checkout)])
    text = (checkout / "train_v2.py").read_text()
    (checkout / "train_v2.py").write_text(text.replace("setup", "prepare").replace("import os", "import sys"))
    before = tree(checkout)
    for options in [], ["--reverse"]:
        with pytest.raises(SystemExit, match=rf"000{1 + patched}.patch does not fit train_v2.py:\d+\. Nothing was changed"):
            cli(["install", str(checkout), *options])
    assert tree(checkout) == before


def test_nothing_is_written_through_links_planted_at_the_names_of_partial_files(made_up, tmp_path):
    checkout, installed = made_up
    precious = tmp_path / "precious"
    precious.write_text("precious")
    for name in "train_v2.py", "partial_fc_v2.py":
        for suffix in ".f2c-partial", ".partial", ".01234567.partial":
            (checkout / (name + suffix)).symlink_to(precious)
    cli(["install", str(checkout)])
    assert precious.read_text() == "precious"
    assert {name: text for name, text in tree(checkout).items() if not name.name.endswith("partial")} == installed
    assert not list(checkout.glob("*.01234567.partial"))  # such names are those of files that a killed process has left


def test_git_settings_that_cannot_be_read_do_not_matter(made_up, monkeypatch, tmp_path):
    checkout, installed = made_up
    (tmp_path / ".gitconfig").write_text("[this is no setting")
    monkeypatch.setenv("HOME", str(tmp_path))
    cli(["install", str(checkout)])
    assert tree(checkout) == installed


def test_permissions_stay_and_an_error_restores_every_file(made_up, monkeypatch):
    checkout, _ = made_up
    before = tree(checkout)
    unlink = Path.unlink

    def fails(path, *args, **kwargs):
        if path.parent.name == "configs":
            raise PermissionError(13, "Permission denied", str(path))
        unlink(path, *args, **kwargs)
    cli(["install", str(checkout)])
    installed = tree(checkout)
    monkeypatch.setattr(Path, "unlink", fails)
    with pytest.raises(SystemExit, match="Permission denied"):
        cli(["install", str(checkout), "--reverse"])
    assert tree(checkout) == installed != before and os.access(checkout / "train_v2.py", os.X_OK)
