"""A training that dies by SIGKILL in the middle of some of its saves; for test_kills.py.

    torchrun … killed_run.py CONFIG FOLDER STEPS

As many files ``save_*`` as there are in FOLDER, so many more times it dies. As long as there is one named ``kill_*``,
somebody else still has to kill it, and it waits in its last save, that of step STEPS.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from f2c_plugin import train

CONFIG, FOLDER, STEPS = sys.argv[1:]


def save_and_maybe_die(states, file, *, save=torch.save, **options):
    name = Path(getattr(file, "name", "")).name
    if not (name.startswith("checkpoint") and name.endswith(".partial")):
        return save(states, file, **options)  # a model.pt, or what torch saves to send it to other ranks
    while states["step"] == int(STEPS) and list(Path(FOLDER).glob("kill_*")):
        time.sleep(0.05)
    tokens = list(Path(FOLDER).glob("save_*"))
    if tokens and random.SystemRandom().random() < 0.5:
        tokens[0].unlink()
        when = random.SystemRandom().choice(["before", "within", "after"])
        if when != "before":
            save(states, file)
        if when == "within":
            file.flush()
            file.truncate(file.tell() // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    save(states, file)


torch.save = save_and_maybe_die
train.main([CONFIG])
