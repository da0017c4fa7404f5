"""The folder ``config.output``: who may write into it, and how files of states are written."""

import errno
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from f2c_plugin.errors import ConfigError
from f2c_plugin.utils.atomic import naming, partials_of, written_whole
from f2c_plugin.utils.locks import locked

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoint_" + 12 * "[0-9]" + ".pt"
_RESULTS = ("model.pt", "model.onnx", "history.jsonl", "report.json")
_WRITTEN_WHOLE = (CHECKPOINTS, *_RESULTS, "*_scores.npz")
_RESTART_SECONDS = 10  # that a rank 0 may take to die after torchrun has started the next


def checkpoints_in(folder: str | Path) -> list[Path]:
    """Checkpoints of the built-in trainer, the newest first."""
    return sorted(Path(folder).glob(CHECKPOINTS), reverse=True)


@contextmanager
def sole_user(folder: Path, rank: int) -> Iterator[None]:
    """Keep other trainings out of ``folder`` while this lasts, and remove what killed ones have left half-written.

    Rank 0 holds a lock on ``.lock`` there, which the system releases when the process dies. The lock is the
    process's: within another ``sole_user`` this one only ends it together with the training.

    Raises:
        ConfigError: another training is at work there, it cannot be a folder, or something else than a file has the
            name of a result.
    """
    if rank:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output={str(folder)!r}: cannot be made a folder: {error.strerror}: choose another") from error
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder / ".lock", _RESTART_SECONDS))
        except TimeoutError as error:
            raise ConfigError(f"output={str(folder)!r}: another training is at work there ({error}): choose another output, or "
                              "wait until it has ended") from None
        for name in _WRITTEN_WHOLE:
            for partial in partials_of(folder / name):
                shutil.rmtree(partial) if partial.is_dir() and not partial.is_symlink() else partial.unlink()
        if wrong := [str(path) for name in _RESULTS if (path := folder / name).exists() and not path.is_file()]:
            raise ConfigError(f"{', '.join(wrong)}: not a file, and not replaced by one: move it away or choose another output")
        yield


def write_states(states: dict[str, Any], path: Path) -> None:
    """Write a file of ``torch.save``, whole or not at all. Raises OSError with the name of the file."""
    with written_whole(path) as file:
        try:
            torch.save(states, file)
        except RuntimeError as error:  # torch's writer hides behind it why the file could not be written
            raise error.__context__ or error from None


def _only_a_file(path: str, flags: int) -> int:
    """Opens nothing through a link, and no pipe, which would wait for its reader."""
    if os.path.lexists(path) and (os.path.islink(path) or not os.path.isfile(path)):
        raise FileExistsError(errno.EEXIST, "Not a file, and not written to: move it away", path)
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


class PatientFile:
    """Appends lines to a file, in UTF-8. Lines that a full disk does not take wait until it does, while training goes on.

    Args:
        replaces: whether the lines replace what the file holds. That stays until ``begin``, and lines wait until then.
    """

    def __init__(self, path: Path, replaces: bool = False):
        self.path, self._waiting, self._failed = path, b"", False
        self._file = open(path, "ab", buffering=0, opener=_only_a_file)  # noqa: SIM115  # closed by close()
        self._held = replaces and self._file.tell() > 0

    def begin(self) -> None:
        if self._held:
            self._held = False
            self._file.truncate(0)
            self.write("")

    def write(self, lines: str) -> None:
        self._waiting += lines.encode(errors="backslashreplace")
        if self._held:
            return
        try:
            self._write()
        except OSError as error:
            if not self._failed:
                self._failed = True
                log.warning("%s; what it lacks is kept, and training goes on", error)

    def _write(self) -> None:
        with naming(self.path):
            while self._waiting:  # a disk that fills up takes a part
                self._waiting = self._waiting[self._file.write(self._waiting):]

    def close(self) -> None:
        """Raise OSError with the name of the file if it still lacks something. Lines before ``begin`` are dropped."""
        with self._file:
            if not self._held:
                self._write()
