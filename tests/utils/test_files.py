"""Files are written whole and never through a link; locks end with their holder."""

import errno
import os
import re
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from f2c_plugin.utils.atomic import naming, partials_of, require_writable, written_whole
from f2c_plugin.utils.locks import locked, temporary_folder

HOLD = """
import sys
from pathlib import Path
from f2c_plugin.utils.locks import locked
with locked(Path(sys.argv[1]), 0):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_file_is_whole_or_as_it_was(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(ZeroDivisionError), written_whole(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["file"]
    with written_whole(path) as file:
        file.write(b"after")
        assert len(list(partials_of(path))) == 1
    assert path.read_bytes() == b"after" and os.listdir(tmp_path) == ["file"]


def test_nothing_is_written_through_a_link(tmp_path: Path):
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    folder = tmp_path / "from elsewhere"
    folder.mkdir()
    (folder / "file").symlink_to(precious)
    (folder / "file.partial").symlink_to(precious)
    with written_whole(folder / "file") as file:
        file.write(b"new")
    assert precious.read_bytes() == b"precious"
    assert (folder / "file").read_bytes() == b"new" and not (folder / "file").is_symlink()


def test_a_partial_file_whose_name_was_guessed_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(secrets, "token_hex", lambda _: "01234567")
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "file.01234567.partial").symlink_to(tmp_path / "precious")
    with pytest.raises(FileExistsError), written_whole(tmp_path / "file"):
        pass
    assert (tmp_path / "precious").read_bytes() == b"precious" and (tmp_path / "file.01234567.partial").is_symlink()


def test_what_is_no_file_is_not_replaced_by_one(tmp_path: Path):
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(os.devnull)
    for path in pipe, link, tmp_path, Path(os.devnull):
        with pytest.raises(FileExistsError, match=f"Not a file, and not replaced by one: '{path}'"), written_whole(path):
            pass
    assert pipe.is_fifo() and link.is_symlink() and not Path(os.devnull).is_file()
    assert set(os.listdir(tmp_path)) == {"pipe", "link"}


def test_a_missing_folder_is_made_and_goes_again_on_an_error(tmp_path: Path):
    path = tmp_path / "new/folder/file"
    with pytest.raises(ZeroDivisionError), written_whole(path):
        assert path.parent.is_dir() and 1 / 0
    assert not list(tmp_path.iterdir())
    with written_whole(path) as file:
        file.write(b"whole")
    assert path.read_bytes() == b"whole" and os.listdir(path.parent) == ["file"]


def test_a_folder_that_cannot_be_made_or_written_into_is_found_out_before_anything_is_done(tmp_path: Path,
                                                                                           monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in "file", "dangling":
        path = tmp_path / name / "folder/plan.png"
        message = f"Its folder cannot be made, because {tmp_path / name} is not a folder: '{path}'"
        for write in require_writable, lambda path: written_whole(path).__enter__():
            with pytest.raises(NotADirectoryError, match=re.escape(message)):
                write(path)
    require_writable(tmp_path / "new/folder/file")
    require_writable("file of this folder")
    assert set(os.listdir(tmp_path)) == {"file", "dangling"}
    monkeypatch.setattr(os, "access", lambda *_: False)  # the superuser may write everywhere
    with pytest.raises(PermissionError, match=f"Nothing may be written into {tmp_path}: '{tmp_path / 'new/file'}'"):
        require_writable(tmp_path / "new/file")


def test_other_users_can_read_what_is_written(tmp_path: Path):
    before = os.umask(0o022)
    try:
        with written_whole(tmp_path / "file"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def test_an_error_without_a_file_gets_its_name(tmp_path: Path):
    with pytest.raises(OSError, match="No space left on device: '/there/file'"), naming(Path("/there/file")):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match="/there/file"), naming(Path("/here")):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/there/file")


def test_a_file_that_cannot_be_created_is_named_and_not_its_partial_one(tmp_path: Path):
    path = tmp_path / (250 * "n")  # so long that the partial one's is too long
    with pytest.raises(OSError, match="File name too long") as raised, written_whole(path):
        pass
    assert raised.value.filename == str(path)


def test_a_lock_keeps_others_out_until_its_holder_dies(tmp_path: Path):
    path = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout and holder.stdout.readline() == b"held\n"
    with pytest.raises(TimeoutError, match="lock is locked by another process"), locked(path, 0.1):
        pass
    holder.kill()
    holder.wait()
    with locked(path, 0):
        pass


@pytest.mark.parametrize("what", ["link", "pipe", "folder", "missing folder"])
def test_where_no_lock_can_be_had_it_goes_on_and_changes_nothing(tmp_path: Path, what: str):
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    path = tmp_path / "lock"
    match what:
        case "link":
            path.symlink_to(precious)
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case _:
            path = tmp_path / "missing" / "lock"
    with locked(path, 0):
        pass
    assert precious.read_bytes() == b"precious"


def test_on_a_file_system_without_locks_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_locks(*_: object):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr("fcntl.lockf", no_locks)
    with locked(tmp_path / "lock", 0):
        pass


IN_A_FOLDER = """
import sys
from pathlib import Path
from f2c_plugin.utils.locks import temporary_folder
with temporary_folder(Path(sys.argv[1]), ".work-") as folder:
    (folder / "file").write_text("half")
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_a_temporary_folder_is_removed_by_the_next_process_only_when_its_own_is_dead(tmp_path: Path):
    holder = subprocess.Popen([sys.executable, "-c", IN_A_FOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout
    its = Path(holder.stdout.readline().decode().strip())
    (tmp_path / ".work-precious").write_text("a file")
    (tmp_path / ".work-mine1234").symlink_to(its)
    (tmp_path / ".work-new12345").mkdir()  # a process may be about to lock it
    with temporary_folder(tmp_path, ".work-") as mine:
        assert (its / "file").read_text() == "half"
    holder.kill()
    holder.wait()
    with temporary_folder(tmp_path, ".work-") as mine:
        assert not its.exists() and mine.is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {".work-precious", ".work-mine1234", ".work-new12345"}


def test_where_folders_cannot_be_locked_none_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_locks(*_: object):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    monkeypatch.setattr("fcntl.flock", no_locks)
    (tmp_path / ".work-12345678").mkdir()
    (tmp_path / ".work-12345678/file").write_text("half")
    with temporary_folder(tmp_path, ".work-") as mine:
        assert mine.is_dir()
    assert [*tmp_path.iterdir()] == [tmp_path / ".work-12345678"]
