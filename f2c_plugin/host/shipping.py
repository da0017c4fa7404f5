"""Verification of both nets, and which of them ends as ``model.pt`` (``config.f2c_export``)."""

import logging
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import nn

from f2c_plugin.config import ConfigError
from f2c_plugin.head import F2CHead
from f2c_plugin.tools.verification import VerificationResult, VerificationSet

PREFIX = {"probe": "", "gallery": "gallery_"}  # of a net in the names of what is told of it


def verify(nets: dict[str, nn.Module], sets: dict[str, VerificationSet], step: int,
           folder: Path) -> dict[str, dict[str, VerificationResult]]:
    """Verify nets, log their accuracies as arcface_torch does, and keep the scores in ``folder`` for reports.

    Args:
        nets: {"probe" or "gallery": net}.
    Returns:
        {net: {verification set: result}}.
    """
    results = {which: {} for which in nets}
    for which, net in nets.items():
        for name, verification_set in sets.items():
            results[which][name] = result = verification_set.evaluate(net)
            np.savez(folder / f"{PREFIX[which]}{name}_scores.npz", scores=result.scores, same=result.same)
            logging.info("[%s%s][%d]Accuracy-Flip: %.5f+-%.5f  TAR at FAR 1e-3: %.4f  XNorm: %.3f", PREFIX[which], name, step,
                         result.accuracy, result.accuracy_std, result.tar_at_far(1e-3), result.embedding_norm)
    return results


def which_to_ship(export: str, results: dict[str, dict[str, VerificationResult]]) -> str:
    """"probe" or "gallery".

    Args:
        export: ``config.f2c_export``; "best" is the net that is more accurate on the first set.
        results: of ``verify``.
    """
    if export != "best":
        return export
    first = {which: next(iter(of_net.values())) for which, of_net in results.items()}
    return max(first, key=lambda which: (first[which].accuracy, first[which].tar_at_far(1e-3)))


class Shipping:
    """What arcface_torch asks a head for besides the loss: to verify its own net, and for the net to ship.

    Args:
        cfg: the host's config.
        probe_net: not wrapped in DDP.
        head: with the gallery net; without ``health`` it is of a rank that tells nothing.
    Raises:
        ConfigError: ``f2c_export="best"``, and there is nothing to choose by.
    """

    def __init__(self, cfg, probe_net: nn.Module, head: F2CHead):
        self.nets = {"probe": probe_net, "gallery": head.gallery}
        self.head = head
        self.export = cfg.get("f2c_export", "probe")
        self.folder = Path(cfg.get("output") or ".")
        files = [Path(cfg["rec"]) / f"{name}.bin" for name in cfg.get("val_targets", ())]
        self._files = [file for file in files if file.is_file()]  # the host, too, passes over those that are not there
        if self.export == "best" and head.health and not self._files:
            raise ConfigError(f"f2c_export='best', but of val_targets={cfg.get('val_targets')!r} there is none in {cfg['rec']}: "
                              "name a verification set to choose by")

    @cached_property
    def _sets(self):
        return {file.stem: VerificationSet(file) for file in self._files}

    def verify(self, step: int):
        """Verify the gallery net, where the host has verified the probe net."""
        if self.head.health:
            results = verify({"gallery": self.nets["gallery"]}, self._sets, step, self.folder)
            self.head.health.record(step, {f"gallery_{name}": result.accuracy for name, result in results["gallery"].items()})

    def net(self) -> nn.Module:
        """Verify both nets at the end of training, and return that whose weights are to be ``model.pt``."""
        which = which_to_ship(self.export, verify(self.nets, self._sets, self.head.steps, self.folder))
        logging.info("model.pt is the %s net", which)
        return self.nets["probe"] if which == "probe" else self.nets["gallery"].net
