"""The head as arcface_torch's training script calls it."""

import logging
from pathlib import Path

from torch import nn

from f2c_plugin.config import Config, F2CConfig
from f2c_plugin.errors import ConfigError
from f2c_plugin.evaluation.model_selection import select_net, verify
from f2c_plugin.evaluation.monitor import Monitor
from f2c_plugin.evaluation.verification import VerificationSet
from f2c_plugin.method.dcq import DCQHead
from f2c_plugin.method.gallery import GalleryNet
from f2c_plugin.method.head import F2CHead
from f2c_plugin.method.pool_head import PoolHead
from f2c_plugin.method.resident_head import ResidentHead
from f2c_plugin.utils.distributed import this_rank

log = logging.getLogger(__name__)


class ArcFaceTorchHead(PoolHead):
    """A head with ``verify`` and ``select_net``, which ``train_v2.py`` with patch 0001 calls on rank 0."""

    def configure(self, cfg: Config, settings: F2CConfig, total_steps: int) -> None:
        """Take what the head does beside the loss from the config.

        Raises ConfigError if "best" has nothing to choose by, VerificationSetError for sets that cannot be read.
        """
        self.export = settings.export
        output = cfg.get("output")
        self.folder = Path(output or ".")
        files = [Path(cfg["rec"]) / f"{name}.bin" for name in cfg.get("val_targets", ())]
        if this_rank()[0] != 0:
            return
        # arcface_torch skips missing ones, too, and its load_bin, which is ours, decodes the images of the others.
        self.verification_sets = {file.stem: VerificationSet(file) for file in files if file.is_file()}
        if self.export == "best" and not self.verification_sets:
            raise ConfigError(f"f2c_export='best', but of val_targets={cfg.get('val_targets')!r} there is none in "
                              f"{cfg['rec']}: name a verification set to choose by")
        # Beside arcface_torch's own log.
        self.monitor = Monitor(cfg.get("frequent", 10), total_steps, self.folder / "tensorboard" if output else None,
                               settings.max_bad_steps)

    def verify(self, step: int) -> None:
        """Verify the gallery net, if there is one, after arcface_torch has verified the probe net."""
        if isinstance(self.monitor, Monitor) and "gallery" in self.nets:
            results = verify({"gallery": self.nets["gallery"]}, self.verification_sets, step, self.folder)
            for name, result in results["gallery"].items():
                geometry = {f"gallery_{name}/{metric}": value for metric, value in result.geometry().items()}
                self.monitor.record(step, {f"gallery_{name}": result.accuracy, **geometry})

    def select_net(self) -> nn.Module:
        """Verify the nets at the end of training, and return the one whose weights become ``model.pt``."""
        which = select_net(self.export, verify(self.nets, self.verification_sets, self.steps, self.folder))
        log.info("model.pt is the %s net", which)
        net = self.nets[which]
        return net.net if isinstance(net, GalleryNet) else net


class ArcFaceTorchResidentHead(ArcFaceTorchHead, ResidentHead):
    """The head of the recipe "resident" in arcface_torch."""


class ArcFaceTorchF2CHead(ArcFaceTorchHead, F2CHead):
    """The published head in arcface_torch."""


class ArcFaceTorchDCQHead(ArcFaceTorchHead, DCQHead):
    """DCQ in arcface_torch."""
