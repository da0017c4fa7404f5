"""Writes packs: RecordIO byte for byte as mxnet does, in InsightFace's layout."""

import os
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate, chain, pairwise, repeat
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from f2c_plugin.data.image_sizes import IMAGE_SIZE
from f2c_plugin.data.recordio import (
    FIRST,
    IMAGE_HEADER,
    LAST,
    LENGTH_MASK,
    MAGIC,
    MAGIC_BYTES,
    MIDDLE,
    PART_HEADER,
    WHOLE,
    id2_of,
)
from f2c_plugin.errors import OverwriteError, RecordError
from f2c_plugin.utils.atomic import made, require_writable, to_disk, written_whole
from f2c_plugin.utils.locks import temporary_folder


def pack_image_record(label: ArrayLike, image: bytes, number: int) -> bytes:
    """Payload of an image record, byte for byte what ``mxnet.recordio.pack`` makes.

    ``image`` is an encoded image, or empty in a bookkeeping record; ``number`` is the id in the header. An
    identity from 2**24 to below 2**40 also goes into the header's id2 (see ``recordio``): as a label, float32 rounds it.
    """
    labels = np.asarray(label, np.float64)
    id2 = id2_of(labels.flat[0]) if image and labels.size else 0
    if labels.ndim == 0:
        return IMAGE_HEADER.pack(0, labels, number, id2) + image
    return IMAGE_HEADER.pack(labels.size, 0.0, number, id2) + labels.astype("<f4").tobytes() + image


class RecordWriter:
    """Writes a ``.rec``/``.idx`` pair, byte for byte as ``mxnet.recordio.MXIndexedRecordIO`` does.

    Both files appear when the ``with`` block ends without an exception. If it raises, neither appears.

    Example:
        >>> with RecordWriter("train.rec") as pack:
        ...     pack.write(0, pack_image_record(label=3, image=jpeg, number=0))
    """

    def __init__(self, rec_path: str | Path):
        self.paths = Path(rec_path), Path(rec_path).with_suffix(".idx")

    def __enter__(self) -> "RecordWriter":
        self._files = ExitStack()
        with self._files:  # if one cannot be created, neither stays
            self._rec, self._idx = (self._files.enter_context(written_whole(path)) for path in self.paths)
            self._files = self._files.pop_all()
        return self

    def __exit__(self, error_type: object, error: BaseException | None, traceback: object) -> None:
        with self._files:
            if error:
                raise error
            to_disk(self._rec)  # a disk may be full only now; then neither file may appear

    def write(self, key: int, payload: bytes) -> None:
        """Append a record. Raises RecordError if a part of it is longer than RecordIO allows."""
        self._idx.write(b"%d\t%d\n" % (key, self._rec.tell()))
        cuts: list[int] = []
        position = -1
        while (position := payload.find(MAGIC_BYTES, position + 1)) >= 0:
            if position % 4 == 0:
                cuts.append(position)
        starts = [0, *(cut + len(MAGIC_BYTES) for cut in cuts)]
        ends = [*cuts, len(payload)]
        cflags = [FIRST, *repeat(MIDDLE, len(cuts) - 1), LAST] if cuts else [WHOLE]
        for cflag, start, end in zip(cflags, starts, ends, strict=True):
            length = end - start
            if length > LENGTH_MASK:
                raise RecordError(f"record {key} has a part of {length} bytes, but RecordIO holds at most {LENGTH_MASK}")
            self._rec.write(PART_HEADER.pack(MAGIC, cflag << 29 | length) + payload[start:end] + bytes(-length % 4))


def refuse_to_overwrite(folder: Path, names: Iterable[str] = ("train.rec",)) -> None:
    """Raise OverwriteError if ``folder`` holds a file of one of these names; by default, if it holds a pack.

    And OSError, as ``require_writable``, if none could be written there.
    """
    for path in map(folder.joinpath, names):
        if os.path.lexists(path):
            raise OverwriteError(f"{path} exists and is not overwritten: choose another folder or remove it")
        require_writable(path)


@contextmanager
def new_pack(out: Path, names: Sequence[str]) -> Generator[Path]:
    """A folder for the files of a pack, which move to ``out`` when all are whole. On an error, nothing stays; of a process
    that is killed, what the next one removes.

    Args:
        out: made if it is missing.
        names: of the files, in the order in which they appear; those that have not been written are left out.
    Raises:
        OverwriteError: ``out`` holds a file of one of the names.
    """
    refuse_to_overwrite(out, names)
    with made(out), temporary_folder(out, ".packing-") as folder:
        try:
            yield folder
        except OSError as error:
            if error.filename is not None and Path(error.filename).parent == folder:
                error.filename = str(out / Path(error.filename).name)
            raise
        refuse_to_overwrite(out, names)  # another process may have packed meanwhile
        for name in names:
            if (folder / name).exists():
                os.replace(folder / name, out / name)


def write_property(folder: Path, num_identities: int) -> None:
    """Write the ``property`` file of InsightFace's packs: identities, height, width."""
    with written_whole(folder / "property") as file:
        file.write(f"{num_identities},{IMAGE_SIZE},{IMAGE_SIZE}\n".encode())


def write_insightface_pack(path: str | Path, images: Iterable[bytes], sizes: Sequence[int]) -> None:
    """Write the ``.rec`` file ``path`` and its ``.idx`` in InsightFace's layout.

    Record 0 is bookkeeping. Images follow from record 1, then a record for each identity. ``images`` are
    encoded and come identity by identity; ``sizes`` are the numbers of images of the identities. Raises
    ValueError if the two disagree about the number of images.
    """
    firsts = list(accumulate(sizes, initial=1))  # first image of each identity, and the end of all images
    identities = chain.from_iterable(repeat(identity, size) for identity, size in enumerate(sizes))
    with RecordWriter(path) as pack:
        pack.write(0, pack_image_record([firsts[-1], firsts[-1] + len(sizes)], b"", 0))
        for key, (identity, image) in enumerate(zip(identities, images, strict=True), start=1):
            pack.write(key, pack_image_record(identity, image, 0))
        for identity, image_range in enumerate(pairwise(firsts)):
            pack.write(firsts[-1] + identity, pack_image_record(image_range, b"", identity))
