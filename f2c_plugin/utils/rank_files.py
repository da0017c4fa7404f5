"""arcface_torch's checkpoints: a file for each rank, ``checkpoint_gpu_0.pt``, ``checkpoint_gpu_1.pt`` …"""

import re
from itertools import islice
from pathlib import Path
from typing import Any

from f2c_plugin.errors import CheckpointError
from f2c_plugin.utils.finite import some
from f2c_plugin.utils.paths import require_no_file
from f2c_plugin.utils.safe_load import load_states
from f2c_plugin.utils.schema import problems_of_arcface_torch

NAME = "checkpoint_gpu_{}.pt"


def load_all_ranks(folder: Path) -> dict[Path, dict[str, Any]]:
    """The checkpoints of all ranks in ``folder``, in rank order.

    Raises:
        CheckpointError: one is missing, damaged, not of arcface_torch, or from another step than the others.
    """
    require_no_file(folder, "the folder of checkpoint_gpu_0.pt, checkpoint_gpu_1.pt, …", "checkpoint_gpu_0.pt", CheckpointError)
    states: dict[Path, dict[str, Any]] = {}
    for path in _files_of_all_ranks(folder):
        states[path] = state = load_states(path)
        require_arcface_torch(state, path)
        first_path, first = next(iter(states.items()))
        if (state["epoch"], state["global_step"]) != (first["epoch"], first["global_step"]):
            raise CheckpointError(f"{path}: is from step {state['global_step']}, but {first_path.name} is from step "
                                  f"{first['global_step']}: give files of the same step")
    return states


def require_arcface_torch(state: dict[str, Any], path: Path) -> None:
    """Raise CheckpointError unless ``state`` is a whole checkpoint of arcface_torch."""
    if "state_dict_backbone" not in state:
        raise CheckpointError(f"{path}: not a checkpoint of arcface_torch; it holds {some([str(key)[:40] for key in state])}")
    require_none(problems_of_arcface_torch(state), path)


def require_none(found: list[str], path: Path) -> None:
    """Raise CheckpointError if there are names of what is wrong with a checkpoint."""
    if found:
        raise CheckpointError(f"{path}: not a whole checkpoint: {some(found)} missing or not as it should be")


def _files_of_all_ranks(folder: Path) -> list[Path]:
    found = {int(match[1]): path for path in folder.glob(NAME.format("*"))
             if (match := re.fullmatch(r"checkpoint_gpu_(\d+)\.pt", path.name))}
    missing = (NAME.format(rank) for rank in range(max(found, default=0) + 1) if rank not in found)
    if first := list(islice(missing, 3)):  # a name can have any number
        raise CheckpointError(f"{folder}: lacks {', '.join(first)}: the files of all ranks are needed")
    return [found[rank] for rank in sorted(found)]
