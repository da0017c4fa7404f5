"""Which net of an F²C training ends as ``model.pt`` (``config.f2c_export``), and the verification that tells."""

import logging
from pathlib import Path

from torch import nn

from f2c_plugin.health import Health
from f2c_plugin.tools.verification import VerificationResult, VerificationSet


def to_ship(export: str, results: dict[str, dict[str, VerificationResult]]) -> str:
    """Which net to ship, "probe" or "gallery".

    Args:
        export: ``config.f2c_export``, "best" for the one that is more accurate on the first set.
        results: {net: {verification set: result}}.
    """
    if export != "best":
        return export
    first = {which: next(iter(of_net.values())) for which, of_net in results.items()}
    return max(first, key=lambda which: (first[which].accuracy, first[which].tar_at_far(1e-3)))


class Shipping:
    """What arcface_torch asks a head for besides the loss: to verify its own net, and for the net to ship.

    The host verifies the probe net itself.

    Args:
        cfg: the host's config.
        probe_net: not wrapped in DDP.
        gallery: the GalleryNet.
        health: where the accuracies are written; None on ranks that tell nothing.
    """

    def __init__(self, cfg, probe_net: nn.Module, gallery: nn.Module, health: Health | None):
        self.export = cfg.get("f2c_export", "probe")
        self.nets = {"probe": probe_net, "gallery": gallery}
        self.health = health
        self._files = [Path(cfg["rec"]) / f"{name}.bin" for name in cfg.get("val_targets", ())]
        self._sets: dict[str, VerificationSet] | None = None

    def _results(self, which):
        if self._sets is None:  # as the host, which passes over those that are not there
            self._sets = {file.stem: VerificationSet(file) for file in self._files if file.is_file()}
        return {name: verification_set.evaluate(self.nets[which]) for name, verification_set in self._sets.items()}

    def verify(self, step: int):
        """Log the gallery net's accuracy on every set of ``val_targets``, on rank 0, where the host does so of the probe net."""
        if not self.health:
            return
        results = self._results("gallery")
        for name, result in results.items():
            logging.info("[gallery_%s][%d]Accuracy-Flip: %.5f+-%.5f", name, step, result.accuracy, result.accuracy_std)
        self.health.record(step, {f"gallery_{name}": result.accuracy for name, result in results.items()})

    def net(self) -> nn.Module:
        """The net whose weights are to be ``model.pt`` when training ends."""
        results = {which: self._results(which) for which in self.nets} if self.export == "best" else {}
        if self.export == "best" and not self._sets:
            logging.warning("f2c_export='best', but of val_targets none is in the pack's folder: model.pt is the probe net")
            return self.nets["probe"]
        which = to_ship(self.export, results)
        logging.info("model.pt is the %s net", which)
        return self.nets["probe"] if which == "probe" else self.nets["gallery"].net
