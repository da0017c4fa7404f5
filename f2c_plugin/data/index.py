"""Keeps the identity index of a pack on disk, so that a pack of any size opens at once.

The index is a folder of arrays, ``train.f2c-index`` next to the pack. All workers and ranks map it
into memory and share it. It is valid for one state of the pack: the sizes and modification times of
``train.rec`` and ``train.idx``.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import fields
from pathlib import Path

import numpy as np

from f2c_plugin.data.identities import IdentityIndex, index_identities
from f2c_plugin.data.recordio import NO_IDX, RecordFile, read_idx
from f2c_plugin.errors import RecordError
from f2c_plugin.utils.atomic import to_disk
from f2c_plugin.utils.paths import cache_folder

VERSION = 3  # of the folder's format
_META_LIMIT = 1 << 16  # bytes; a real meta.json has a few hundred
Stamp = dict[str, list[int]]  # file name -> [bytes, modification time in ns]


def open_index(root_dir: str | Path, progress: bool = False) -> IdentityIndex:
    """Map the index of the pack in ``root_dir`` from disk; build it first if there is none for this state of the pack.

    If the pack's folder is read-only, the index goes into the cache folder. If several processes need
    to build it, one does and the others wait. Raises RecordError if the pack cannot be read, OSError if
    neither folder can be written.
    """
    root_dir = Path(root_dir)
    stamp = _stamp(root_dir)
    name = hashlib.sha256(str(root_dir.resolve()).encode()).hexdigest()[:16]
    beside, cached = root_dir / "train.f2c-index", cache_folder() / "indexes" / name
    for folder in beside, cached:
        if (index := _load(folder, stamp)) is not None:
            return index
    folder = beside if _writable(root_dir) else cached
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(folder.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system releases it when this process closes the file or dies
        if (index := _load(folder, stamp)) is not None:  # another process built it while this one waited
            return index
        built = index_identities(RecordFile(root_dir / "train.rec"), *read_idx(root_dir / "train.idx", progress))
        _save(built, folder, stamp)
        mapped = _load(folder, stamp)
        return built if mapped is None else mapped


def _stamp(root_dir: Path) -> Stamp:
    """Identifies this state of the pack."""
    stamp: Stamp = {}
    for name, problem in ("train.rec", "no such file"), ("train.idx", NO_IDX):
        path = root_dir / name
        if not path.is_file():
            raise RecordError(f"{path}: {problem}")
        stamp[name] = [path.stat().st_size, path.stat().st_mtime_ns]
    return stamp


def _writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _load(folder: Path, stamp: Stamp) -> IdentityIndex | None:
    """The index in ``folder``; None if it is missing, torn or of another state of the pack."""
    try:
        if (folder / "meta.json").stat().st_size > _META_LIMIT:
            return None
        meta = json.loads((folder / "meta.json").read_text())
        if meta["version"] != VERSION or meta["stamp"] != stamp:
            return None
        # Plain arrays over the maps: np.memmap takes microseconds for each element that it returns.
        maps = (np.load(folder / f"{field.name}.npy", mmap_mode="r") for field in fields(IdentityIndex))
        index = IdentityIndex(*map(np.asarray, maps))
        return index if _layout(index) == meta["arrays"] and _is_consistent(index) else None
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def _layout(index: IdentityIndex) -> dict[str, list[int | str]]:
    return {name: [*array.shape, array.dtype.str] for name, array in vars(index).items()}


def _is_consistent(index: IdentityIndex) -> bool:
    """Whether the arrays have the dtypes and lengths of an index. Their content may be gigabytes and is not read."""
    lengths = {len(array) for array in (index.keys, index.offsets, index.lengths, index.identity, index.grouped)}
    return (lengths == {len(index)} and len(index.starts) == len(index.numbers) + 1 and index.unreadable.ndim == 2
            and index.conflict.shape == (2,) and index.starts[0] == 0 and index.starts[-1] == len(index)
            and all(array.dtype.kind == "i" for array in vars(index).values()))


def _save(index: IdentityIndex, folder: Path, stamp: Stamp) -> None:
    """Write the arrays next to ``folder``, and move them there when all of them are on disk."""
    meta = {"version": VERSION, "stamp": stamp, "arrays": _layout(index)}
    partial = Path(tempfile.mkdtemp(prefix=folder.name + ".", suffix=".partial", dir=folder.parent))
    try:
        partial.chmod(0o755)  # mkdtemp gives access to this user only
        for name, array in vars(index).items():
            with open(partial / f"{name}.npy", "wb") as file:
                np.save(file, array)
                to_disk(file)
        with open(partial / "meta.json", "w") as file:
            json.dump(meta, file)
            to_disk(file)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
