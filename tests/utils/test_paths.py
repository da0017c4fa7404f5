"""The cache: where the user says, in the user's home, or, without one, in a folder that no other user has planted."""

import os
import shutil
import stat
import tempfile
from pathlib import Path

import pytest

from f2c_plugin.cli import main as cli
from f2c_plugin.errors import F2CError
from f2c_plugin.utils.paths import cache_folder
from tests.conftest import FIXTURES

UID = 54321 if os.getuid() == 0 else os.getuid()  # the superuser can write everywhere


@pytest.fixture
def anyone(monkeypatch):
    """A temporary folder for all users, and no home."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o1777)
    for name in "F2C_CACHE", "XDG_CACHE_HOME":
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(folder / "home"))
    (folder / "home").mkdir(mode=0o555)
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield folder
    shutil.rmtree(folder)


def as_user(function):
    """What ``function`` returns, or the message of its error, in a process of another user."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            if os.getuid() != UID:
                os.setgroups([])
                os.setgid(UID)
                os.setuid(UID)
            os.write(writer, str(function()).encode())
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as file:
        answer = file.read()
    os.waitpid(child, 0)
    return answer


def test_the_user_names_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("F2C_CACHE", str(tmp_path / "new" / "cache"))
    assert cache_folder() == tmp_path / "new" / "cache" and cache_folder().is_dir()
    monkeypatch.delenv("F2C_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "f2c-plugin"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "f2c-plugin"


def test_a_cache_that_cannot_be_written_is_named_with_the_variable(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("F2C_CACHE", str(tmp_path / "file"))
    with pytest.raises(F2CError, match=f"the cache, {tmp_path}/file, cannot be written: set .* F2C_CACHE"):
        cache_folder()
    with pytest.raises(SystemExit, match="f2c-plugin fetch-host: .* F2C_CACHE"):
        cli(["fetch-host"])


@pytest.mark.parametrize("home", ["read-only", "none", "/"])
def test_without_a_home_the_cache_is_a_private_temporary_folder(anyone, monkeypatch, home):
    if home == "none":
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory.")))
    elif home == "/":
        monkeypatch.setenv("HOME", "/")
    folder = anyone / f"f2c-plugin-{UID}"
    assert as_user(cache_folder) == str(folder) == as_user(cache_folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and folder.stat().st_uid == UID


@pytest.mark.parametrize("planted", ["folder", "link", "open folder", "file"])
def test_what_another_user_has_planted_there_is_not_used(anyone, planted):
    folder = anyone / f"f2c-plugin-{UID}"
    match planted:
        case "folder":
            if os.getuid() == UID:
                pytest.skip("NOT TRIED WITH ANOTHER USER'S FOLDER: needs the superuser")
            folder.mkdir(mode=0o777)
        case "link":
            (anyone / "elsewhere").mkdir()
            (anyone / "elsewhere").chmod(0o777)
            folder.symlink_to(anyone / "elsewhere")
        case "open folder":
            folder.mkdir()
            folder.chmod(0o777)
            os.chown(folder, UID, -1)
        case _:
            folder.write_text("")
    answer = as_user(cache_folder)
    assert answer.startswith("F2CError: ") and "F2C_CACHE" in answer
    assert not (anyone / "elsewhere").is_dir() or not list((anyone / "elsewhere").iterdir())


@pytest.mark.skipif(os.getuid() != 0, reason="NOT TRIED AS THE SUPERUSER")
def test_the_superuser_uses_no_other_users_folder(anyone, monkeypatch):
    monkeypatch.setenv("HOME", os.devnull)
    (anyone / "f2c-plugin-0").mkdir(mode=0o700)
    os.chown(anyone / "f2c-plugin-0", UID, -1)
    with pytest.raises(F2CError, match="F2C_CACHE"):
        cache_folder()


def test_a_pack_of_another_user_is_indexed_without_a_home(anyone):
    pack = shutil.copytree(FIXTURES / "insightface", anyone / "pack", ignore=shutil.ignore_patterns("*.f2c-index*"))
    pack.chmod(0o555)
    assert as_user(lambda: cli(["index", str(pack)])) == "None"
    assert list((anyone / f"f2c-plugin-{UID}").glob("indexes/*/meta.json"))
