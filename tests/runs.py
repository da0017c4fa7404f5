"""Trainings by the built-in trainer, in this process and in others; commands that find no room."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from torch import multiprocessing
from torch.distributed import TCPStore

from f2c_plugin import train
from f2c_plugin.config_files import load_config
from f2c_plugin.trainer.loop import train as run_training
from f2c_plugin.trainer.rendezvous import process_group

IDENTITIES, IMAGES = 12, 10

# One process imports PyTorch, which takes ten seconds of a CPU, and is forked for each that ``on_ranks`` starts.
multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["torch._dynamo", "torch.utils.tensorboard", "onnxruntime", "pytest", "f2c_plugin.trainer.loop"])


def history(folder="out"):
    return [json.loads(line) for line in (Path(folder) / "history.jsonl").read_text().splitlines()]


def losses(folder="out"):
    """{images seen: loss}, of a run with frequent=1."""
    return {entry["images"]: entry["loss"] for entry in history(folder) if "loss" in entry}


def run(path):
    cfg = load_config(path)
    Path(cfg.output).mkdir(exist_ok=True)
    with process_group():
        return run_training(cfg)


def refusal(path):
    with pytest.raises(SystemExit) as exit:
        train.main([path])
    return str(exit.value.code)


def hear_interrupts():
    """A job in the background of a shell ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def with_room_for(size, *arguments):
    """A command of f2c-plugin, as a process whose files have room for ``size`` bytes each."""
    script = ("import resource, sys; from f2c_plugin.cli import main; size = int(sys.argv[1]);"
              "resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)); main(sys.argv[2:])")
    return subprocess.run([sys.executable, "-c", script, *map(str, (size, *arguments))], capture_output=True, text=True)


def by_torchrun(ranks):
    return "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"


def start(path, ranks=1, start_new_session=False):
    """A training as a process; its output goes to pipes."""
    return subprocess.Popen([sys.executable, *_training(path, ranks)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, start_new_session=start_new_session, preexec_fn=hear_interrupts,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def _training(path, ranks):
    return *(by_torchrun(ranks) if ranks > 1 else ()), "-m", "f2c_plugin.train", path


def on_ranks(function, arguments, ranks):
    """Call ``function(rank, *arguments)`` in a process for each rank, which finds the others as if torchrun had started it."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = os.environ | dict(WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port),
                                    TORCHELASTIC_USE_AGENT_STORE="True")
    started = multiprocessing.start_processes(_on_rank, (function, arguments, environment, os.getcwd()), ranks, join=False,
                                              start_method="forkserver")
    try:
        while not started.join():
            pass
    except BaseException:  # as in ``completed``; this process would wait for them at its end
        for process in started.processes:
            process.kill()
        raise


def _on_rank(rank, function, arguments, environment, folder):
    os.chdir(folder)
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    function(rank, *arguments)


def run_on(ranks, path):
    """A training by one rank, in this process, or by several, without torchrun, which ``launch`` starts."""
    run(path) if ranks == 1 else on_ranks(_train, (path,), ranks)


def _train(_, path):
    train.main([path])


def completed(*arguments, stderr=subprocess.PIPE, environment=MappingProxyType({}), **keys):
    """Python with these arguments, when it has ended.

    Where a test takes too long, all of its processes end: ranks that live on would hold the pipes, and be waited for.
    """
    process = subprocess.Popen([sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, stderr=stderr, text=True,
                               start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, **keys)
    try:
        printed, errors = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, printed, errors)


def launch(path, ranks=1):
    """What a training that ends well has printed; with several ranks they are torchrun's."""
    done = completed(*_training(path, ranks), stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return done.stdout
