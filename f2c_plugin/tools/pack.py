"""Makes a pack of images from folders, lists, tar files or datasets."""

import json
import os
import tempfile
from array import array
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from f2c_plugin.data.writer import new_pack, refuse_to_overwrite, write_insightface_pack, write_property
from f2c_plugin.errors import InputError, RecordError
from f2c_plugin.tools.image_files import storable
from f2c_plugin.tools.left_out import LEFT_OUT, LeftOut, with_examples
from f2c_plugin.tools.pack_sources import Item, Source
from f2c_plugin.utils.atomic import naming, written_whole
from f2c_plugin.utils.workers import worker_pool

IDENTITIES = "identities.json"
_NAMES = ("property", IDENTITIES, LEFT_OUT, "train.idx", "train.rec")  # in the order in which they appear
_CHUNK = 8  # images that a process decodes at a time; photographs wait in memory, many for each process


class Packed(LeftOut):
    """What ``pack`` has packed and left out.

    Attributes:
        sizes: {name: number of images} of each identity, in the order of their numbers.
        unused: names of the identities without a usable image, which get no number.
    """

    def __init__(self, out: Path):
        super().__init__(out)
        self.sizes: dict[str, int] = {}
        self.unused: list[str] = []

    def report(self) -> str:
        """What was packed and left out, in lines for people."""
        return "\n".join([f"{self.out}: {sum(self.sizes.values())} images of {len(self.sizes)} identities", *self.lines()])

    def reasons(self) -> list[str]:
        """Also one for identities without images."""
        unused = "identity without a usable image, which gets no number"
        return super().reasons() + ([with_examples(len(self.unused), unused, self.unused)] if self.unused else [])


def pack(source: Source, out: str | Path, resize: bool = False, quality: int | None = None,
         processes: int | None = None) -> Packed:
    """Write a pack in InsightFace's layout.

    Every image is decoded, and stored as ``image_files.storable`` says. Identities are numbered in the order of their
    names, whole numbers by their size, and ``out/identities.json`` lists the names; those without a usable image get no
    number. The images of an identity keep their order. If anything is left out, ``out/left_out.tsv`` names it and says why.
    All files appear in ``out``, or none.

    Args:
        resize: scale and crop images of other sizes, which else are left out.
        quality: store all images that are not JPEGs as JPEGs of this quality, 1 to 100, instead of PNGs.
        processes: None means one per CPU.
    Raises:
        RecordError: there is nothing to pack, or the source cannot be read.
        InputError: the source does not fit its options or ``out``, or there is no such quality.
        OverwriteError: ``out`` already holds a file of such a name.
        F2CError: a package is needed and missing.
    """
    out = Path(out)
    if quality is not None and not 1 <= quality <= 100:
        raise InputError(f"--quality {quality}: must be from 1 to 100")
    refuse_to_overwrite(out, _NAMES)
    packed = Packed(out)
    count = source.count(out)
    rec = out / "train.rec"
    with (new_pack(out, _NAMES) as folder, naming(rec), tempfile.TemporaryFile(dir=folder) as images,  # its end writes, too
          worker_pool(processes) as pool):
        # A pack begins with its number of images, and has an identity's images together. Until all are decoded, they wait here.
        lengths, owners = array("q"), array("q")
        number_seen: dict[str, int] = {}  # of each name, in the order in which they come
        with (written_whole(folder / LEFT_OUT) as left_out, naming(rec),
              tqdm(total=count, desc="decoding", unit=" images", disable=None) as bar):
            for identity, name, image in pool.imap(partial(_stored, resize, quality), source.items(), _CHUNK):
                if identity:
                    number_seen.setdefault(identity, len(number_seen))
                if isinstance(image, bytes):
                    images.write(image)
                    lengths.append(len(image))
                    owners.append(number_seen[identity])
                else:
                    left_out.write(packed.leave_out(name, image))
                bar.update()
            images.flush()
        sizes = np.bincount(np.asarray(owners), minlength=len(number_seen))
        names = _in_order(number_seen)
        packed.sizes = {name: int(size) for name in names if (size := sizes[number_seen[name]])}
        packed.unused = [name for name in names if name not in packed.sizes]
        if not lengths:
            raise RecordError("\n  ".join([f"{source}: no image to pack; it must hold {source.needs}", *packed.reasons()]))
        if not packed.left_out:
            (folder / LEFT_OUT).unlink()
        with written_whole(folder / IDENTITIES) as file:  # a name that is not UTF-8 has surrogates, which JSON escapes
            listed = json.dumps(list(packed.sizes), ensure_ascii=False, indent=0) + "\n"
            file.write(listed.encode("utf-8", "backslashreplace"))
        write_property(folder, len(packed.sizes))
        rank = np.empty(len(names), np.int64)
        rank[[number_seen[name] for name in names]] = np.arange(len(names))
        order = np.argsort(rank[np.asarray(owners)], kind="stable")
        ends = np.cumsum(np.asarray(lengths))
        places = ((lengths[i], int(ends[i]) - lengths[i]) for i in tqdm(order, "writing", unit=" images", disable=None))
        stored = (os.pread(images.fileno(), *place) for place in places)
        write_insightface_pack(folder / "train.rec", stored, list(packed.sizes.values()))
    return packed


def _stored(resize: bool, quality: int | None, item: Item) -> tuple[str, str, bytes | str]:
    """Identity and name of an image, and what is stored of it or why nothing is."""
    identity, name, image = item
    return identity, name, image if isinstance(image, str) else storable(image, resize, quality)


def _in_order(names: Iterable[str]) -> list[str]:
    """Sorted; by size, if all are whole numbers."""
    if all(name.isascii() and name.isdecimal() for name in names):
        return sorted(names, key=lambda name: (len(name.lstrip("0")), name.lstrip("0"), name))
    return sorted(names)
