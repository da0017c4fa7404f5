"""Evaluates trained and exported models on verification sets."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from f2c_plugin.errors import ExportError, F2CError, InputError
from f2c_plugin.evaluation.onnx_export import load_net
from f2c_plugin.evaluation.onnx_net import OnnxNet
from f2c_plugin.evaluation.verification import FARS, VerificationResult, VerificationSet


class Evaluated(NamedTuple):
    """A model on a verification set."""

    name: str
    result: VerificationResult

    def summary(self) -> dict[str, object]:
        """Metrics; those that the pairs do not resolve are None."""
        found = self.result
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


def evaluate(model: str | Path, sets: Sequence[str | Path], which: str = "probe") -> list[Evaluated]:
    """Verify a model on ``.bin`` sets: accuracy over ten folds, and TAR at FAR.

    Args:
        model: a ``model.pt``, a checkpoint, or an ``.onnx`` file.
        sets: files.
        which: "probe" or "gallery", of a checkpoint.
    Raises:
        F2CError: the model or a set cannot be read, or the model's embeddings are not finite.
    """
    opened = [VerificationSet(path) for path in sets]
    stems = [each.path.stem for each in opened]
    net = load_model(model, which)
    found: list[Evaluated] = []
    for each in opened:
        result = each.evaluate(net)
        if not np.isfinite(result.scores).all():
            raise F2CError(f"{model}: its embeddings of {each.path} are not finite")
        found.append(Evaluated(each.path.stem if stems.count(each.path.stem) == 1 else str(each.path), result))
    return found


def table(found: Sequence[Evaluated]) -> str:
    """For people. TAR at those FARs that a set resolves."""
    fars = [far for far in FARS if any(each.result.tar_at_far(far) is not None for each in found)]
    rows = [["set", "pairs", "accuracy", *(f"TAR at {far:.0e}" for far in fars)]]
    for name, result in found:
        tars = [result.tar_at_far(far) for far in fars]
        rows.append([name, f"{len(result.same):,}", f"{result.accuracy:.2%} ± {result.accuracy_std:.2%}",
                     *("" if tar is None else f"{tar:.2%}" for tar in tars)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) if i else cell.ljust(width)
                               for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows)
