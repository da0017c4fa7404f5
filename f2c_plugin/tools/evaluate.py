"""Evaluates trained and exported models on verification sets and benchmarks."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from f2c_plugin.data.dataset import IMAGE_SIZE
from f2c_plugin.errors import ExportError, F2CError, InputError, VerificationSetError
from f2c_plugin.evaluation.accuracy import FARS, GEOMETRY, tar_text
from f2c_plugin.evaluation.ijb import TemplateResult, TemplateSet
from f2c_plugin.evaluation.onnx_export import load_net
from f2c_plugin.evaluation.onnx_net import OnnxNet
from f2c_plugin.evaluation.recognizability import (
    REJECTED,
    UNRECOGNIZABLE,
    Recognizability,
    check_pairs,
    error_reject,
    recognizability,
)
from f2c_plugin.evaluation.tinyface import RANKS, IdentificationResult, IdentificationSet
from f2c_plugin.evaluation.verification import VerificationResult, VerificationSet, embed
from f2c_plugin.tools.left_out import on_one_line, photos_without_face
from f2c_plugin.utils.atomic import written_whole
from f2c_plugin.utils.distributed import this_rank

Set = VerificationSet | TemplateSet | IdentificationSet
_A_SET = "a set is a .bin file, as f2c-plugin verification-set writes it, or a folder of IJB-B, IJB-C or TinyFace"
_ONE_POINT = 1e-6  # how far apart, in each number, embeddings of norm 1 may be that are all the same
Result = VerificationResult | TemplateResult | IdentificationResult


class Evaluated(NamedTuple):
    """A model on a set; at a resolution, with the pixels of the first and the second image of each pair.

    ``zero`` is the number of embeddings that are 0, of images or templates, of the set as it is.
    """

    name: str
    result: Result
    resolution: tuple[int, int] | None = None
    quality: Recognizability | None = None
    zero: int = 0

    @property
    def label(self) -> str:
        return self.name if self.resolution is None else f"{self.name}, {self.resolution[0]}/{self.resolution[1]} pixels"

    def summary(self) -> dict[str, object]:
        """Metrics; those that the pairs do not resolve are None."""
        found = self.result
        if not isinstance(found, VerificationResult):
            return {"set": self.name, **found.summary(), "zero_embeddings": self.zero}
        geometry = found.geometry()
        return {"set": self.name, **({"resolution": self.resolution} if self.resolution else {}),
                "pairs": len(found.same), "accuracy": found.accuracy, "accuracy_std": found.accuracy_std,
                "tar_at_far": {f"{far:.0e}": found.tar_at_far(far) for far in FARS}, "embedding_norm": found.embedding_norm,
                **{name: geometry.get(name) for name in GEOMETRY}, "zero_embeddings": self.zero,
                **({"recognizability": self.quality.summary()} if self.quality else {})}


def load_model(path: str | Path, which: str = "probe", network: str | None = None) -> nn.Module:
    """A ``model.pt``, a checkpoint or an ``.onnx`` file as a net; on a GPU where there is one, but for ONNX.

    ``which`` and ``network`` as of ``load_net``. Raises ExportError if it is none; F2CError if a package is missing.
    """
    if not Path(path).is_file():
        raise ExportError(f"{path}: no such file")
    if Path(path).suffix.lower() == ".onnx":
        if which != "probe":
            raise InputError(f"--net {which}: only checkpoints hold the gallery net")
        if network is not None:
            raise InputError(f"--network {network}: an ONNX file holds its net: leave it out")
        return OnnxNet(path)
    return load_net(path, which, network).to("cuda" if torch.cuda.is_available() else "cpu")


def open_set(path: str | Path) -> Set:
    """A ``.bin`` file, or a folder of IJB-B, IJB-C or TinyFace, told apart by its files. Raises VerificationSetError."""
    if Path(path).is_dir():
        return TemplateSet(path) if TemplateSet.lists_in(path) else IdentificationSet(path, photos_without_face)
    try:
        return VerificationSet(path)
    except VerificationSetError as error:
        if Path(path).is_file() and Path(path).suffix.lower() != ".bin":
            raise VerificationSetError(f"{error}; {_A_SET}") from error
        raise


def evaluate(model: str | Path, sets: Sequence[str | Path], which: str = "probe", resolutions: Sequence[int] = (),
             quality: bool = False, network: str | None = None, roc: bool = False) -> list[Evaluated]:
    """Evaluate a model: on ``.bin`` sets, accuracy over ten folds and TAR at FAR; on IJB-B and IJB-C, TAR at FAR of pairs of
    templates; on TinyFace, the rate of identification at ranks 1, 5 and 20.

    In a process group all ranks call it together, share the images of the folders, and rank 0 alone returns results.

    Args:
        model: a ``model.pt``, a checkpoint, or an ``.onnx`` file.
        sets: ``.bin`` files, and folders as ``open_set`` tells them apart.
        which: "probe" or "gallery", of a checkpoint.
        resolutions: pixels, at which ``.bin`` sets are evaluated, too: with both images of a pair so (7/7 pixels), and the
            first so and the second as it is (7/112 pixels).
        quality: also find how recognizable the images of ``.bin`` sets are.
        network: the name of the net, where the file does not say it and several fit.
        roc: there must be a set that ``scored_pairs`` takes.
    Raises:
        F2CError: the model or a set cannot be read, or the model's embeddings are not finite, or all the same.
    """
    opened = [open_set(path) for path in sets]
    if roc and all(isinstance(each, IdentificationSet) for each in opened):
        raise InputError("--plot: draws the ROC of pairs, and TinyFace has none")
    if (resolutions or quality) and not all(isinstance(each, VerificationSet) for each in opened):
        raise InputError("--resolutions and --quality: are for .bin sets, not for folders of IJB-B, IJB-C and TinyFace")
    if wrong := [each for each in resolutions if not 0 < each <= IMAGE_SIZE]:
        raise InputError(f"--resolutions {wrong[0]}: must be pixels from 1 to {IMAGE_SIZE}")
    if quality:
        for each in opened:
            check_pairs(each.path, cast(VerificationSet, each).same)
    for each in opened[1:]:  # not after the sets before; the first is decoded at once
        if isinstance(each, VerificationSet):
            each.check()
    names = [each.path.stem if isinstance(each, VerificationSet) else each.path.resolve().name for each in opened]
    net = load_model(model, which, network)
    rank, _ = this_rank()
    found: list[Evaluated] = []
    for each, name in zip(opened, names, strict=True):
        name = name if names.count(name) == 1 else str(each.path)
        if isinstance(each, VerificationSet):
            found += [] if rank else _verified(model, net, each, name, resolutions, quality)
        else:
            embeddings = each.embed(net)
            zero = _zero(embeddings, model, each.path)
            found += [] if rank else [Evaluated(name, each.score(embeddings), zero=zero)]
    return found


def _verified(model: str | Path, net: nn.Module, verification_set: VerificationSet, name: str, resolutions: Sequence[int],
              quality: bool) -> list[Evaluated]:
    """A net on a ``.bin`` set. It is embedded once; once more for each resolution, and for ``quality``."""
    faces = verification_set.faces()

    def embedded(pixels: int | None = None) -> Tensor:  # (2n, 2, D)
        embeddings = embed(net, faces, pixels=pixels)
        if not embeddings.isfinite().all():
            raise F2CError(f"{model}: its embeddings of {verification_set.path} are not finite")
        return embeddings
    sharp = embedded()
    zero = _zero(sharp.sum(1), model, verification_set.path)
    result, found = verification_set.compare(sharp), None
    if quality:
        images = recognizability(sharp.sum(1), embedded(UNRECOGNIZABLE).sum(1))
        found = error_reject(result.scores, result.same, images)
    rows = [Evaluated(name, result, quality=found, zero=zero)]
    for pixels in resolutions:
        low = embedded(pixels)
        rows.append(Evaluated(name, verification_set.compare(low), (pixels, pixels)))
        low[1::2] = sharp[1::2]
        rows.append(Evaluated(name, verification_set.compare(low), (pixels, IMAGE_SIZE)))
    return rows


def _zero(embeddings: Tensor, model: str | Path, name: Path) -> int:
    """How many of the embeddings (n, D), which are finite, are 0.

    Raises F2CError if all are, or all are the same: their scores would say nothing.
    """
    unit = normalize(embeddings)
    if not embeddings.any():
        raise F2CError(f"{model}: all its embeddings of {name} are 0: the net has no weights, or has collapsed in training")
    if len(unit) > 1 and (unit.amax(0) - unit.amin(0)).max() < _ONE_POINT:
        raise F2CError(f"{model}: its embeddings of all images of {name} are the same: the net tells nobody apart. Has it been "
                       "trained, or has it collapsed?")
    return int((embeddings == 0).all(1).sum())


def scored_pairs(found: Sequence[Evaluated]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{name: (cosines, whether same)} of the sets of pairs, as a panel of ``draw_roc``."""
    return {each.label: (each.result.scores, each.result.same) for each in found
            if not isinstance(each.result, IdentificationResult)}


def error_curves(found: Sequence[Evaluated]) -> dict[str, np.ndarray]:
    """{name: false non-match rates} of the sets whose images' recognizability was asked for, for ``draw_roc``."""
    return {each.label: each.quality.fnmr for each in found if each.quality}


def write_quality(found: Sequence[Evaluated], path: str | Path) -> None:
    """Write how recognizable each image is: set, number of the image in it from 0, and recognizability, with tabs between."""
    with written_whole(path) as file:
        file.write(b"set\timage\trecognizability\n")
        for each in found:
            if each.quality:
                file.writelines(f"{each.name}\t{number}\t{value:.6f}\n".encode("utf-8", "surrogateescape")
                                for number, value in enumerate(each.quality.images))


def table(found: Sequence[Evaluated]) -> str:
    """For people: a table for each kind of set. Of ``.bin`` sets, TAR at those FARs that one of them resolves."""
    found = [each._replace(name=on_one_line(each.name)) for each in found]
    pairs = [(each.label, each.result) for each in found if isinstance(each.result, VerificationResult)]
    fars = [far for far in FARS if any(result.tar_at_far(far) is not None for _, result in pairs)]
    tables = [[["set", "pairs", "accuracy", *(f"TAR at {far:.0e}" for far in fars)]],
              [["protocol", "set", "images", "templates", "pairs", *(f"TAR at {far:.0e}" for far in FARS)]],
              [["protocol", "set", "probes", "gallery", *(f"rank-{rank}" for rank in RANKS)]],
              [["FNMR, least recognizable images rejected", "at FAR", *(f"{share:.0%}" for share in REJECTED)]]]
    for name, result in pairs:
        tars = [result.tar_at_far(far) for far in fars]
        tables[0].append([name, f"{len(result.same):,}", f"{result.accuracy:.2%} ± {result.accuracy_std:.2%}",
                          *("" if tar is None else f"{tar:.2%}" for tar in tars)])
    for name, result, _, quality, _ in found:
        if quality:
            rates = [quality.at(share) for share in REJECTED]
            tables[3].append([name, f"{quality.far:.0e}", *("" if rate is None else f"{rate:.2%}" for rate in rates)])
        if isinstance(result, TemplateResult):
            tables[1].append([result.protocol, name, f"{result.images:,}", f"{result.templates:,}", f"{len(result.same):,}",
                              *map(tar_text, result.tars())])
        elif isinstance(result, IdentificationResult):
            tables[2].append([result.protocol, name, f"{len(result.ranks):,}", f"{result.gallery:,}",
                              *(f"{result.rate(rank):.2%}" for rank in RANKS)])
    shown = [_aligned(rows) for rows in [each for each in tables if len(each) > 1] or tables[:1]]
    return "\n\n".join([*shown, *(note for each in found for note in _notes(each))])


def _notes(of: Evaluated) -> Iterator[str]:
    """What makes figures lower than the model would have to be, in lines for people."""
    if of.zero:
        yield f"{of.name}: {of.zero:,} embeddings are 0, and have a cosine of 0 to all others"
    if isinstance(of.result, IdentificationResult) and any(of.result.without_face):
        probes, gallery = of.result.without_face
        yield (f"{of.name}: no face was detected in {probes:,} probes, which count as not found, and in {gallery:,} images of "
               "the gallery, which are not compared")


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) if i else cell.ljust(width)
                               for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows)
