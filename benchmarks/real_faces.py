"""Packs of real faces for `accuracy.py`, from folders of people's images that you have.

    python benchmarks/real_faces.py data/real --from lfw=0.55 celeba=face others --pairs pairs.txt --detector yunet.onnx

Each folder after --from holds one folder of images per person. OUT becomes a training pack with a verification set beside it.
OUT_unseen becomes a pack of the people who are verified, none of whom is in the training pack. With --pairs, LFW's list for the
first folder, they are the people in the pairs of --folds, and the set is lfw.bin. Otherwise a share of the people is drawn, and
so are their pairs, in held_out.bin.

Images of 112×112 count as aligned. In others, --detector looks for faces, and one that is large and near the centre is aligned
to arcface_torch's template. Where none is found, the image is cropped at the centre to the share of its shorter side that
follows the folder's name (by default 1), or left out if "face" follows it. LFW's faces take 0.55.

Folders of the same name are the same person; case does not count, and underscores count as spaces. A name without a letter
means nothing outside its folder after --from. The script cannot know that two names are the same person: where that happens,
the verification sees a person of the training pack.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageOps
from tqdm import tqdm
from worlds import unseen

from f2c_plugin.data.dataset import IMAGE_SIZE
from f2c_plugin.errors import F2CError, InputError, OverwriteError, RecordError, VerificationSetError
from f2c_plugin.evaluation.accuracy import FOLDS
from f2c_plugin.evaluation.verification import save_bin
from f2c_plugin.tools.align import QUALITY, aligned, detector, opencv_without_threads
from f2c_plugin.tools.image_files import storable
from f2c_plugin.tools.pack import pack
from f2c_plugin.tools.pack_sources import Folders
from f2c_plugin.tools.verification_sets import LfwPairs, lfw_file
from f2c_plugin.utils.workers import WorkerPool, worker_pool

FACE = IMAGE_SIZE, IMAGE_SIZE


class Photo(NamedTuple):
    """An image file, and the share of its shorter side to keep where no face is found; None to leave it out there."""

    path: Path
    share: float | None


class Pair(NamedTuple):
    """Two photos, and whether they show the same person."""

    first: Photo
    second: Photo
    same: bool


People = dict[str, list[Photo]]


def folder_and_share(source: str) -> tuple[Path, float | None]:
    """Parse FOLDER or FOLDER=SHARE."""
    folder, text = source.rsplit("=", 1) if "=" in source else (source, "1")
    try:
        share = None if text == "face" else float(text)
    except ValueError:
        share = 0.0
    if share is not None and not 0 < share <= 1:
        raise InputError(f"--from {source}: the share is {text!r}; it must be above 0 and at most 1, or 'face'")
    if not Path(folder).is_dir():
        raise RecordError(f"--from {source}: there is no folder {folder}")
    return Path(folder), share


def people_of(sources: Sequence[str]) -> People:
    """The photos of each person, in the order of the names."""
    people: People = {}
    for number, source in enumerate(sources):
        folder, share = folder_and_share(source)
        found = {person: sorted(file for file in person.rglob("*") if file.is_file() and not file.name.startswith("."))
                 for person in sorted(folder.iterdir()) if person.is_dir() and not person.name.startswith(".")}
        if not any(found.values()):
            raise RecordError(f"--from {source}: must have a folder of images for each person, and has no file in a folder")
        for person, files in found.items():
            if files:
                people.setdefault(name_of(person, number), []).extend(Photo(file, share) for file in files)
    return dict(sorted(people.items()))


def name_of(person: Path, number: int) -> str:
    """The name of a person's folder, the same in all sources; or, if it has no letter, in the source of this number only."""
    name = person.name.replace("_", " ").casefold()
    return name if any(map(str.isalpha, name)) else f"{number}_{name}"


def listed_pairs(path: Path, source: str, folds: Iterable[int] | None) -> list[Pair]:
    """The pairs of these folds of LFW's pairs.txt; None means the first half of them.

    Same and different alternate, as arcface_torch needs both in each tenth of the pairs.
    """
    folder, share = folder_and_share(source)
    try:
        lfw = LfwPairs(path)
    except RecordError as error:
        raise RecordError(f"--pairs {error}") from error
    folds = list(folds or range(-(-lfw.num_folds // 2)))
    if missing := [fold for fold in folds if not 0 <= fold < lfw.num_folds]:
        raise InputError(f"--folds {missing[0]}: {path} has folds from 0 to {lfw.num_folds - 1}")
    pairs = []
    for pair in lfw.of_folds(folds):
        files = [folder / lfw_file(image) for image in (pair.first, pair.second)]
        for file in files:
            if not file.is_file():
                raise RecordError(f"{path}, line {pair.line}: there is no {file}; the first folder of --from must be LFW's")
        pairs.append(Pair(Photo(files[0], share), Photo(files[1], share), pair.same))
    return pairs


def drawn_pairs(people: People, count: int, rng: np.random.Generator) -> list[Pair]:
    """Random pairs of photos. Same and different alternate."""
    everyone, several = list(people.values()), [photos for photos in people.values() if len(photos) > 1]
    if len(everyone) < 2 or not several:
        raise VerificationSetError(f"--held-out draws {len(everyone)} people, {len(several)} of them with several images; "
                                   "pairs need two people, one of them with several: raise it, or give more people")

    def two_of(items: Sequence) -> list:
        return [items[i] for i in rng.choice(len(items), 2, replace=False)]

    def pair(same: bool) -> Pair:
        if same:
            first, second = two_of(several[rng.integers(len(several))])
        else:
            first, second = (photos[rng.integers(len(photos))] for photos in two_of(everyone))
        return Pair(first, second, same)
    return [pair(number % 2 == 0) for number in range(count)]


def face_of(model: Path | None, photo: Photo) -> bytes | str:
    """The face of a photo, an encoded image, or the reason why there is none."""
    try:
        with Image.open(photo.path) as image:
            if image.size == FACE:
                return storable(photo.path, resize=False, quality=QUALITY)
            image = ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # decoders raise almost anything for damaged files
        return f"cannot be decoded: {error}"
    points = detector(model).points(image) if model else None
    if points is not None:
        image = aligned(image, points)
    elif photo.share is not None:
        image = ImageOps.fit(image, FACE, Image.Resampling.LANCZOS, bleed=(1 - photo.share) / 2)
    else:
        return "no face found"
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), QUALITY, "RGB", "444")


class Faces:
    """Writes the faces of photos.

    Attributes:
        left_out: {kind of reason: photos that are in no pack}.
    """

    def __init__(self, pool: WorkerPool, model: Path | None):
        self._pool, self._face_of = pool, partial(face_of, model)
        self.left_out: dict[str, list[Path]] = {}

    def pack(self, people: People, folder: Path) -> People:
        """Write a pack. Returns the photos that are in it."""
        packed: People = {}
        names = [name for name, photos in people.items() for _ in photos]
        with tempfile.TemporaryDirectory(dir=folder.parent) as files:
            for name, (photo, face) in zip(names, self._faces(list(chain(*people.values())), folder.name), strict=True):
                if isinstance(face, str):
                    self.left_out.setdefault(face.partition(":")[0], []).append(photo.path)
                    continue
                photos = packed.setdefault(name, [])
                file = Path(files, name, f"{len(photos):08}")
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(face)
                photos.append(photo)
            if not packed:
                raise RecordError("\n  ".join([f"{folder.name}: no image of its {len(people)} people: give more people",
                                               *self.report()]))
            pack(Folders(files), folder, processes=1)
        return packed

    def verification_set(self, pairs: Sequence[Pair], path: Path) -> None:
        """Write the verification set of these pairs."""
        photos = list(chain.from_iterable(pair[:2] for pair in pairs))
        faces: dict[Photo, bytes] = {}
        for photo, face in self._faces(list(dict.fromkeys(photos)), path.name):
            if isinstance(face, str):
                raise VerificationSetError(f"{photo.path}: {face}, but pairs need it: mend it, or crop to a share")
            faces[photo] = face
        save_bin(path, [faces[photo] for photo in photos], [pair.same for pair in pairs])

    def report(self) -> list[str]:
        """A line for each kind of reason to leave photos out."""
        return [f"{len(paths)} left out: {reason}, like {paths[0]}" for reason, paths in self.left_out.items()]

    def _faces(self, photos: Sequence[Photo], what: str) -> Iterator[tuple[Photo, bytes | str]]:
        made = self._pool.imap(self._face_of, photos, 16)
        return zip(photos, tqdm(made, what, len(photos), unit=" images", disable=None), strict=True)


def write(arguments: argparse.Namespace) -> None:
    """Write both packs, or neither, and print what is in them."""
    out, rng = arguments.out, np.random.default_rng(arguments.seed)
    for folder in out, unseen(out):
        if os.path.lexists(folder):
            raise OverwriteError(f"{folder} exists and is not overwritten: choose another folder or remove it")
    people = people_of(arguments.sources)
    pairs = arguments.pairs and listed_pairs(arguments.pairs, arguments.sources[0], arguments.folds)
    if pairs:
        held_out = {name_of(photo.path.parent, 0) for pair in pairs for photo in pair[:2]}
    else:
        held_out = set(rng.permutation(list(people))[:round(arguments.held_out * len(people))].tolist())

    def some(held: bool, most: int) -> People:
        return {name: [photos[i] for i in np.sort(rng.permutation(len(photos))[:most])]
                for name, photos in people.items() if (name in held_out) == held}
    out.parent.mkdir(parents=True, exist_ok=True)
    with (tempfile.TemporaryDirectory(prefix=".real-faces-", dir=out.parent) as work,
          opencv_without_threads() if arguments.detector else nullcontext(), worker_pool(arguments.processes) as pool):
        training, verification = Path(work, "training"), Path(work, "verification")
        faces = Faces(pool, arguments.detector)
        packs = {unseen(out): faces.pack(some(True, arguments.most[1]), verification)}
        pairs = pairs or drawn_pairs(packs[unseen(out)], arguments.num_pairs, rng)
        packs[out] = faces.pack(some(False, arguments.most[0]), training)
        faces.verification_set(pairs, training / ("lfw.bin" if arguments.pairs else "held_out.bin"))
        verification.rename(unseen(out))
        training.rename(out)
    for folder, packed in packs.items():
        sizes = np.array([len(photos) for photos in packed.values()])
        print(f"{folder}: {sizes.sum()} images of {len(sizes)} people, {(sizes == 1).mean():.0%} of them with one image")
    print("\n".join([f"{len(pairs)} pairs to verify on", *faces.report()]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--from", dest="sources", nargs="+", required=True, metavar="FOLDER[=SHARE]")
    parser.add_argument("--detector", type=Path, metavar="FILE", help="YuNet or SCRFD in ONNX")
    parser.add_argument("--pairs", type=Path, metavar="FILE", help="LFW's pairs.txt, for the first folder")
    parser.add_argument("--folds", type=int, nargs="+", help="of --pairs to verify on, from 0; by default the first half")
    parser.add_argument("--held-out", type=float, default=0.1, metavar="SHARE", help="of the people, without --pairs")
    parser.add_argument("--num-pairs", type=int, default=3000, help="to draw, without --pairs")
    parser.add_argument("--most", type=int, nargs=2, default=[100, 20], metavar=("TRAINING", "UNSEEN"),
                        help="images of a person; if there are more, they are drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int)
    arguments = parser.parse_args()
    if not 0 < arguments.held_out < 1:
        parser.error(f"--held-out {arguments.held_out}: must be above 0 and below 1")
    if arguments.num_pairs < 2 * FOLDS:
        parser.error(f"--num-pairs {arguments.num_pairs}: must be at least {2 * FOLDS}")
    if min(arguments.most) < 1:
        parser.error(f"--most {arguments.most}: must be at least 1")
    if not arguments.detector and (source := next((each for each in arguments.sources if each.endswith("=face")), None)):
        parser.error(f"--from {source}: needs --detector")
    try:
        write(arguments)
    except F2CError as error:
        sys.exit(f"{parser.prog}: {error}")


if __name__ == "__main__":
    main()
