"""Reads what ``torch.save`` wrote without running code from the file, and without trusting the sizes it claims."""

import math
import pickle
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any, cast

import torch

from f2c_plugin.errors import CheckpointError

# The names in a file of torch.save that holds tensors in dictionaries, lists and tuples.
_IN_STATES = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch (\w+Storage|Size)")


def load_states(path: str | Path) -> dict[str, Any]:
    """The dictionary in a file of ``torch.save``, with every byte verified. Runs no code from the file.

    ``torch.load`` itself does not notice a changed byte, and does not mind what a file of a few bytes
    unpacks to; so the archive is inspected first.

    Raises:
        CheckpointError: the file is missing, cut short, changed, or holds no dictionary.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise CheckpointError(f"{path}: unpacks to more than it holds, which no file of torch.save does")
            if (changed := archive.testzip()) is not None:
                raise CheckpointError(f"{path}: damaged: {changed} is not as it was written")
            for name in archive.namelist():
                if name.endswith("/data.pkl"):
                    _check_names(archive.read(name), path)
        states = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        _check_sizes(states, path)
    except (OSError, EOFError, RuntimeError, AttributeError, TypeError, ValueError, KeyError, IndexError, AssertionError,
            OverflowError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: not a whole checkpoint: {reason}") from error
    if not isinstance(states, dict):
        raise CheckpointError(f"{path}: holds a {type(states).__name__}, not the states of a training")
    return cast(dict[str, Any], states)


def _check_names(pickled: bytes, path: Path) -> None:
    """Refuse what states are not made of: weights_only=True accepts more, some of which takes any memory it is told to."""
    for opcode, what, _ in pickletools.genops(pickled):
        known = opcode.name not in ("GLOBAL", "INST") or _IN_STATES.fullmatch(str(what))
        if opcode.name == "STACK_GLOBAL" or not known:
            raise CheckpointError(f"{path}: holds {what or 'a name that is made up as it is read'}, which states of a training "
                                  "do not")


def _check_sizes(states: Any, path: Path) -> None:
    """Refuse tensors that stand for more numbers than the file holds."""
    seen: set[int] = set()
    stack: list[Any] = [states]
    while stack:
        each = stack.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, dict):
            stack += [*each.keys(), *each.values()]
        elif isinstance(each, (list, tuple)):
            stack += each
        elif isinstance(each, torch.Tensor) and _stands_for_more(each):
            raise CheckpointError(f"{path}: a tensor of shape {tuple(each.shape)} stands for more than the file holds")


def _stands_for_more(tensor: torch.Tensor) -> bool:
    return (tensor.layout != torch.strided or tensor.device.type != "cpu"
            or math.prod(tensor.shape) * tensor.element_size() > tensor.untyped_storage().nbytes())
