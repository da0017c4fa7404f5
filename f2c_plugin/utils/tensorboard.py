"""TensorBoard, where it is installed."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from f2c_plugin.errors import F2CError
from f2c_plugin.utils.extras import require

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)


def tensorboard_writer(folder: Path, step: int = 0) -> "SummaryWriter | None":
    """A SummaryWriter into ``folder``; None, with a warning, where TensorBoard is not installed.

    Args:
        step: that the training resumes from; TensorBoard drops what was written of later ones.
    """
    try:
        require("tensorboard", extra="tensorboard")
    except F2CError as error:
        log.warning("no TensorBoard scalars: %s", error)
        return None
    from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
