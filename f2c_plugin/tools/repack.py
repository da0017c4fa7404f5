"""Makes packs of packs: merged, split, filtered. Images are copied as they are stored."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.data.recordio import IDENTITY_BITS, Int64s
from f2c_plugin.data.writer import new_pack, write_insightface_pack, write_property
from f2c_plugin.errors import InputError, RecordError
from f2c_plugin.tools.left_out import on_one_line
from f2c_plugin.utils.atomic import written_whole

IDENTITIES, DUPLICATES = "identities.tsv", "duplicates.tsv"
_NAMES = ("property", IDENTITIES, DUPLICATES, "train.idx", "train.rec")  # in the order in which they appear
UNUSABLE = "damaged, or not 112×112"
_CHUNK = 1 << 16  # images whose places are made Python's numbers at a time


@dataclass
class Written:
    """A folder that has been written, and the numbers of images and identities that it holds."""

    out: Path
    images: int = 0
    identities: int = 0

    def report(self) -> str:
        """In lines for people."""
        return f"{self.out}: {self.images} images of {self.identities} identities"


@dataclass
class Repacked(Written):
    """What has become of packs.

    Attributes:
        left_out: {reason: number of images}.
        duplicates: images whose bytes an earlier one has, too.
    """

    left_out: dict[str, int] = field(default_factory=dict[str, int])
    duplicates: int = 0

    def report(self) -> str:
        lines = [super().report()]
        if self.duplicates:
            lines.append(f"  {self.duplicates} images have the bytes of another, see {self.out / DUPLICATES}")
        return "\n".join(lines + [f"  left out: {count} images, {reason}" for reason, count in self.left_out.items() if count])


class _Images(NamedTuple):
    """Images of several packs, each under the identity that it gets; n of them.

    Attributes:
        source: int64 (n,) the number of the pack.
        position: int64 (n,) in that pack.
        identity: int64 (n,) 0 … without gaps, ascending.
    """

    source: Int64s
    position: Int64s
    identity: Int64s

    def chosen(self, which: NDArray[np.bool_] | Int64s) -> "_Images":
        return _Images(*(each[which] for each in self))

    def place(self, image: int) -> tuple[int, int]:
        return int(self.source[image]), int(self.position[image])


class _Packs:
    """Packs that are read one image at a time.

    Args:
        folders: of the packs.
        usable: of each pack, bool (images,); None takes those whose records are not damaged. The index of packs in
            InsightFace's layout takes identities from other records, and has not seen those of the images.
    """

    def __init__(self, folders: Sequence[str | Path], usable: Sequence[NDArray[np.bool_]] | None = None):
        self.folders = [Path(folder) for folder in folders]
        self.datasets = [RecordDataset(folder, skip_damaged=True) for folder in folders]
        self.usable = list(map(_not_damaged, self.datasets)) if usable is None else usable

    @property
    def unusable(self) -> int:
        """Images that are left out of the packs."""
        return sum(len(dataset.index.unusable) for dataset in self.datasets) + sum(
            int(np.count_nonzero(~usable)) for usable in self.usable)

    def sizes(self, source: int) -> Int64s:
        """Usable images of each identity of a pack, int64 (identities,)."""
        index = self.datasets[source].index
        return np.add.reduceat(self.usable[source][index.grouped], index.starts[:-1], dtype=np.int64)

    def __len__(self) -> int:
        return sum(map(len, self.datasets))

    def image(self, source: int, position: int) -> bytes:
        """An image as it is stored."""
        return self.datasets[source].encoded(position)

    def encoded(self, images: _Images, doing: str) -> Iterator[bytes]:
        """The images, one by one."""
        with tqdm(total=len(images.source), desc=doing, unit=" images", disable=None) as bar:
            for start in range(0, len(images.source), _CHUNK):
                chunk = slice(start, start + _CHUNK)
                for place in zip(images.source[chunk].tolist(), images.position[chunk].tolist(), strict=True):
                    yield self.image(*place)
                    bar.update()

    def named(self, number_of: Sequence[Int64s]) -> _Images:
        """All usable images of the packs' identities, with the new numbers of these; those below 0 are left out.

        Args:
            number_of: of each pack, int64 (identities,) in the order of ``index.numbers``.
        """
        parts: list[_Images] = []
        for source, (dataset, numbers) in enumerate(zip(self.datasets, number_of, strict=True)):
            index = dataset.index
            identity = np.repeat(numbers, np.diff(index.starts))
            images = _Images(np.full(len(index), source), index.grouped.astype(np.int64), identity)
            parts.append(images.chosen((identity >= 0) & self.usable[source][index.grouped]))
        images = _Images(*(np.concatenate(each) for each in zip(*parts, strict=True)))
        return images.chosen(np.argsort(images.identity, kind="stable"))

    def write(self, folder: Path, images: _Images, number_of: Sequence[Int64s]) -> None:
        """A pack of the images in ``folder``, and the list of what its identities were."""
        sizes = np.bincount(images.identity)
        write_insightface_pack(folder / "train.rec", self.encoded(images, "writing"), sizes.tolist())
        write_property(folder, len(sizes))
        with written_whole(folder / IDENTITIES) as file:
            for path, dataset, numbers in zip(self.folders, self.datasets, number_of, strict=True):
                for new, old in zip(numbers.tolist(), dataset.index.numbers.tolist(), strict=True):
                    if new >= 0:
                        file.write(f"{new}\t{on_one_line(str(path))}\t{old}\n".encode())


def _not_damaged(dataset: RecordDataset) -> NDArray[np.bool_]:
    offsets = tqdm(dataset.index.offsets.tolist(), f"checking {dataset.root_dir}", unit=" records", disable=None)
    return np.fromiter((dataset.records.damage(offset) is None for offset in offsets), np.bool_, len(dataset))


def merge(folders: Sequence[str | Path], out: str | Path, same: str | Path | None = None,
          drop_duplicates: bool = False) -> Repacked:
    """Write the images of several packs into one.

    Identities of different packs are different ones, unless ``same`` says otherwise, and are numbered anew, pack by pack.
    ``out/identities.tsv`` has a line for each: its new number, the pack, its number there. ``out/duplicates.tsv`` has a line
    for each image whose bytes an earlier one has, too: pack, record and identity of both.

    Args:
        folders: of the packs.
        out: folder to write into.
        same: a list of identities that are the same person's: in each line the number of the pack, from 1 in the order of
            ``folders``, the identity there, and any name, separated by tabs. Those with one name become one identity.
        drop_duplicates: leave out such images where the earlier one is of the same identity. Those of others stay.
    Raises:
        RecordError: a pack or the list cannot be read.
        InputError: the list does not fit.
        OverwriteError: ``out`` already holds a pack.
    """
    out = Path(out)
    with new_pack(out, _NAMES) as folder:
        packs = _Packs(folders)
        number_of = _merged_numbers(packs, _read_same(Path(same), packs) if same else {})
        merged = Repacked(out, left_out={UNUSABLE: packs.unusable})
        images = packs.named(number_of)
        hashes = np.fromiter((int.from_bytes(hashlib.blake2b(image, digest_size=8).digest(), "little")
                              for image in packs.encoded(images, "comparing")), np.uint64, len(images.source))
        merged.duplicates = _list_duplicates(packs, images, hashes, folder / DUPLICATES)
        if drop_duplicates:
            again, _ = _repeated(packs, images, hashes, images.identity)
            images = images.chosen(np.setdiff1d(np.arange(len(images.source)), again))
            merged.left_out["the same as another of the identity"] = len(again)
        packs.write(folder, images, number_of)
    merged.images, merged.identities = len(images.source), int(images.identity[-1]) + 1
    return merged


def split(source: str | Path, train: str | Path, unseen: str | Path, identities: int, seed: int = 0,
          min_images: int = 2) -> tuple[Repacked, Repacked]:
    """Write a pack as two: ``identities`` random ones into ``unseen``, to verify with, and all others into ``train``.

    Args:
        min_images: that an identity must have to be in ``unseen``.
    Raises:
        InputError: there are not so many identities with so many images, or none would be left to train on.
        RecordError, OverwriteError: as of ``merge``.
    """
    outs = Path(train), Path(unseen)
    if outs[0].resolve() == outs[1].resolve():
        raise InputError(f"{train} and {unseen} are one folder: name two")
    with new_pack(outs[0], _NAMES) as first, new_pack(outs[1], _NAMES) as second:
        packs = _Packs([source])
        index = packs.datasets[0].index
        sizes = packs.sizes(0)
        enough = np.flatnonzero(sizes >= max(1, min_images))
        if not 0 < identities <= len(enough):
            raise InputError(f"--identities {identities}: {source} has {len(enough)} identities with {min_images} images or "
                             "more")
        if identities == np.count_nonzero(sizes):
            raise InputError(f"--identities {identities}: are all that {source} has; none would be left to train on")
        is_unseen = np.zeros(len(index.numbers), bool)
        is_unseen[np.random.default_rng(seed).permutation(enough)[:identities]] = True
        return _write_chosen(packs, outs[0], first, ~is_unseen & (sizes > 0)), _write_chosen(packs, outs[1], second, is_unseen)


def filtered(source: str | Path, out: str | Path, min_images: int = 1, max_images: int | None = None,
             only: str | Path | None = None, without: str | Path | None = None) -> Repacked:
    """Write the identities of a pack that have so many images, and are in a list or not, numbered anew.

    Args:
        only, without: files with an identity in each line, of the source's numbers; what follows a tab is not read.
    Raises:
        InputError: no identity is left.
        RecordError, OverwriteError: as of ``merge``.
    """
    out = Path(out)
    with new_pack(out, _NAMES) as folder:
        packs = _Packs([source])
        index = packs.datasets[0].index
        sizes = packs.sizes(0)
        chosen = (sizes >= max(1, min_images)) & (sizes <= (np.inf if max_images is None else max_images))
        if only:
            chosen &= np.isin(index.numbers, _read_identities(Path(only), index.numbers))
        if without:
            chosen &= ~np.isin(index.numbers, _read_identities(Path(without), index.numbers))
        if not chosen.any():
            raise InputError(f"{source}: no identity is left of {len(index.numbers)}, which have {sizes.min()} to "
                             f"{sizes.max()} images: ask for less")
        found = _write_chosen(packs, out, folder, chosen)
    found.left_out["of identities that were not asked for"] = int(sizes[~chosen].sum())
    return found


def write_kept(source: str | Path, folder: Path, kept: NDArray[np.bool_], numbers: Int64s) -> None:
    """Write a pack of the images that are kept, bool (images,), and the list of its identities, into ``folder``.

    ``numbers`` (identities,), in the order of ``index.numbers``, are the identities' new numbers, or −1 of those without an
    image.
    """
    packs = _Packs([source], [kept])
    packs.write(folder, packs.named([numbers]), [numbers])


def _write_chosen(packs: _Packs, out: Path, folder: Path, chosen: NDArray[np.bool_]) -> Repacked:
    """The chosen identities (identities,) of the only pack, written into ``folder``, which becomes ``out``."""
    number_of = [np.where(chosen, chosen.cumsum() - 1, -1)]
    images = packs.named(number_of)
    packs.write(folder, images, number_of)
    return Repacked(out, len(images.source), int(chosen.sum()), {UNUSABLE: packs.unusable})


def _merged_numbers(packs: _Packs, same: dict[tuple[int, int], str]) -> list[Int64s]:
    """The new number of each identity of each pack, in the order of their first ones; −1 of those without a usable image.

    ``same`` are names by number of the pack, from 0, and identity.
    """
    found: list[Int64s] = []
    number_of_name: dict[str, int] = {}
    count = 0
    for source, dataset in enumerate(packs.datasets):
        numbers = np.full(len(dataset.index.numbers), -1, np.int64)
        sizes = packs.sizes(source)
        for i, identity in enumerate(dataset.index.numbers.tolist()):
            if not sizes[i]:
                continue
            name = same.get((source, identity))
            if name is None or name not in number_of_name:
                if name is not None:
                    number_of_name[name] = count
                numbers[i] = count
                count += 1
            else:
                numbers[i] = number_of_name[name]
        found.append(numbers)
    return found


def _read_same(path: Path, packs: _Packs) -> dict[tuple[int, int], str]:
    """Names by number of the pack, from 0, and identity."""
    found: dict[tuple[int, int], str] = {}
    for line, words in _lines(path):
        if len(words) < 3 or not (words[0].isdecimal() and words[1].isdecimal()) or not words[2]:
            raise InputError(f"{path}: line {line} is {' '.join(words)[:60]!r}, but must be the number of a pack, an identity "
                             "and a name, separated by tabs")
        source, identity = int(words[0]) - 1, int(words[1])
        if not 0 <= source < len(packs.folders):
            raise InputError(f"{path}: line {line} names pack {words[0]}, but there are packs 1 to {len(packs.folders)}")
        if not len(packs.datasets[source].index.images_of(identity)):
            raise InputError(f"{path}: line {line}: {packs.folders[source]} has no identity {identity}")
        if found.setdefault((source, identity), words[2]) != words[2]:
            raise InputError(f"{path}: line {line}: identity {identity} of pack {words[0]} is {words[2]!r}, and "
                             f"{found[source, identity]!r} in an earlier line: take one out")
    return found


def _read_identities(path: Path, numbers: NDArray[np.int32 | np.int64]) -> Int64s:
    found: list[int] = []
    for line, words in _lines(path):
        if not words[0].isdecimal() or int(words[0]) >= 1 << IDENTITY_BITS:
            raise InputError(f"{path}: line {line} is {words[0][:60]!r}, but must be an identity, a whole number from 0 "
                             f"to below 2**{IDENTITY_BITS}")
        found.append(int(words[0]))
    identities = np.array(found, np.int64)
    if len(unknown := np.setdiff1d(identities, numbers)):
        raise InputError(f"{path}: the pack has no identity {unknown[0]} ({len(unknown)} such lines)")
    return identities


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(number, words between tabs) of the lines that are not empty."""
    if not path.is_file():
        raise RecordError(f"{path}: no such file")
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, [word.strip() for word in line.split("\t")]


def _repeated(packs: _Packs, images: _Images, *keys: NDArray[np.uint64] | Int64s) -> tuple[Int64s, Int64s]:
    """Images whose bytes and keys (images,) an earlier one has, too, ascending, and the first of these, int64 (n,) each.

    One of the keys is a hash of the bytes, which are compared only where all keys are equal.
    """
    order = np.lexsort(keys)  # stable
    same = np.logical_and.reduce([key[order[1:]] == key[order[:-1]] for key in keys])
    first = order[np.maximum.accumulate(np.where(np.append(False, same), 0, np.arange(len(order))))]
    later, earlier = order[1:][same], first[1:][same]
    equal = [packs.image(*images.place(a)) == packs.image(*images.place(b))
             for a, b in zip(later.tolist(), earlier.tolist(), strict=True)]
    later, earlier = later[equal], earlier[equal]
    by_place = np.argsort(later)
    return later[by_place], earlier[by_place]


def _list_duplicates(packs: _Packs, images: _Images, hashes: NDArray[np.uint64], path: Path) -> int:
    """How many there are."""
    def described(image: int) -> str:
        source, position = images.place(image)
        index = packs.datasets[source].index
        return f"{on_one_line(str(packs.folders[source]))}\t{index.keys[position]}\t{index.identity[position]}"

    later, earlier = _repeated(packs, images, hashes)
    if len(later):
        with written_whole(path) as file:
            for pair in zip(later.tolist(), earlier.tolist(), strict=True):
                file.write(("\t".join(map(described, pair)) + "\n").encode())
    return len(later)
