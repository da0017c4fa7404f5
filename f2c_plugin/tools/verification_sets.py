"""Makes verification sets, ``.bin`` files of pairs, from packs or from folders of images."""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.data.writer import refuse_to_overwrite
from f2c_plugin.errors import InputError, RecordError, VerificationSetError
from f2c_plugin.evaluation.accuracy import FOLDS
from f2c_plugin.evaluation.verification import save_bin
from f2c_plugin.tools.image_files import IMAGE_SUFFIXES, storable
from f2c_plugin.tools.pack_sources import walk
from f2c_plugin.utils.paths import require_no_file


class Pair(NamedTuple):
    """Two images, and whether they show the same person. What an image is called depends on where it comes from."""

    first: str
    second: str
    same: bool


class Source(Protocol):
    """Where the images of identities come from."""

    def identities(self) -> list[list[str]]:
        """The images of each identity."""
        ...

    def image(self, name: str) -> bytes:
        """An encoded image of 112 × 112. Raises VerificationSetError if there is none, or it cannot be used."""
        ...


class _Pack:
    """A pack, whose images are called by the numbers of their records."""

    def __init__(self, folder: Path):
        self._dataset = RecordDataset(folder, skip_damaged=True)
        keys = self._dataset.index.keys
        self._order = np.argsort(keys, kind="stable")
        self._sorted = keys[self._order]

    def identities(self) -> list[list[str]]:
        index = self._dataset.index
        return [list(map(str, index.keys[each].tolist())) for each in np.split(index.grouped, index.starts[1:-1])]

    def image(self, name: str) -> bytes:
        position = int(np.searchsorted(self._sorted, int(name))) if name.isdecimal() else len(self._sorted)
        if position == len(self._sorted) or self._sorted[position] != int(name):
            raise VerificationSetError(f"{self._dataset.records.path}: has no image with record number {name!r}")
        position = int(self._order[position])
        self._dataset.face(position)  # decoded, to see that it can be
        return self._dataset.encoded(position)


class _Folder:
    """A folder with a folder for each identity, whose images are called by their paths below it."""

    def __init__(self, folder: Path, resize: bool):
        self._folder, self._resize = folder, resize

    def identities(self) -> list[list[str]]:
        found: dict[str, list[str]] = {}
        for path, reason in walk(self._folder):
            if not reason and Path(path).suffix.lower() in IMAGE_SUFFIXES:
                found.setdefault(Path(path).parts[0], []).append(path)
        return list(found.values())

    def image(self, name: str) -> bytes:
        path = self._folder / name
        if not path.resolve().is_relative_to(self._folder.resolve()):
            raise VerificationSetError(f"{path} is outside {self._folder}")
        found = storable(path, self._resize, None)
        if isinstance(found, str):
            raise VerificationSetError(f"{path}: {found}")
        return found


def source_of(folder: str | Path, resize: bool = False) -> Source:
    """A pack, or else a folder of folders of images, which ``resize`` scales and crops. Raises InputError if it is neither."""
    folder = Path(folder)
    if (folder / "train.rec").is_file():
        return _Pack(folder)
    require_no_file(folder, "the folder of a pack, or one with a folder of images for each identity", "train.rec", InputError)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    return _Folder(folder, resize)


def write_verification_set(source: Source, pairs: Sequence[Pair], out: str | Path) -> None:
    """Write the ``.bin`` of these pairs, whole or not at all.

    Raises:
        VerificationSetError: an image cannot be used; there are fewer pairs than two for each fold, or only same or different
            ones.
        OverwriteError: there is such a file.
    """
    refuse_to_overwrite(Path(out).parent, [Path(out).name])
    if len(pairs) < 2 * FOLDS:
        raise VerificationSetError(f"{len(pairs)} pairs: {2 * FOLDS} or more are needed, two for each of {FOLDS} folds")
    if len({pair.same for pair in pairs}) == 1:
        raise VerificationSetError(f"{len(pairs)} pairs, all {'same' if pairs[0].same else 'different'}: both kinds are needed")
    images: dict[str, bytes] = {}
    names = list(chain.from_iterable(pair[:2] for pair in pairs))
    for name in names:
        if name not in images:
            images[name] = source.image(name)
    save_bin(out, [images[name] for name in names], [pair.same for pair in pairs])


def drawn_pairs(identities: Sequence[Sequence[str]], count: int, seed: int = 0) -> list[Pair]:
    """Random pairs of images of random identities, no two alike. Same and different alternate, so that each fold has both.

    Raises VerificationSetError if there are not so many.
    """
    sizes = np.array([len(images) for images in identities], np.int64)
    left = sizes * (sizes - 1) // 2  # same pairs of each identity that have not been drawn
    different = int(sizes.sum()) ** 2 // 2 - int((sizes * sizes).sum()) // 2
    if count - count // 2 > left.sum() or count // 2 > different:
        raise VerificationSetError(f"{count} pairs, half of them same: {len(sizes)} identities have {left.sum()} same and "
                                   f"{different} different pairs: ask for fewer")
    random = np.random.default_rng(seed)
    chosen: dict[tuple[tuple[int, int], tuple[int, int]], bool] = {}

    def draw(same: bool) -> None:
        identity = int(random.choice(np.flatnonzero(left))) if same else 0
        while True:
            if same:
                both = [(identity, int(image)) for image in random.choice(sizes[identity], 2, replace=False)]
            else:
                both = [(int(each), int(random.integers(sizes[each]))) for each in random.choice(len(sizes), 2, replace=False)]
            first, second = sorted(both)
            pair = first, second
            if pair not in chosen:
                chosen[pair] = same
                left[identity] -= same
                return
    for number in range(count):
        draw(number % 2 == 0)
    return [Pair(identities[a][image], identities[b][other], same) for ((a, image), (b, other)), same in chosen.items()]


def listed_pairs(path: str | Path) -> list[Pair]:
    """The pairs of a list: two images and 1 or 0, same or different, separated by tabs; or LFW's ``pairs.txt``.

    Raises VerificationSetError for a line that is none.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise VerificationSetError(f"{path}: cannot be read: {error}") from error
    if lines and re.fullmatch(r"\d+\s+\d+\s*", lines[0]):
        lfw = LfwPairs(path)
        return [Pair(lfw_file(pair.first), lfw_file(pair.second), pair.same) for pair in lfw.of_folds(range(lfw.num_folds))]
    pairs: list[Pair] = []
    for number, line in enumerate(lines, 1):
        words = [word.strip() for word in line.split("\t")]
        if len(words) == 3 and words[2] in ("0", "1") and words[0] and words[1]:
            pairs.append(Pair(words[0], words[1], words[2] == "1"))
        elif line.strip():
            raise VerificationSetError(f"{path}, line {number}: {line[:60]!r}, but must be two images and 1 or 0, separated by "
                                       "tabs; or the file LFW's pairs.txt")
    if not pairs:
        raise VerificationSetError(f"{path}: lists no pair")
    return pairs


def lfw_file(image: tuple[str, int]) -> str:
    """The path of an image of LFW, by name and number, in its folder."""
    name, number = image
    return f"{name}/{name}_{number:04}.jpg"


class LfwPair(NamedTuple):
    """(name, number of the image) of both, whether they are the same person's, and the line."""

    first: tuple[str, int]
    second: tuple[str, int]
    same: bool
    line: int


class LfwPairs:
    """LFW's ``pairs.txt``. Its first line is the number of folds and that of the pairs of each kind in a fold.

    Raises RecordError if it has not that form.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            header, *self._lines = self.path.read_text(encoding="utf-8-sig").splitlines()
            self.num_folds, self._count = map(int, header.split())
            if not 0 < 2 * self.num_folds * self._count <= len(self._lines):
                raise ValueError(f"{len(self._lines)} pairs for {self.num_folds} folds of {self._count} same and {self._count} "
                                 "different ones")
        except (OSError, ValueError) as error:
            raise RecordError(f"{path}: must be LFW's pairs.txt: {error}") from error

    def of_folds(self, folds: Iterable[int]) -> Iterator[LfwPair]:
        """The pairs fold by fold, from 0; in each, same and different alternate."""
        for fold in folds:
            begin = 2 * self._count * fold  # each fold begins with its same pairs
            for number in range(begin, begin + self._count):
                yield self._pair(number, same=True)
                yield self._pair(number + self._count, same=False)

    def _pair(self, number: int, same: bool) -> LfwPair:
        line = self._lines[number]
        match line.split():
            case [first, one, other] if same and one.isdecimal() and other.isdecimal():
                second = first
            case [first, one, second, other] if not same and one.isdecimal() and other.isdecimal():
                pass
            case _:
                form = "a name and two numbers" if same else "a name and a number, twice"
                raise RecordError(f"{self.path}, line {number + 2}: {line!r} must be {form}")
        return LfwPair((first, int(one)), (second, int(other)), same, number + 2)
