"""Where a command prints to: a terminal of any encoding, or a pipe that its reader may close."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from f2c_plugin.utils.atomic import naming


def tolerate_any_terminal() -> None:
    """Escape characters that the terminal's encoding lacks, which would raise UnicodeEncodeError; drop what a stream that is
    closed, as by ``>&-``, would show."""
    for name in "stdin", "stdout", "stderr":  # in the order of their descriptors, so that no other file gets one of these
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115  # to the end
    for stream in sys.stdout, sys.stderr:
        if isinstance(stream, io.TextIOWrapper):  # a notebook's is none
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def printed() -> Iterator[None]:
    """Print all output at the end, and exit quietly with code 1 if its reader has gone, as in ``f2c-plugin plan … | head``.

    Raises OSError if the output cannot be written: its disk may be full.
    """
    try:
        try:
            yield
        finally:
            _flush()
    except BrokenPipeError:
        sys.exit(1)


def _flush() -> None:
    try:
        with naming(Path("standard output")):
            print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python flushes again as it ends
        raise
