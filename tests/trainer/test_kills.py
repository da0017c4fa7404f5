"""Trainings whose processes are killed, again and again, under torchrun."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from f2c_plugin.utils.safe_load import load_states
from tests.runs import by_torchrun, losses, run_on
from tests.trainer.test_checkpoint import checkpoints, equal

EVERY = 5  # steps between two checkpoints


def children(pid):
    return [int(each) for each in subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()]


def died_of_it(pid):
    """Kill a process. Returns whether it was still alive."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        os.kill(pid, signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status not in "ZX"


def has_grown(log, size):
    return lambda: log.stat().st_size > size


def are_gone(ranks, torchrun):
    return lambda: not set(ranks) & set(children(torchrun.pid))


def kill_at_random(torchrun, folder, log, rng):
    """SIGKILL to one or all ranks at random moments, of the start or of the training, once for each file ``kill_*``."""
    done, written = {"one": 0, "all": 0}, 0
    while tokens := list(folder.glob("kill_*")):
        if rng.random() < 0.8:  # otherwise while it starts
            wait(has_grown(log, written), torchrun, "no training after a rank was killed")
        time.sleep(rng.uniform(0, 1.5))
        ranks = children(torchrun.pid)
        which = "one" if rng.random() < 0.7 else "all"
        # A rank that torchrun is already ending, because of a kill in a save, was not killed here.
        if not any([died_of_it(rank) for rank in (rng.sample(ranks, 1) if which == "one" and ranks else ranks)]):
            continue
        done[which] += 1
        tokens[0].unlink()
        wait(are_gone(ranks, torchrun), torchrun, "a rank hangs after another was killed")
        written = log.stat().st_size
    return done


def wait(until, torchrun, otherwise):
    deadline = time.monotonic() + 120
    while not until():
        assert torchrun.poll() is None, Path("printed").read_text()[-3000:]
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)


@pytest.mark.parametrize("external, in_saves, shard_pool, epochs", [
    (3, 2, False, 40), pytest.param(24, 12, True, 100, marks=[pytest.mark.long, pytest.mark.timeout(3 * 3600)])])
def test_a_training_whose_ranks_are_killed_ends_as_an_undisturbed_one(config, tmp_path, external, in_saves, shard_pool, epochs):
    keys = dict(batch_size=6, num_epoch=epochs, frequent=1, val_targets=[], f2c_save_every=EVERY, lr=0.01,
                f2c_shard_pool=shard_pool)
    run_on(2, config(output="whole", **keys))
    path = config(**keys)
    for i in range(in_saves):
        (tmp_path / f"save_{i}").touch()
    for i in range(external):
        (tmp_path / f"kill_{i}").touch()
    log = Path("out/training.log")
    command = [sys.executable, *by_torchrun(2), "--monitor-interval=0.1",
               f"--max-restarts={2 * (external + in_saves)}", str(Path(__file__).with_name("killed_run.py")), path,
               str(tmp_path), str(10 * epochs)]
    with open("printed", "w") as printed:
        torchrun = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT,
                                    env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        wait(lambda: log.is_file() and "step 6:" in log.read_text(), torchrun, "no training")
        done = kill_at_random(torchrun, tmp_path, log, random.Random(1))
        assert torchrun.wait(timeout=600) == 0, Path("printed").read_text()[-3000:]
    finally:
        torchrun.terminate()  # ends its ranks, too, if something has failed
    killed_in_saves = in_saves - len(list(tmp_path.glob("save_*")))
    print(f"kills: {done['one']} of one rank, {done['all']} of all, {killed_in_saves} in a save; "
          f"{log.read_text().count('resume: going on')} restarts went on from a checkpoint")
    assert sum(done.values()) == external and killed_in_saves == in_saves

    # It ends as if nothing had happened, bit for bit, and never repeated more than since the last checkpoint.
    assert losses() == losses("whole")
    assert equal(torch.load("out/model.pt"), torch.load("whole/model.pt"))
    a, b = (load_states(checkpoints(folder)[-1]) for folder in ("out", "whole"))
    assert a["step"] == 10 * epochs and all(equal(a[part], b[part]) for part in ("backbone", "head", "optimizer", "random"))
    reached = 0
    for step, resumed in re.findall(r" step (\d+): loss|images seen, step (\d+)", log.read_text()):
        if resumed:
            assert reached - int(resumed) < 2 * EVERY  # two, where the kill came before the checkpoint had its name
        reached = int(step or resumed)
    assert not list(Path("out").glob("*.partial"))
    time.sleep(1)
    assert not subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True).stdout
