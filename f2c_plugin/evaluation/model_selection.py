"""Verifies both nets and selects the one that becomes ``model.pt`` (``config.f2c_export``)."""

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import nn

from f2c_plugin.evaluation.accuracy import tar_text
from f2c_plugin.evaluation.verification import VerificationResult, VerificationSet
from f2c_plugin.utils.atomic import written_whole

log = logging.getLogger(__name__)
PREFIX = {"probe": "", "gallery": "gallery_"}  # for the names of a net's scores and scalars
Results = dict[str, dict[str, VerificationResult]]  # {net: {verification set: result}}


def verify(nets: Mapping[str, nn.Module], sets: Mapping[str, VerificationSet], step: int, folder: Path) -> Results:
    """Verify nets, log their accuracies as arcface_torch does, and save the scores in ``folder`` for reports."""
    results: Results = {which: {} for which in nets}
    for which, net in nets.items():
        for name, verification_set in sets.items():
            results[which][name] = result = verification_set.evaluate(net)
            try:
                with written_whole(folder / f"{PREFIX[which]}{name}_scores.npz") as file:
                    np.savez(file, scores=result.scores, same=result.same)
            except OSError as error:  # no reason to end a training
                log.warning("the scores are not saved: %s", error)
            geometry = "".join(f"  {metric}: {value:.4f}" for metric, value in result.geometry().items())
            log.info("[%s%s][%d]Accuracy-Flip: %.5f+-%.5f  TAR at FAR 1e-3: %s  XNorm: %.3f%s", PREFIX[which], name, step,
                     result.accuracy, result.accuracy_std, tar_text(result.tar_at_far(1e-3)), result.embedding_norm, geometry)
    return results


def select_net(export: str, results: Results) -> str:
    """Select "probe" or "gallery" by ``config.f2c_export``: "best" is the net with the higher accuracy on the first set."""
    if export != "best":
        return export
    first = {which: next(iter(of_net.values())) for which, of_net in results.items()}
    return max(first, key=lambda which: (first[which].accuracy, first[which].tar_at_far(1e-3) or 0.0))
