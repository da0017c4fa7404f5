"""The identity index of a pack, kept on disk so that a pack of any size opens at once.

A folder of arrays, ``train.f2c-index`` beside the pack, mapped into memory and shared by all workers
and ranks. It stands for one state of the pack: sizes and times of ``train.rec`` and ``train.idx``.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import numpy as np

from f2c_plugin.utils.paths import cache_folder
from f2c_plugin.data.identities import IdentityIndex, index_identities
from f2c_plugin.data.recordio import RecordFile, read_idx
from f2c_plugin.errors import RecordError
from f2c_plugin.utils.atomic import to_disk

VERSION = 2  # of what is in the folder
_META_LIMIT = 1 << 16  # bytes; ours has a few hundred
_NAMES = [field.name for field in fields(IdentityIndex)]


def open_index(root_dir, progress: bool = False) -> IdentityIndex:
    """The index of the pack in ``root_dir``, mapped from disk; built first if there is none that fits the pack.

    Where the pack's folder is read-only the index goes into the cache folder. Of several
    processes that find none, one builds it and the others wait.

    Args:
        root_dir: folder of ``train.rec`` and ``train.idx``.
        progress: whether building shows a progress bar.
    Raises:
        RecordError: the pack cannot be read.
        OSError: the index can be written in neither place.
    """
    root_dir = Path(root_dir)
    stamp = _stamp(root_dir)
    name = hashlib.sha256(str(root_dir.resolve()).encode()).hexdigest()[:16]
    places = [root_dir / "train.f2c-index", cache_folder() / "indexes" / name]
    for place in places:
        if (index := _load(place, stamp)) is not None:
            return index
    place = places[0] if _writable(root_dir) else places[1]
    place.parent.mkdir(parents=True, exist_ok=True)
    with _lock(place):
        if (index := _load(place, stamp)) is None:  # nobody built it while this process waited
            records = RecordFile(root_dir / "train.rec")
            _save(index_identities(records, *read_idx(root_dir / "train.idx", progress)), place, stamp)
            index = _load(place, stamp)
    return index


def _stamp(root_dir):
    """What tells this state of the pack from any other."""
    stamp = {}
    for name, remedy in (("train.rec", ""), ("train.idx", ". The .rec cannot be read without its .idx; mxnet's "
                                                          "tools/rec2idx.py makes one from the .rec")):
        path = root_dir / name
        if not path.is_file():
            raise RecordError(f"{path}: no such file{remedy}")
        stamp[name] = [path.stat().st_size, path.stat().st_mtime_ns]
    return stamp


def _writable(folder):
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


@contextmanager
def _lock(place):
    """Keeps other processes out; the system opens it if this one dies."""
    with open(place.with_name(place.name + ".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _load(place, stamp) -> IdentityIndex | None:
    """The index at ``place``; None if there is none, or it is torn or of another state of the pack."""
    try:
        if (place / "meta.json").stat().st_size > _META_LIMIT:
            return None
        meta = json.loads((place / "meta.json").read_text())
        if meta["version"] != VERSION or meta["stamp"] != stamp:
            return None
        # As plain arrays over the maps: np.memmap takes microseconds for each element that it hands out.
        arrays = {name: np.asarray(np.load(place / f"{name}.npy", mmap_mode="r")) for name in _NAMES}
        if {name: [*array.shape, array.dtype.str] for name, array in arrays.items()} != meta["arrays"]:
            return None
        index = IdentityIndex(**arrays)
        return index if _fits_together(index) else None
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def _fits_together(index):
    """Whether the arrays are of the kinds and lengths that an index has. What is in them is not looked at, for it may be gigabytes."""
    lengths = {len(array) for array in (index.keys, index.offsets, index.lengths, index.identity, index.grouped)}
    return (lengths == {len(index)} and len(index.starts) == len(index.numbers) + 1 and index.unreadable.ndim == 2
            and index.starts[0] == 0 and index.starts[-1] == len(index)
            and all(getattr(index, name).dtype.kind == "i" for name in _NAMES))


def _save(index, place, stamp):
    """Write the arrays beside their place, and move them there when all of them are on disk."""
    arrays = {name: getattr(index, name) for name in _NAMES}
    meta = {"version": VERSION, "stamp": stamp,
            "arrays": {name: [*array.shape, array.dtype.str] for name, array in arrays.items()}}
    partial = Path(tempfile.mkdtemp(prefix=place.name + ".", suffix=".partial", dir=place.parent))
    try:
        partial.chmod(0o755)  # mkdtemp's is for this user alone
        for name, array in arrays.items():
            with open(partial / f"{name}.npy", "wb") as file:
                np.save(file, array)
                to_disk(file)
        with open(partial / "meta.json", "w") as file:
            json.dump(meta, file)
            to_disk(file)
        shutil.rmtree(place, ignore_errors=True)
        os.rename(partial, place)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
