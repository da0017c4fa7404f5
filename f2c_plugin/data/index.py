"""Keeps the identity index of a pack on disk, so that a pack of any size opens at once.

The index is a folder of arrays, ``train.f2c-index`` next to the pack. All workers and ranks map it
into memory and share it. It is valid for one state of the pack: the sizes and modification times of
``train.rec`` and ``train.idx``.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from dataclasses import fields
from pathlib import Path

import numpy as np

from f2c_plugin.data.identities import IdentityIndex, index_identities
from f2c_plugin.data.recordio import NO_IDX, RecordFile, read_idx, rec_in
from f2c_plugin.errors import RecordError
from f2c_plugin.utils.atomic import to_disk
from f2c_plugin.utils.locks import locked
from f2c_plugin.utils.paths import cache_folder

log = logging.getLogger(__name__)

VERSION = 5  # of the folder's format
_WAIT = 3600.0  # seconds for another process that builds the same index
_META_LIMIT = 1 << 16  # bytes; a real meta.json has a few hundred
Stamp = dict[str, list[int]]  # file name -> [bytes, modification time in ns]


def open_index(root_dir: str | Path, progress: bool = False) -> IdentityIndex:
    """Map the index of the pack in ``root_dir`` from disk; build it first if there is none for this state of the pack.

    If the pack's folder cannot be written, the index goes into the cache folder. If several processes need
    to build it, one does and the others wait. Raises RecordError if the pack cannot be read, F2CError or OSError
    if neither folder can be written.
    """
    root_dir = Path(root_dir)
    stamp = _stamp(root_dir)
    beside = root_dir / "train.f2c-index"
    if (index := _load(beside, stamp)) is not None:
        return index
    folder = beside if _replaceable(beside) else _cached(root_dir)
    try:
        with locked(folder.with_name(folder.name + ".lock"), _WAIT):
            return _load_or_build(folder, root_dir, stamp, progress)
    except TimeoutError as error:
        log.warning("%s; going on without waiting for it", error)
        return _load_or_build(folder, root_dir, stamp, progress)


def _cached(root_dir: Path) -> Path:
    """The folder of the index in the cache."""
    indexes = cache_folder() / "indexes"
    indexes.mkdir(exist_ok=True)
    return indexes / hashlib.sha256(os.fsencode(root_dir.resolve())).hexdigest()[:16]


def _load_or_build(folder: Path, root_dir: Path, stamp: Stamp, progress: bool) -> IdentityIndex:
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
        path = rec_in(root_dir).with_name(name)
        if not path.is_file():
            raise RecordError(f"{path}: {problem}")
        stamp[name] = [path.stat().st_size, path.stat().st_mtime_ns]
    return stamp


def _replaceable(folder: Path) -> bool:
    """Whether this process may create ``folder``, or replace what is there, which may be another user's."""
    try:
        with tempfile.TemporaryFile(dir=folder.parent):
            return folder.is_symlink() or not folder.is_dir() or os.access(folder, os.W_OK)
    except OSError:
        return False


def _load(folder: Path, stamp: Stamp) -> IdentityIndex | None:
    """The index in ``folder``; None if it is missing, of another state of the pack, or does not fit together."""
    names = [field.name for field in fields(IdentityIndex)]
    files = [folder / "meta.json", *(folder / f"{name}.npy" for name in names)]
    try:
        if not all(file.is_file() for file in files) or files[0].stat().st_size > _META_LIMIT:  # a pipe would be waited for
            return None
        meta = json.loads(files[0].read_text(encoding="utf-8"))
        if meta["version"] != VERSION or meta["stamp"] != stamp:
            return None
        # Plain arrays over the maps: np.memmap takes microseconds for each element that it returns.
        index = IdentityIndex(*(np.asarray(np.load(file, mmap_mode="r")) for file in files[1:]))
        return index if _layout(index) == meta["arrays"] and _is_consistent(index) else None
    except Exception:  # whatever is wrong with it, it is built again
        return None


def _layout(index: IdentityIndex) -> dict[str, list[int | str]]:
    return {name: [*array.shape, array.dtype.str] for name, array in vars(index).items()}


def _is_consistent(index: IdentityIndex) -> bool:
    """Whether the arrays have the dtypes and lengths of an index, and hold no position or identity that there is not."""
    images, identities = len(index), len(index.numbers)
    shapes = {"numbers": (identities,), "starts": (identities + 1,), "unusable": (len(index.unusable), 2), "conflict": (2,)}
    return bool(
        all(array.dtype.kind == "i" and array.shape == shapes.get(name, (images,)) for name, array in vars(index).items())
        and images and index.starts[0] == 0 and index.starts[-1] == images and (np.diff(index.starts) > 0).all()
        and index.numbers[0] >= 0 and (np.diff(index.numbers) > 0).all()
        and index.grouped.min() >= 0 and index.grouped.max() < images
        and index.identity.min() >= 0 and index.identity.max() <= index.numbers[-1])


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
        with open(partial / "meta.json", "w", encoding="utf-8") as file:
            json.dump(meta, file)
            to_disk(file)
        if folder.is_symlink() or folder.is_file():
            folder.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
