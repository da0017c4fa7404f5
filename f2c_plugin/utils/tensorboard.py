"""TensorBoard, where it is installed."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)


def tensorboard_writer(folder: Path, step: int = 0) -> "SummaryWriter | None":
    """A SummaryWriter into ``folder``; None, with a warning, where TensorBoard is not installed.

    Args:
        step: that the training resumes from; TensorBoard drops what was written of later ones.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.warning("no TensorBoard scalars: pip install 'f2c-plugin[tensorboard]'")
        return None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
