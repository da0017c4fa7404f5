"""Evaluates trained and exported models on verification sets and benchmarks."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from f2c_plugin.errors import ExportError, F2CError, InputError
from f2c_plugin.evaluation.ijb import TemplateResult, TemplateSet
from f2c_plugin.evaluation.onnx_export import load_net
from f2c_plugin.evaluation.onnx_net import OnnxNet
from f2c_plugin.evaluation.tinyface import RANKS, IdentificationResult, IdentificationSet
from f2c_plugin.evaluation.verification import FARS, VerificationResult, VerificationSet, tar_text
from f2c_plugin.tools.left_out import on_one_line
from f2c_plugin.utils.distributed import this_rank

Set = VerificationSet | TemplateSet | IdentificationSet
Result = VerificationResult | TemplateResult | IdentificationResult


class Evaluated(NamedTuple):
    """A model on a set."""

    name: str
    result: Result

    def summary(self) -> dict[str, object]:
        """Metrics; those that the pairs do not resolve are None."""
        found = self.result
        if not isinstance(found, VerificationResult):
            return {"set": self.name, **found.summary()}
        return {"set": self.name, "pairs": len(found.same), "accuracy": found.accuracy, "accuracy_std": found.accuracy_std,
                "tar_at_far": {f"{far:.0e}": found.tar_at_far(far) for far in FARS}, "embedding_norm": found.embedding_norm}


def load_model(path: str | Path, which: str = "probe") -> nn.Module:
    """A ``model.pt``, a checkpoint or an ``.onnx`` file as a net; on a GPU where there is one, but for ONNX.

    Raises ExportError if it is none; F2CError if a package is missing.
    """
    if not Path(path).is_file():
        raise ExportError(f"{path}: no such file")
    if Path(path).suffix.lower() == ".onnx":
        if which != "probe":
            raise InputError(f"--net {which}: only checkpoints hold the gallery net")
        return OnnxNet(path)
    return load_net(path, which).to("cuda" if torch.cuda.is_available() else "cpu")


def open_set(path: str | Path) -> Set:
    """A ``.bin`` file, or a folder of IJB-B, IJB-C or TinyFace, told apart by its files. Raises VerificationSetError."""
    if not Path(path).is_dir():
        return VerificationSet(path)
    return TemplateSet(path) if TemplateSet.lists_in(path) else IdentificationSet(path)


def evaluate(model: str | Path, sets: Sequence[str | Path], which: str = "probe") -> list[Evaluated]:
    """Evaluate a model: on ``.bin`` sets, accuracy over ten folds and TAR at FAR; on IJB-B and IJB-C, TAR at FAR of pairs of
    templates; on TinyFace, the rate of identification at ranks 1, 5 and 20.

    In a process group all ranks call it together, share the images of the folders, and rank 0 alone returns results.

    Args:
        model: a ``model.pt``, a checkpoint, or an ``.onnx`` file.
        sets: ``.bin`` files, and folders as ``open_set`` tells them apart.
        which: "probe" or "gallery", of a checkpoint.
    Raises:
        F2CError: the model or a set cannot be read, or the model's embeddings are not finite.
    """
    opened = [open_set(path) for path in sets]
    names = [each.path.stem if isinstance(each, VerificationSet) else each.path.resolve().name for each in opened]
    net = load_model(model, which)
    rank, _ = this_rank()
    found: list[Evaluated] = []
    for each, name in zip(opened, names, strict=True):
        if isinstance(each, VerificationSet):
            result = None if rank else each.evaluate(net)
            if result and not np.isfinite(result.scores).all():
                raise F2CError(f"{model}: its embeddings of {each.path} are not finite")
        else:
            embeddings = each.embed(net)
            result = None if rank else each.score(embeddings)
        if result:
            found.append(Evaluated(name if names.count(name) == 1 else str(each.path), result))
    return found


def scored_pairs(found: Sequence[Evaluated]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{name: (cosines, whether same)} of the sets of pairs, as a panel of ``draw_roc``. Raises InputError if there is none."""
    pairs = {name: (result.scores, result.same) for name, result in found if not isinstance(result, IdentificationResult)}
    if not pairs:
        raise InputError("--plot: draws the ROC of pairs, and TinyFace has none")
    return pairs


def table(found: Sequence[Evaluated]) -> str:
    """For people: a table for each kind of set. Of ``.bin`` sets, TAR at those FARs that one of them resolves."""
    found = [each._replace(name=on_one_line(each.name)) for each in found]
    pairs = [(name, result) for name, result in found if isinstance(result, VerificationResult)]
    fars = [far for far in FARS if any(result.tar_at_far(far) is not None for _, result in pairs)]
    tables = [[["set", "pairs", "accuracy", *(f"TAR at {far:.0e}" for far in fars)]],
              [["protocol", "set", "images", "templates", "pairs", *(f"TAR at {far:.0e}" for far in FARS)]],
              [["protocol", "set", "probes", "gallery", *(f"rank-{rank}" for rank in RANKS)]]]
    for name, result in pairs:
        tars = [result.tar_at_far(far) for far in fars]
        tables[0].append([name, f"{len(result.same):,}", f"{result.accuracy:.2%} ± {result.accuracy_std:.2%}",
                          *("" if tar is None else f"{tar:.2%}" for tar in tars)])
    for name, result in found:
        if isinstance(result, TemplateResult):
            tables[1].append([result.protocol, name, f"{result.images:,}", f"{result.templates:,}", f"{len(result.same):,}",
                              *map(tar_text, result.tars())])
        elif isinstance(result, IdentificationResult):
            tables[2].append([result.protocol, name, f"{len(result.ranks):,}", f"{result.gallery:,}",
                              *(f"{result.rate(rank):.2%}" for rank in RANKS)])
    return "\n\n".join(_aligned(rows) for rows in [each for each in tables if len(each) > 1] or tables[:1])


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) if i else cell.ljust(width)
                               for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows)
