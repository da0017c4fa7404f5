"""Gives a pack new identities, from a list: exact also beyond 2**24, where float32 labels are not."""

from array import array
from codecs import BOM_UTF8
from pathlib import Path

import numpy as np
from tqdm import tqdm

from f2c_plugin.data.recordio import IDENTITY_BITS, Int64s, RecordFile, read_idx, rec_in
from f2c_plugin.data.writer import RecordWriter, new_pack, pack_image_record, write_property
from f2c_plugin.errors import RecordError
from f2c_plugin.tools.repack import Written
from f2c_plugin.utils.git_lfs import NOT_FETCHED, is_lfs_pointer

_NAMES = ("property", "train.idx", "train.rec")  # in the order in which they appear


def convert(source: str | Path, labels: str | Path, out: str | Path) -> Written:
    """Write the pack in ``source`` again into the folder ``out``, with the identities of a list. All files appear, or none.

    The new pack has a record 0 that announces the images, and no identity records. Identities from 2**24 on stand in
    the header of their records (see ``data.recordio``).

    Args:
        source: folder of train.rec and train.idx.
        labels: a list like im2rec's .lst: in each line the number of a record and its identity, from 0 to below 2**40,
            separated by a tab; more columns may follow.
        out: folder to write into.
    Raises:
        RecordError: the pack or the list cannot be read, or they do not fit.
        OverwriteError: ``out`` already holds a pack.
    """
    records = RecordFile(rec_in(source))
    keys, offsets = read_idx(records.path.with_suffix(".idx"))
    listed, identities = _read_list(Path(labels))
    position = np.minimum(np.searchsorted(listed, keys), len(listed) - 1)
    number_of_identities = len(np.unique(identities))
    with new_pack(Path(out), _NAMES) as folder, RecordWriter(folder / "train.rec") as pack:
        write_property(folder, number_of_identities)
        pack.write(0, pack_image_record([len(listed) + 1, number_of_identities], b"", 0))
        written = 0
        for key, offset, at in tqdm(zip(keys.tolist(), offsets.tolist(), position.tolist(), strict=True), "converting",
                                    len(keys), unit=" records", disable=None):
            record = records.image_record(offset)
            is_listed = listed[at] == key
            if not is_listed and (not len(record.image) or (key == 0 and len(record.labels) > 1)):
                continue  # bookkeeping
            if not is_listed or not len(record.image):
                raise RecordError(f"{labels}: {'lists' if is_listed else 'lacks'} record {key} of {records.path}, which is "
                                  f"{'no' if is_listed else 'an'} image: list every image, and nothing else")
            written += 1
            several = record.labels.astype(np.float64)
            several[0] = identities[at]
            pack.write(written, pack_image_record(several if len(several) > 1 else several[0], bytes(record.image), record.id))
        if written != len(listed):
            raise RecordError(f"{labels}: lists {len(listed)} images, but {records.path} has only {written} of them")
    return Written(Path(out), written, number_of_identities)


def _read_list(path: Path) -> tuple[Int64s, Int64s]:
    """Record numbers, ascending, and identities of a list, int64 (n,) each."""
    if not path.is_file():
        raise RecordError(f"{path}: no such file")
    keys, identities = array("q"), array("q")
    with open(path, "rb") as file:
        if is_lfs_pointer(file.peek()):
            raise RecordError(f"{path}: {NOT_FETCHED}")
        for number, line in enumerate(file, 1):
            line = line.removeprefix(BOM_UTF8) if number == 1 else line
            if line.isspace():
                continue
            try:
                key, identity = (float(word) for word in line.split(b"\t", 2)[:2])
                if not (key.is_integer() and identity.is_integer() and 0 <= identity < 1 << IDENTITY_BITS):
                    raise ValueError
                keys.append(int(key))
                identities.append(int(identity))
            except (ValueError, OverflowError):
                raise RecordError(f"{path}: line {number} is {line[:40]!r}, but must be the number of a record and its "
                                  f"identity, from 0 to below 2**{IDENTITY_BITS}, whole numbers, separated by a tab") from None
    order = np.argsort(keys, kind="stable")
    ordered = np.asarray(keys)[order]
    if not len(ordered):
        raise RecordError(f"{path}: the list is empty")
    if len(twice := ordered[1:][ordered[1:] == ordered[:-1]]):
        raise RecordError(f"{path}: lists record {twice[0]} twice")
    return ordered, np.asarray(identities)[order]
