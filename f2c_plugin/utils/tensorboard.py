"""TensorBoard, where it is installed."""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from f2c_plugin.errors import F2CError
from f2c_plugin.utils.extras import require

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)


class ScalarWriter:
    """Writes scalars for TensorBoard into ``folder``, for as long as they can be written: what cannot be is reported once.

    Args:
        step: that the training resumes from; TensorBoard drops what was written of later ones.
    """

    def __init__(self, folder: Path, step: int = 0):
        self._folder = folder
        self._writer: SummaryWriter | None = None
        try:
            tensorboard = require("torch.utils.tensorboard", extra="tensorboard")
        except F2CError as error:
            log.warning("no TensorBoard scalars: %s", error)
            return
        with self._reported():
            self._writer = tensorboard.SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write scalars, but for those that are not finite, which TensorBoard cannot draw."""
        with self._reported():
            if self._writer:
                for name, value in scalars.items():
                    if math.isfinite(value):
                        self._writer.add_scalar(name, value, step)
                self._writer.flush()

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except (OSError, UnicodeError) as error:  # TensorBoard takes no name outside of UTF-8
            self._writer = None
            reason = error.strerror if isinstance(error, OSError) else error
            log.warning("%s: %s: no more scalars are written there, and training goes on", self._folder, reason)
