"""Makes verification sets, ``.bin`` files of pairs, from packs or from folders of images."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.data.writer import refuse_to_overwrite
from f2c_plugin.errors import InputError, RecordError, VerificationSetError
from f2c_plugin.evaluation.accuracy import FOLDS
from f2c_plugin.evaluation.verification import check_folds, save_bin
from f2c_plugin.tools.image_files import IMAGE_SUFFIXES, storable
from f2c_plugin.tools.left_out import LEFT_OUT, LeftOut, on_one_line
from f2c_plugin.tools.pack_sources import walk
from f2c_plugin.utils.atomic import written_whole
from f2c_plugin.utils.paths import require_no_file

_MOST_NAMED = 20  # images of a list that cannot be used


class Pair(NamedTuple):
    """Two images, and whether they show the same person. What an image is called depends on where it comes from."""

    first: str
    second: str
    same: bool


class Source:
    """Where the images of identities come from. Each image is read once."""

    def __init__(self) -> None:
        self._read: dict[str, bytes | str] = {}

    def identities(self) -> list[list[str]]:
        """The images of each identity. Raises VerificationSetError if there is none."""
        raise NotImplementedError

    def image(self, name: str) -> bytes | str:
        """An encoded image of 112 × 112; or why there is none: "kind of reason" or "kind of reason: detail"."""
        if name not in self._read:
            self._read[name] = self._image(name)
        return self._read[name]

    def _image(self, name: str) -> bytes | str:
        raise NotImplementedError


class _Pack(Source):
    """A pack, whose images are called by the numbers of their records."""

    def __init__(self, folder: Path):
        super().__init__()
        self._dataset = RecordDataset(folder, skip_damaged=True)
        keys = self._dataset.index.keys
        self._order = np.argsort(keys, kind="stable")
        self._sorted = keys[self._order]

    def identities(self) -> list[list[str]]:
        index = self._dataset.index
        return [list(map(str, index.keys[each].tolist())) for each in np.split(index.grouped, index.starts[1:-1])]

    def _image(self, name: str) -> bytes | str:
        position = int(np.searchsorted(self._sorted, int(name))) if name.isdecimal() else len(self._sorted)
        if position == len(self._sorted) or self._sorted[position] != int(name):
            return f"{self._dataset.records.path} has no image with this record number"
        position = int(self._order[position])
        try:
            self._dataset.face(position)  # decoded, to see that it can be
            return self._dataset.encoded(position)
        except RecordError as error:
            return f"a record that cannot be used: {error}"


class _Folder(Source):
    """A folder with a folder for each identity, whose images are called by their paths below it."""

    def __init__(self, folder: Path, resize: bool):
        super().__init__()
        self._folder, self._resize = folder, resize

    def identities(self) -> list[list[str]]:
        found: dict[str, list[str]] = {}
        for path, reason in walk(self._folder):
            if not reason and Path(path).suffix.lower() in IMAGE_SUFFIXES:
                found.setdefault(Path(path).parts[0], []).append(path)
        if not found:
            raise VerificationSetError(f"{self._folder}: has no folder with images: it must hold train.rec, or a folder of "
                                       "images for each identity")
        return list(found.values())

    def _image(self, name: str) -> bytes | str:
        path = self._folder / name
        if not path.resolve().is_relative_to(self._folder.resolve()):
            return f"is outside {self._folder}"
        return storable(path, self._resize, None)


def source_of(folder: str | Path, resize: bool = False) -> Source:
    """A pack, or else a folder of folders of images, which ``resize`` scales and crops. Raises InputError if it is neither."""
    folder = Path(folder)
    if (folder / "train.rec").is_file():
        if resize:
            raise InputError(f"--resize: is for folders of images, and {folder} is a pack: its images have one size")
        return _Pack(folder)
    require_no_file(folder, "the folder of a pack, or one with a folder of images for each identity", "train.rec", InputError)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    return _Folder(folder, resize)


class Made(LeftOut):
    """A verification set, and what was left out before its pairs were drawn.

    Attributes:
        pairs, same: how many there are.
    """

    def __init__(self, out: Path, pairs: Sequence[Pair]):
        super().__init__(out, left_out_of(out))
        self.pairs, self.same = len(pairs), sum(pair.same for pair in pairs)

    def report(self) -> str:
        """In lines for people."""
        return "\n".join([f"{self.out}: {self.pairs} pairs, {self.same} same", *self.lines()])


def left_out_of(out: Path) -> Path:
    """The list of what was left out of a verification set."""
    return out.with_name(f"{out.stem}.{LEFT_OUT}")


def drawn_set(source: Source, out: str | Path, count: int, seed: int = 0) -> Made:
    """Write the ``.bin`` of pairs that ``drawn_pairs`` draws, whole or not at all.

    Images that cannot be used are left out; ``left_out_of(out)`` names those that were met and says why.

    Raises:
        InputError: ``count`` is below two for each fold.
        VerificationSetError: there are not so many pairs.
        OverwriteError: there is such a file.
    """
    out = Path(out)
    refuse_to_overwrite(out.parent, [out.name, left_out_of(out).name])
    if count < 2 * FOLDS:
        raise InputError(f"--pairs {count}: must be {2 * FOLDS} or more, two for each of {FOLDS} folds")
    unusable: dict[str, str] = {}
    pairs = drawn_pairs(source.identities(), count, seed, source, unusable)
    made = Made(out, pairs)
    listed = [made.leave_out(name, reason) for name, reason in unusable.items()]
    _write(source, pairs, out)
    if listed:
        with written_whole(left_out_of(out)) as file:
            file.writelines(listed)
    return made


def listed_set(source: Source, out: str | Path, listed: str | Path) -> Made:
    """Write the ``.bin`` of the pairs of a list, as ``listed_pairs`` reads it, in its order, whole or not at all.

    Raises:
        VerificationSetError: images cannot be used; there are fewer pairs than two for each fold, or a fold without both kinds.
        OverwriteError: there is such a file.
    """
    pairs, out = listed_pairs(listed), Path(out)
    refuse_to_overwrite(out.parent, [out.name])
    if len(pairs) < 2 * FOLDS:
        raise VerificationSetError(f"{listed}: {len(pairs)} pairs: {2 * FOLDS} or more are needed, two for each of {FOLDS} "
                                   "folds")
    check_folds(listed, [pair.same for pair in pairs])
    names = dict.fromkeys(chain.from_iterable(pair[:2] for pair in pairs))
    unusable = {name: reason for name in names if isinstance(reason := source.image(name), str)}
    if unusable:
        shown = [f"{on_one_line(name)}: {on_one_line(reason)}" for name, reason in islice(unusable.items(), _MOST_NAMED)]
        more = [f"and {len(unusable) - len(shown)} more"] if len(unusable) > len(shown) else []
        raise VerificationSetError("\n  ".join([
            f"{listed}: {len(unusable)} of its {len(names)} images cannot be used. Replace them, or take their pairs out of "
            "the list; --resize also takes other sizes from folders:", *shown, *more]))
    _write(source, pairs, out)
    return Made(out, pairs)


def _write(source: Source, pairs: Sequence[Pair], out: Path) -> None:
    images = [source.image(name) for name in chain.from_iterable(pair[:2] for pair in pairs)]
    save_bin(out, cast(list[bytes], images), [pair.same for pair in pairs])


def drawn_pairs(identities: Sequence[Sequence[str]], count: int, seed: int = 0, source: Source | None = None,
                unusable: dict[str, str] | None = None) -> list[Pair]:
    """Random pairs of images of random identities, no two alike. Same and different alternate, so that each fold has both.

    Args:
        source: if given, images that cannot be used are left out as they are met, and the draw is repeated. So the pairs are
            those that are drawn without it, if none is.
        unusable: takes their names, with the reasons.
    Raises:
        VerificationSetError: there are not so many pairs.
    """
    unusable = {} if unusable is None else unusable
    people = list(identities)
    sizes = np.array([len(images) for images in people], np.int64)
    left = sizes * (sizes - 1) // 2  # same pairs of each identity that have not been drawn
    different = int(sizes.sum()) ** 2 // 2 - int((sizes * sizes).sum()) // 2  # likewise
    random = np.random.default_rng(seed)
    chosen: dict[tuple[str, str], bool] = {}

    def require_enough() -> None:
        """Those that are drawn and those that are left must be as many as asked for."""
        drawn_same = sum(chosen.values())
        same_pairs, others = int(left.sum()) + drawn_same, different + len(chosen) - drawn_same
        if count - count // 2 > same_pairs or count // 2 > others:
            without = f", without {len(unusable)} images that cannot be used ({_first_reason(unusable)})" if unusable else ""
            raise VerificationSetError(f"{count} pairs, half of them same: {len(sizes)} identities have {same_pairs} same and "
                                       f"{others} different pairs{without}: ask for fewer")

    def leave_out(identity: int, image: int) -> None:
        nonlocal sizes, left, different
        others = int(sizes[identity]) - 1
        different -= int(sizes.sum()) - others - 1
        left[identity] -= others  # none of them is drawn, for it would have been seen before
        sizes[identity] = others
        people[identity] = [*people[identity][:image], *people[identity][image + 1:]]
        if not others:
            del people[identity]
            sizes, left = np.delete(sizes, identity), np.delete(left, identity)
        require_enough()

    def usable(pair: Sequence[tuple[int, int]]) -> bool:
        for identity, image in pair:
            name = people[identity][image]
            if source and isinstance(reason := source.image(name), str):
                unusable[name] = reason
                leave_out(identity, image)
                return False
        return True

    def draw(same: bool) -> None:
        nonlocal different
        while True:
            identity = int(random.choice(np.flatnonzero(left))) if same else 0
            while True:
                if same:
                    both = [(identity, int(image)) for image in random.choice(sizes[identity], 2, replace=False)]
                else:
                    both = [(int(each), int(random.integers(sizes[each])))
                            for each in random.choice(len(sizes), 2, replace=False)]
                (first, image), (second, other) = sorted(both)
                pair = people[first][image], people[second][other]
                if pair in chosen:
                    continue
                if not usable(both):
                    break  # numbers of identities have changed
                chosen[pair] = same
                left[identity] -= same
                different -= not same
                return
    require_enough()
    for number in range(count):
        draw(number % 2 == 0)
    return [Pair(*pair, same) for pair, same in chosen.items()]


def _first_reason(unusable: Mapping[str, str]) -> str:
    name, reason = next(iter(unusable.items()))
    return on_one_line(f"{name}: {reason}")


def listed_pairs(path: str | Path) -> list[Pair]:
    """The pairs of a list: two images and 1 or 0, same or different, separated by tabs; or LFW's ``pairs.txt``, fold by fold,
    same and different in turn.

    Raises VerificationSetError for a line that is none.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise VerificationSetError(f"{path}: cannot be read: {error}") from error
    if lines and re.fullmatch(r"\d+\s+\d+\s*", lines[0]):
        try:
            lfw = LfwPairs(path)
            return [Pair(lfw_file(pair.first), lfw_file(pair.second), pair.same) for pair in lfw.of_folds(range(lfw.num_folds))]
        except RecordError as error:
            raise VerificationSetError(f"{error}. Its first line has two numbers, as in LFW's file: if it is a list of pairs, "
                                       "each line must be two images and 1 or 0, separated by tabs") from error
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
