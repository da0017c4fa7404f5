"""The index on disk: built once, shared, and rebuilt when the pack changes or the index is torn."""

import json
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from f2c_plugin.data import index as index_module
from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.data.index import open_index
from f2c_plugin.data.writer import RecordWriter, pack_image_record
from tests.conftest import FIXTURES, PACKS


@pytest.fixture
def builds(monkeypatch):
    """Counts how often an index is built in this process."""
    calls = []

    def build(*arguments, build=index_module.index_identities):
        calls.append(arguments)
        return build(*arguments)
    monkeypatch.setattr(index_module, "index_identities", build)
    return calls


def as_lists(index):
    return {name: array.tolist() for name, array in vars(index).items()}


@pytest.mark.parametrize("name", PACKS)
def test_the_index_mapped_from_disk_equals_the_index_that_was_built(pack, name, builds):
    folder = pack(name)
    first = as_lists(open_index(folder))
    again = open_index(folder)
    assert len(builds) == 1 and as_lists(again) == first
    assert all(isinstance(array.base, np.memmap) for array in vars(again).values())


def test_each_length_reaches_to_the_next_record(pack):
    folder = pack("im2rec")
    index = open_index(folder)
    order = np.argsort(index.offsets)
    following = [*index.offsets[order][1:].tolist(), (folder / "train.rec").stat().st_size]
    assert (index.offsets + index.lengths)[order].tolist() == following


def test_a_pack_that_has_changed_is_indexed_again(tmp_path, builds):
    for label in 4, 7:
        with RecordWriter(tmp_path / "train.rec") as writer:
            writer.write(0, pack_image_record(label, b"jpeg", 0))
        os.utime(tmp_path / "train.rec", ns=(label, label))  # so that two writes within a clock tick differ
        assert open_index(tmp_path).identity.tolist() == [label]
    assert len(builds) == 2


@pytest.mark.parametrize("damage", ["array cut short", "array empty", "array missing", "meta cut short", "meta of another kind",
                                    "meta without end", "other version", "array of other length", "arrays that do not fit"])
def test_a_torn_index_is_built_again(pack, builds, damage):
    folder = pack("insightface")
    expected = as_lists(open_index(folder))
    identity, meta = (folder / "train.f2c-index" / name for name in ("identity.npy", "meta.json"))
    if damage == "array cut short":
        identity.write_bytes(identity.read_bytes()[:-4])
    elif damage == "array empty":
        identity.write_bytes(b"")
    elif damage == "array missing":
        identity.unlink()
    elif damage == "meta cut short":
        meta.write_text(meta.read_text()[:-10])
    elif damage == "meta of another kind":
        meta.write_text("[1, 2]")
    elif damage == "other version":
        meta.write_text(re.sub(r'"version": \d+', '"version": 1', meta.read_text()))
    elif damage == "meta without end":
        meta.write_text(meta.read_text() + " " * (1 << 20))
    elif damage == "array of other length":
        np.save(identity, np.zeros(3, np.int32))
    else:
        np.save(identity, np.zeros(3, np.int32))
        meta.write_text(re.sub(r'"identity": \[\d+,', '"identity": [3,', meta.read_text()))
    assert as_lists(open_index(folder)) == expected and len(builds) == 2
    assert as_lists(open_index(folder)) == expected and len(builds) == 2


@pytest.mark.parametrize("name, change", [
    ("starts", lambda starts: starts[::-1]), ("starts", lambda starts: np.append(starts[1:], starts[-1])),
    ("grouped", lambda grouped: grouped + 1), ("grouped", lambda grouped: grouped - 1),
    ("identity", lambda identity: identity - 1), ("identity", lambda identity: identity * 9 + 9),
    ("numbers", lambda numbers: numbers[::-1]), ("numbers", lambda numbers: numbers - 9),
    ("keys", lambda keys: keys[:, None]), ("keys", lambda keys: keys.astype(np.float64)),
    ("keys", lambda keys: keys.astype("U3")), ("unusable", lambda unusable: np.zeros((1, 3), np.int64)),
    ("conflict", lambda conflict: conflict[:1]), ("starts", lambda starts: starts[:0]),
    ("identity", lambda identity: np.int32(0))],
    ids=["starts fall", "starts late", "positions too large", "positions below 0", "identities below 0", "identities too large",
         "numbers fall", "numbers below 0", "two dimensions", "floats", "text", "other columns", "one number", "no starts",
         "a scalar"])
def test_an_index_whose_arrays_do_not_fit_together_is_built_again(pack, builds, name, change):
    folder = pack("insightface")
    expected = as_lists(open_index(folder))
    file, meta = folder / "train.f2c-index" / f"{name}.npy", folder / "train.f2c-index" / "meta.json"
    changed = change(np.load(file))
    np.save(file, changed)
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"arrays": json.loads(meta.read_text())["arrays"] | {
        name: [*changed.shape, changed.dtype.str]}}))
    assert as_lists(open_index(folder)) == expected and len(builds) == 2


@pytest.mark.parametrize("name", ["meta.json", "keys.npy"])
def test_a_pipe_in_place_of_a_file_of_the_index_is_not_waited_for(pack, builds, name):
    folder = pack("insightface")
    expected = as_lists(open_index(folder))
    (folder / "train.f2c-index" / name).unlink()
    os.mkfifo(folder / "train.f2c-index" / name)
    assert as_lists(open_index(folder)) == expected and len(builds) == 2


@pytest.mark.parametrize("text", ["[" * 60_000, "{}", "null", '{"version": {}}', "NaN", "\udcff"])
def test_meta_of_any_content_is_built_again(pack, builds, text):
    folder = pack("insightface")
    expected = as_lists(open_index(folder))
    (folder / "train.f2c-index" / "meta.json").write_text(text, errors="surrogateescape")
    assert as_lists(open_index(folder)) == expected and len(builds) == 2


@pytest.mark.parametrize("name", ["train.f2c-index.lock", "train.f2c-index"])
def test_links_in_a_pack_from_elsewhere_are_not_followed(pack, tmp_path, name):
    folder = pack("insightface")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("precious")
    (folder / name).symlink_to(precious / "file" if name.endswith("lock") else precious)
    open_index(folder)
    assert [path.name for path in precious.iterdir()] == ["file"] and (precious / "file").read_text() == "precious"
    assert (folder / "train.f2c-index" / "meta.json").is_file() and not (folder / "train.f2c-index").is_symlink()


def test_a_pipe_as_lock_is_not_waited_for(pack):
    folder = pack("insightface")
    os.mkfifo(folder / "train.f2c-index.lock")
    assert len(open_index(folder)) == 10


def test_a_lock_that_is_never_released_is_not_waited_for_forever(pack, monkeypatch, caplog):
    folder = pack("insightface")
    script = ("import sys, pathlib, f2c_plugin.utils.locks as locks\n"
              "with locks.locked(pathlib.Path(sys.argv[1]), 0):\n    print(flush=True)\n    sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", script, str(folder / "train.f2c-index.lock")], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        monkeypatch.setattr(index_module, "_WAIT", 0.1)
        assert len(open_index(folder)) == 10 and "going on without waiting" in caplog.text
        holder.kill()


@pytest.mark.skipif(os.getuid() != 0, reason="NOT TESTED WITH TWO USERS: needs root")
def test_a_folder_that_two_users_share():
    """The second user reads the first one's index; if the pack has changed, the index goes into the second one's cache."""
    with TemporaryDirectory() as parent:  # pytest's are for one user
        folder = Path(shutil.copytree(FIXTURES / "insightface", Path(parent) / "pack"))
        for path in Path(parent), folder:
            path.chmod(0o777)
        open_index(folder)
        assert as_another_user(folder) == ["10"]
        os.utime(folder / "train.idx", ns=(1, 1))
        assert as_another_user(folder) == ["built", "10"] and as_another_user(folder) == ["10"]


def as_another_user(folder):
    """What a process of another user prints when it opens the index."""
    script = ("import os, sys\n"
              "from f2c_plugin.data import index; os.setuid(12345)\n"
              "build, index.index_identities = index.index_identities, lambda *pack: print('built') or build(*pack)\n"
              "print(len(index.open_index(sys.argv[1])))")
    run = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True,
                         env={**os.environ, "F2C_CACHE": str(folder.parent / "cache of another")}, cwd="/")
    assert not run.returncode, run.stderr
    return run.stdout.split()


def test_a_build_that_fails_leaves_nothing_behind(pack, monkeypatch):
    folder = pack("insightface")

    def full(*_):
        raise OSError("no space left on device")
    monkeypatch.setattr(index_module.np, "save", full)
    with pytest.raises(OSError, match="no space left"):
        open_index(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["expected.json", "train.f2c-index.lock", "train.idx", "train.rec"]


def test_the_index_of_a_read_only_pack_goes_into_the_cache(pack, tmp_path, monkeypatch, builds):
    monkeypatch.setenv("F2C_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(index_module, "_replaceable", lambda folder: False)  # root can write anywhere
    folder = pack("insightface")
    expected = as_lists(open_index(folder))
    assert as_lists(open_index(folder)) == expected and len(builds) == 1
    assert not (folder / "train.f2c-index").exists()
    assert len(list((tmp_path / "cache" / "indexes").glob("*/meta.json"))) == 1


def open_and_count(folder, calls):
    def build(*arguments, build=index_module.index_identities):
        with calls.get_lock():
            calls.value += 1
        return build(*arguments)
    index_module.index_identities = build
    assert len(open_index(folder)) == 10


def test_one_of_several_processes_builds_the_index_and_the_others_wait(pack):
    folder = pack("insightface")
    context = multiprocessing.get_context("fork")
    calls = context.Value("i", 0)
    processes = [context.Process(target=open_and_count, args=(folder, calls)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4 and calls.value == 1


def test_a_dataset_sent_to_another_process_carries_paths_instead_of_arrays(pack):
    dataset = RecordDataset(pack("insightface"))
    assert len(pickle.dumps(dataset)) < 1000
    script = "import pickle, sys; print(pickle.load(sys.stdin.buffer).face(5).sum())"
    seen = subprocess.run([sys.executable, "-c", script], input=pickle.dumps(dataset), capture_output=True, check=True)
    assert int(seen.stdout) == dataset.face(5).sum()
