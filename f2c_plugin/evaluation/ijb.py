"""IJB-B and IJB-C, 1:1: are two templates, each of several images of a person, of the same person?"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from tqdm import tqdm

from f2c_plugin.data.dataset import IMAGE_SIZE, Pixels, decode_image
from f2c_plugin.data.template import TEMPLATE, turn_from_template
from f2c_plugin.errors import VerificationSetError
from f2c_plugin.evaluation.accuracy import FARS, tars_at_fars
from f2c_plugin.evaluation.pooling import pooled

_PIXELS = np.arange(IMAGE_SIZE) + 1j * np.arange(IMAGE_SIZE)[:, None]
_SHOWN = 60  # characters of a line that is wrong
_CHUNK = 8192  # pairs scored at a time
Row = TypeVar("Row")


class Crop(NamedTuple):
    """An image in ``loose_crop``, the line that lists it, and its five points, complex (5,)."""

    name: str
    line: int
    points: np.ndarray


@dataclass
class TemplateResult:
    """How well templates separate same from different pairs."""

    protocol: str
    scores: np.ndarray  # cosines, float64 (pairs,)
    same: np.ndarray  # bool (pairs,)
    templates: int
    images: int

    def tars(self) -> list[float | None]:
        """TAR at each of ``FARS``; None where the pairs do not resolve it."""
        return tars_at_fars(self.scores, self.same, FARS)

    def summary(self) -> dict[str, object]:
        tars = {f"{far:.0e}": tar for far, tar in zip(FARS, self.tars(), strict=True)}
        return {"protocol": self.protocol, "images": self.images, "templates": self.templates, "pairs": len(self.same),
                "same_pairs": int(self.same.sum()), "tar_at_far": tars}


class TemplateSet:
    """IJB-B or IJB-C, in a folder as arcface_torch's ``onnx_ijbc.py`` takes it. X is ``ijbb`` or ``ijbc``:

    - ``loose_crop/``, the images;
    - ``meta/X_name_5pts_score.txt``: in each line an image, x and y of five points in it, and the detector's score;
    - ``meta/X_face_tid_mid.txt``: in each line the same image, its template and its media, numbers;
    - ``meta/X_template_pair_label.txt``: in each line two templates, and 1 if they are the same person's, else 0.

    Raises VerificationSetError, which names file and line.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder)
        self._crops = self.path / "loose_crop"
        listed = TemplateSet.lists_in(folder)
        if len(listed) != 1:
            raise VerificationSetError(f"{folder}: must hold one of meta/ijbb_face_tid_mid.txt and meta/ijbc_face_tid_mid.txt")
        target = listed[0].name[:4]
        self.protocol = f"IJB-{target[-1].upper()} 1:1"
        self._faces, pairs = (self.path / "meta" / f"{target}_{name}.txt"
                              for name in ("name_5pts_score", "template_pair_label"))
        for path in self._crops, self._faces, pairs:
            if not path.exists():
                raise VerificationSetError(f"{path} is missing: {self.protocol} needs it")
        self._read_faces(listed[0])
        self._read_pairs(pairs)

    @staticmethod
    def lists_in(folder: str | Path) -> list[Path]:
        """The lists of images and their templates in a folder, by which it is told to be a set."""
        return sorted(Path(folder, "meta").glob("ijb[bc]_face_tid_mid.txt"))

    def _read_faces(self, templates_path: Path) -> None:
        faces = list(_rows(self._faces, _face, "an image, ten coordinates of five points that differ, and a score"))
        templates = list(_rows(templates_path, _image_of_template, "an image and the numbers of its template and media"))
        present = {path.name for path in self._crops.iterdir()}
        for line, (face, template) in enumerate(zip(faces, templates, strict=False), 1):
            if face[0] != template[0]:
                raise VerificationSetError(f"{templates_path}, line {line}: lists {template[0]}, but line {line} of "
                                           f"{self._faces.name} lists {face[0]}: the lists must have the same order")
            if face[0] not in present:
                raise VerificationSetError(f"{self._faces}, line {line}: {face[0]} is not in {self._crops}")
        if len(faces) != len(templates) or not faces:
            raise VerificationSetError(f"{templates_path}: {len(templates)} lines, but {self._faces.name} has {len(faces)}: "
                                       "they must list the same images, one or more")
        self._names = [face[0] for face in faces]
        self._points = np.stack([face[1] for face in faces])
        numbers = np.array([template[1:] for template in templates])  # (n, 2)
        self._templates, rows = np.unique(numbers[:, 0], return_inverse=True)
        _, media, sizes = np.unique(numbers, axis=0, return_inverse=True, return_counts=True)
        self._rows = torch.from_numpy(rows.reshape(-1))
        # The mean over the images of a media, summed over the media of a template.
        self._weights = torch.from_numpy(np.array([face[2] for face in faces]) / sizes[media.reshape(-1)])

    def _read_pairs(self, path: Path) -> None:
        form = "the numbers of two templates, and 1 or 0"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about a list without lines
                pairs = np.loadtxt(path, np.int64, comments=None, ndmin=2, encoding="utf-8-sig")  # many million lines
            if pairs.shape[1] != 3 or not np.isin(pairs[:, 2], (0, 1)).all():
                raise ValueError("it has none")
        except ValueError as error:
            list(_rows(path, _pair, form))  # raises with the line
            raise VerificationSetError(f"{path}: must have {form} in each line: {error}") from error
        places = np.searchsorted(self._templates, pairs[:, :2])
        unknown = self._templates[places.clip(max=len(self._templates) - 1)] != pairs[:, :2]
        if unknown.any():
            line, side = np.argwhere(unknown)[0].tolist()
            raise VerificationSetError(f"{path}, line {line + 1}: template {pairs[line, side]} has no image in the other lists")
        self._pairs, self._same = torch.from_numpy(places.astype(np.int32)), pairs[:, 2] == 1

    def embed(self, net: nn.Module) -> Tensor:
        """Embed the templates with a net that embeds images (B, 3, 112, 112), on all ranks together; float64 (templates, D).

        A face counts as its embedding and its mirror image's, times the detector's score. Their mean over the images of a
        media, summed over the media of a template, is the template's, as in ``onnx_ijbc.py``.
        Raises VerificationSetError if an image cannot be used; F2CError if embeddings are not finite.
        """
        crops = map(Crop, self._names, count(1), self._points)
        return pooled(net, partial(aligned_crop, self._crops, self._faces), crops, self._rows, self._weights, self.path)

    def score(self, embeddings: Tensor) -> TemplateResult:
        """Compare the pairs of templates by cosine, from their embeddings (templates, D)."""
        templates = normalize(embeddings)
        scores = np.empty(len(self._same))
        with tqdm(total=len(scores), desc=f"scoring {self.path.name}", unit=" pairs", disable=None) as bar:
            for begin in range(0, len(scores), _CHUNK):
                first, second = templates[self._pairs[begin:begin + _CHUNK].long().to(templates.device)].unbind(1)
                scores[begin:begin + len(first)] = (first * second).sum(1).cpu()
                bar.update(len(first))
        return TemplateResult(self.protocol, scores, self._same, len(templates), len(self._names))


def _rows(path: Path, read: Callable[[list[str]], Row], form: str) -> Iterator[Row]:
    """What ``read`` makes of the words of each line. Raises VerificationSetError with the first line that it refuses."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                yield read(line.split())
            except (ValueError, OverflowError) as error:
                shown = line.rstrip()
                shown = repr(shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…")
                raise VerificationSetError(f"{path}, line {number}: {shown} must be {form}: {error}") from None


def _face(words: list[str]) -> tuple[str, np.ndarray, float]:
    _check_length(words, 12)
    name, *numbers = words
    for number in numbers:
        if not np.isfinite(float(number)):
            raise ValueError(f"{number!r} is not finite")
    *coordinates, score = map(float, numbers)
    points = np.array(coordinates).reshape(5, 2) @ (1, 1j)
    if not np.ptp(points.real) + np.ptp(points.imag):
        raise ValueError("the points are one")
    return name, points, score


def _image_of_template(words: list[str]) -> tuple[str, int, int]:
    _check_length(words, 3)
    name, template, media = words
    return name, int(np.int64(template)), int(np.int64(media))


def _pair(words: list[str]) -> None:
    _check_length(words, 3)
    _, _, same = map(np.int64, words)
    if same not in (0, 1):
        raise ValueError(f"{same} is neither 1 nor 0")


def _check_length(words: list[str], length: int) -> None:
    if len(words) != length:
        raise ValueError(f"{len(words)} words, not {length}")


def aligned_crop(folder: Path, listed_in: Path, crop: Crop) -> Pixels:
    """The aligned face in a crop, uint8 (112, 112, 3) RGB. Raises VerificationSetError if the file cannot be used."""
    try:
        return warped(decode_image((folder / crop.name).read_bytes()), crop.points)
    except (OSError, ValueError) as error:
        raise VerificationSetError(f"{folder / crop.name} ({listed_in.name}, line {crop.line}): cannot be used: "
                                   f"{error}") from error


def warped(image: Pixels, points: np.ndarray) -> Pixels:
    """Turn, scale and shift an image (H, W, 3) so that its five points, complex (5,), come nearest to ``TEMPLATE``.

    Bilinear without smoothing, and black outside the image, as ``cv2.warpAffine`` does it for ``onnx_ijbc.py``; OpenCV
    before 5 rounds places in the image to 1/32 of a pixel. Returns uint8 (112, 112, 3).
    """
    at = (_PIXELS - TEMPLATE.mean()) * turn_from_template(points) + points.mean()
    height, width, _ = image.shape
    black = np.zeros((height + 2, width + 2, 3), np.float32)
    black[1:-1, 1:-1] = image
    x, y = (at.real + 1).clip(0, width + 1), (at.imag + 1).clip(0, height + 1)
    left, top = x.astype(int).clip(max=width), y.astype(int).clip(max=height)
    right_part, lower_part = (x - left)[..., None], (y - top)[..., None]
    upper, lower = (black[row, left] * (1 - right_part) + black[row, left + 1] * right_part for row in (top, top + 1))
    return np.rint(upper * (1 - lower_part) + lower * lower_part).astype(np.uint8)
