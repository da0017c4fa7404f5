"""Whatever the package writes, it writes whole and through no link: one function opens files for writing."""

import ast
import os
from pathlib import Path

import pytest

import f2c_plugin
from f2c_plugin.trainer.output import PatientFile

PACKAGE = Path(f2c_plugin.__file__).parent
INTO_A_FILE = {"save", "savez", "savez_compressed", "savefig", "dump", "tofile"}  # given a file of written_whole
TO_A_NAME = {"write_text", "write_bytes", "touch", "FileHandler", "NamedTemporaryFile", "os.open", "os.replace", "os.rename",
             "os.link", "os.symlink", "shutil.copy", "shutil.copy2", "shutil.copyfile", "shutil.copytree", "shutil.move"}
# {(file, function, call): why it is safe}
EXCEPTIONS = {
    ("utils/atomic.py", "create_beside", "open"): "the one mechanism: creates exclusively",
    ("utils/atomic.py", "written_whole", "os.replace"): "the one mechanism: replaces the name, also of a link",
    ("utils/atomic.py", "_folder_to_disk", "os.open"): "for reading",
    ("utils/locks.py", "locked", "os.open"): "follows no link and writes nothing",
    ("utils/locks.py", "_locked_folder", "os.open"): "for reading",
    ("utils/terminal.py", "_flush", "os.open"): "/dev/null",
    ("utils/terminal.py", "tolerate_any_terminal", "open"): "/dev/null",
    ("data/index.py", "_save", "open"): "in a new folder",
    ("data/index.py", "_save", "save"): "in a new folder",
    ("data/index.py", "_save", "dump"): "in a new folder",
    ("data/index.py", "_save", "os.rename"): "moves a folder, over no file",
    ("trainer/output.py", "__init__", "open"): "a log, appended to while the training runs; not through a link",
    ("trainer/output.py", "_only_a_file", "os.open"): "of that log",
    ("trainer/logger.py", "emit", "os.open"): "/dev/null",
    ("trainer/loop.py", "_run", "save"): "the method of Checkpoints, not a file",
    ("tools/image_files.py", "_encoded", "save"): "into memory",
    ("data/writer.py", "new_pack", "os.replace"): "of whole files, each from a new folder",
    ("tools/unpack.py", "unpack", "write_bytes"): "in a new temporary folder, which is renamed when it is whole",
    ("arcface_torch/patching.py", "_git_apply", "write_bytes"): "in a new temporary folder",
    ("arcface_torch/patching.py", "fetch_checkout", "os.replace"): "moves a folder into the cache, over no file",
}


def calls(function: ast.AST):
    """(name, call) of every call, "os.open" for open of os."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute):
                owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
                yield (f"{owner}.{node.func.attr}" if owner in ("os", "shutil") else node.func.attr), node
            elif isinstance(node.func, ast.Name):
                yield node.func.id, node


def opened_whole(function: ast.AST):
    """Names of the files that written_whole opens."""
    for node in ast.walk(function):
        for item in node.items if isinstance(node, ast.With) else []:
            if ast.unparse(item.context_expr).startswith("written_whole(") and isinstance(item.optional_vars, ast.Name):
                yield item.optional_vars.id


def reads(call: ast.Call):
    """Whether ``open(path, mode)``, ``path.open(mode)`` or ``Image.open(BytesIO(content))`` opens for reading."""
    if call.args and ast.unparse(call.args[0]).startswith("BytesIO("):
        return True
    at = 1 if isinstance(call.func, ast.Name) else 0
    modes = call.args[at:at + 1] or [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    mode = ast.literal_eval(modes[0]) if modes and isinstance(modes[0], ast.Constant) else "w" if modes else "r"
    return not set(mode) & set("wax+")


def writes(file: Path):
    """(file, function, call) of every call that writes other than into a file of written_whole."""
    for function in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(function, ast.FunctionDef):
            whole = set(opened_whole(function))
            for name, call in calls(function):
                into = {each.id for each in call.args if isinstance(each, ast.Name)}
                if name in TO_A_NAME or (name == "open" and not reads(call)) or (name in INTO_A_FILE and call.args and
                                                                                 not into & whole):
                    yield file.relative_to(PACKAGE).as_posix(), function.name, name


def test_files_are_opened_for_writing_in_one_place():
    found = {each for file in PACKAGE.rglob("*.py") for each in writes(file)}
    assert found - set(EXCEPTIONS) == set(), "write through utils.atomic.written_whole"
    assert set(EXCEPTIONS) - found == set(), "these are no more"


@pytest.mark.parametrize("mode", ["ab", "wb"])
def test_logs_that_are_appended_to_are_files_and_no_links_nor_pipes(tmp_path: Path, mode):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    (tmp_path / "dangling").symlink_to(tmp_path / "new")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # would wait for its reader
    for name in "link", "dangling", "folder", "pipe":
        with pytest.raises(FileExistsError, match=rf"Not a file, and not written to: move it away: .*{name}"):
            PatientFile(tmp_path / name, mode)
    assert (tmp_path / "precious").read_text() == "precious" and not (tmp_path / "new").exists()


@pytest.mark.parametrize("code, call", [
    ("open(path, 'w')", "open"), ("path.open('xb')", "open"), ("open(path, mode='a')", "open"), ("open(path, mode)", "open"),
    ("path.write_text(t)", "write_text"), ("torch.save(x, path)", "save"),
    ("figure.savefig(path)", "savefig"), ("logging.FileHandler(path)", "FileHandler"),
    ("with written_whole(path) as file:\n  np.save(other, x)", "save"), ("os.rename(a, b)", "os.rename")])
def test_it_notices(code: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    (tmp_path / "new.py").write_text("def f():\n" + "".join(f"    {line}\n" for line in code.splitlines()))
    assert list(writes(tmp_path / "new.py")) == [("new.py", "f", call)]
    (tmp_path / "new.py").write_text("def f():\n  with written_whole(p) as file:\n    np.save(file, x), open(p), open(p, 'rb')")
    assert not list(writes(tmp_path / "new.py"))
