"""A process that is killed between two changes to a checkout."""

import os
from pathlib import Path

from f2c_plugin.arcface_torch import patching
from f2c_plugin.cli import main as cli

KILLED = 9


def tree(folder):
    """{path: content} of all files."""
    return {path.relative_to(folder): path.read_bytes() for path in sorted(Path(folder).rglob("*"))
            if path.is_file() and "__pycache__" not in path.parts}


def die_at_change(number, arguments):
    """Run a command in a copy of this process, which dies before change ``number`` to a file of the checkout.

    Returns whether it came to that.
    """
    if (child := os.fork()) == 0:
        apply = patching.apply

        def dying(*args):
            left = [number]

            def counted(change):
                def call(path, *rest, **options):
                    if ".partial" not in str(path) or rest:  # not the removal of leftovers
                        if left[0] == 0:
                            os._exit(KILLED)
                        left[0] -= 1
                    return change(path, *rest, **options)
                return call
            os.replace, Path.unlink = counted(os.replace), counted(Path.unlink)
            apply(*args)
        patching.apply = dying
        try:
            cli(arguments)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == KILLED
