"""Finds identities that may be one person's, in packs that are to be merged or within one. Merges nothing."""

import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.functional import normalize
from tqdm import tqdm

from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.data.recordio import Float32s, Int64s
from f2c_plugin.data.writer import refuse_to_overwrite
from f2c_plugin.errors import F2CError, InputError
from f2c_plugin.tools.evaluate import load_model
from f2c_plugin.tools.left_out import on_one_line
from f2c_plugin.tools.pack_embeddings import unit_embeddings
from f2c_plugin.tools.packs import spread
from f2c_plugin.utils.atomic import naming, written_whole

_IMAGES = 10  # of an identity that are embedded
_BATCH = 25  # identities whose images are embedded at a time
_BLOCK = 2048  # centres that are compared with as many others at a time
_EXAMPLES = 10  # groups in the report, and identities of a group


class Suggested(NamedTuple):
    """An identity that may be another one, too: number of the pack, from 1; identity there; name of the group; largest cosine
    to another of the group."""

    pack: int
    identity: int
    name: str
    cosine: float

    def line(self) -> bytes:
        """In the list that ``repack.merge`` takes."""
        return "\t".join(map(str, self)).encode() + b"\n"


@dataclass
class Duplicates:
    """Identities that may be one person's.

    Attributes:
        out: the list, which ``repack.merge`` takes as ``same``.
        folders: of the packs.
        identities: that have been compared.
        unreadable: identities without an image that can be decoded, which are like no other.
        same: those that may be one, group by group.
    """

    out: Path
    folders: list[Path]
    identities: int
    unreadable: int
    same: list[Suggested]

    def report(self) -> str:
        """In lines for people."""
        groups: dict[str, list[Suggested]] = {}
        for each in self.same:
            groups.setdefault(each.name, []).append(each)
        unreadable = f"; {self.unreadable} have no readable image" if self.unreadable else ""
        lines = [f"{self.out}: {len(self.same)} of {self.identities} identities, in {len(groups)} groups that may be one "
                 f"person's{unreadable}"]
        for name, members in list(groups.items())[:_EXAMPLES]:
            listed = ", ".join(f"{self.folders[each.pack - 1]} {each.identity}" for each in members[:_EXAMPLES])
            more = ", …" if len(members) > _EXAMPLES else ""
            lines.append(f"  {name}: {on_one_line(listed)}{more} (cosine {max(each.cosine for each in members):.3f})")
        if len(groups) > _EXAMPLES:
            lines.append("  …")
        if groups:
            lines.append("look at them with f2c-plugin inspect, take out of the list what is not one person's, and give it to "
                         "f2c-plugin merge --same")
        return "\n".join(lines)


def find_duplicates(folders: Sequence[str | Path], model: str | Path, out: str | Path, least: float = 0.6) -> Duplicates:
    """Write a list of the identities whose centres have a cosine of ``least`` or more, for ``repack.merge``.

    The centre of an identity is the normalised mean of the unit embeddings of up to 10 of its images, spread evenly. As in
    verification, an embedding is the sum of those of an image and its mirror image. Groups are connected by such cosines:
    two of a group may be less alike. Centres wait on the disk, and are compared block by block.

    Args:
        folders: of the packs, in the order in which they are to be merged.
        model: an ``.onnx`` file, a ``model.pt`` or a checkpoint.
        out: the list: in each line the number of a pack, from 1, the identity there, the name of the group and the largest
            cosine, separated by tabs.
    Raises:
        InputError: there is no such cosine.
        RecordError: a pack cannot be read.
        OverwriteError: ``out`` exists.
        F2CError: the model cannot be read, or its embeddings are not finite.
    """
    out = Path(out)
    if not 0 < least <= 1:
        raise InputError(f"--least {least}: must be a cosine, above 0 and up to 1")
    refuse_to_overwrite(out.parent, [out.name])
    packs = [RecordDataset(folder, skip_damaged=True) for folder in folders]
    net = load_model(model)
    starts = np.cumsum([0, *(len(pack.index.numbers) for pack in packs)])
    out.parent.mkdir(parents=True, exist_ok=True)
    with naming(out), tempfile.TemporaryFile(dir=out.parent) as file:
        unreadable = 0
        with tqdm(total=int(starts[-1]), desc="embedding", unit=" identities", disable=None) as bar:
            for pack in packs:
                for centres in _centres(pack, net):
                    if not np.isfinite(centres).all():
                        raise F2CError(f"{model}: its embeddings of {pack.root_dir} are not finite")
                    unreadable += int(np.count_nonzero(~centres.any(1)))
                    file.write(centres.tobytes())
                    bar.update(len(centres))
            file.flush()
        centres = np.memmap(file, np.float32, "r").reshape(starts[-1], -1)

        def place(each: int) -> tuple[int, int]:
            pack = int(np.searchsorted(starts, each, "right"))
            return pack, int(packs[pack - 1].index.numbers[each - starts[pack - 1]])
        same = suggestions(centres, least, place)
    with written_whole(out) as file:
        file.writelines(map(Suggested.line, same))
    return Duplicates(out, list(map(Path, folders)), int(starts[-1]), unreadable, same)


def _centres(pack: RecordDataset, net: nn.Module) -> Iterator[Float32s]:
    """The centres of the identities in the order of ``index.numbers``, float32 (up to _BATCH, D) at a time; 0 of those without
    a readable image."""
    index = pack.index
    for start in range(0, len(index.numbers), _BATCH):
        chosen = [index.grouped[first + spread(end - first, _IMAGES)]
                  for first, end in pairwise(index.starts[start:start + _BATCH + 1].tolist())]
        unit = torch.from_numpy(unit_embeddings(pack, net, np.concatenate(chosen))).double()  # (n, D)
        owners = torch.arange(len(chosen)).repeat_interleave(torch.tensor([*map(len, chosen)]))
        yield normalize(unit.new_zeros(len(chosen), unit.size(1)).index_add_(0, owners, unit)).float().numpy()


def suggestions(centres: Float32s, least: float, place: Callable[[int], tuple[int, int]]) -> list[Suggested]:
    """The identities whose centres (n, D) have a cosine of ``least`` or more to another's, group by group.

    ``place`` gives the pack and the identity of each centre.
    """
    group, cosines = groups(centres, least)
    found = np.flatnonzero(cosines)
    found = found[np.argsort(group[found], kind="stable")]
    names = np.unique(group[found], return_inverse=True)[1] + 1
    return [Suggested(*place(each), f"same-{name}", round(float(cosines[each]), 4))
            for each, name in zip(found.tolist(), names.tolist(), strict=True)]


def groups(centres: Float32s, least: float) -> tuple[Int64s, Float32s]:
    """Of centres (n, D): the first centre of each one's group, int64 (n,), and its largest cosine to another, float32 (n,); 0
    if none is ``least`` or more."""
    parents = array("q", range(len(centres)))

    def root(each: int) -> int:
        while parents[each] != each:
            parents[each] = each = parents[parents[each]]
        return each

    largest = np.zeros(len(centres), np.float32)
    blocks = range(0, len(centres), _BLOCK)
    with tqdm(total=len(blocks) * (len(blocks) + 1) // 2, desc="comparing", unit=" blocks", disable=None) as bar:
        for first in blocks:
            for second in blocks[first // _BLOCK:]:
                cosines = centres[first:first + _BLOCK] @ centres[second:second + _BLOCK].T
                rows, columns = np.nonzero(np.triu(cosines >= least, 1) if first == second else cosines >= least)
                alike = cosines[rows, columns]
                rows, columns = rows + first, columns + second
                np.maximum.at(largest, rows, alike)
                np.maximum.at(largest, columns, alike)
                for pair in zip(rows.tolist(), columns.tolist(), strict=True):
                    low, high = sorted(map(root, pair))
                    parents[high] = low
                bar.update()
    return np.array([root(each) for each in range(len(centres))], np.int64), largest
