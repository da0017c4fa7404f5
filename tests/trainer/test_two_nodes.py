"""One training on two nodes: network namespaces with a cable between them where allowed, else two loopback addresses."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from f2c_plugin.utils.safe_load import load_states
from tests.runs import losses, run_on
from tests.trainer.test_checkpoint import checkpoints, equal

# torchrun's agents share a store by default, and one that joins later waits for its address in vain (torch 2.13).
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


class Node:
    """An address of its own, where one rank of a training is started."""

    def __init__(self, number, address, interface, inside=()):
        self.number, self.address, self.interface, self.inside = number, address, interface, inside

    def start(self, path, store, restarts=0):
        command = [*self.inside, sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
                   "--rdzv-backend=c10d", f"--rdzv-endpoint={store}", "--rdzv-id=two", f"--local-addr={self.address}",
                   f"--rdzv-conf=is_host={int(self.number == 0)},keep_alive_interval=1,keep_alive_max_attempt=2",
                   f"--max-restarts={restarts}", "--monitor-interval=0.2", "-m", "f2c_plugin.train", path]
        with open(f"node_{self.number}", "a") as printed:
            return subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True,
                                    env={**os.environ, **ENVIRONMENT, "GLOO_SOCKET_IFNAME": self.interface})


def ip(*arguments):
    return subprocess.run(["ip", *arguments], capture_output=True).returncode == 0


@pytest.fixture
def nodes():
    names = [f"f2c{os.getpid()}_{number}" for number in (0, 1)]
    cable = [f"f2c{os.getpid() % 10**6}{end}" for end in "ab"]
    try:
        able = all(ip("netns", "add", name) for name in names)
        able = able and ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
        for number, (name, end) in enumerate(zip(names, cable, strict=True)):
            able = (able and ip("link", "set", end, "netns", name)
                    and ip("-n", name, "addr", "add", f"10.99.0.{number + 1}/24", "dev", end)
                    and ip("-n", name, "link", "set", end, "up") and ip("-n", name, "link", "set", "lo", "up"))
        if able:
            yield [Node(number, f"10.99.0.{number + 1}", end, ("ip", "netns", "exec", name))
                   for number, (name, end) in enumerate(zip(names, cable, strict=True))]
        else:
            print("no network namespaces here: two loopback addresses instead")
            yield [Node(number, f"127.0.0.{number + 2}", "lo") for number in (0, 1)]
    finally:
        for name in names:
            ip("netns", "del", name)


def store_at(node):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"{node.address}:{free.getsockname()[1]}"


def ends_well(process, node):
    assert process.wait(timeout=240) == 0, Path(f"node_{node.number}").read_text()[-4000:]


def kill(process):
    """Everything on a node dies at once."""
    def found(option, pid):
        return map(int, subprocess.run(["pgrep", option, str(pid)], capture_output=True, text=True).stdout.split())
    group = [process.pid, *found("-g", process.pid)]
    for pid in {*group, *(child for parent in group for child in found("-P", parent))}:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def assert_same_training():
    assert losses() == losses("whole") and equal(torch.load("out/model.pt"), torch.load("whole/model.pt"))
    a, b = (load_states(checkpoints(folder)[-1]) for folder in ("out", "whole"))
    assert all(equal(a[part], b[part]) for part in ("backbone", "head", "optimizer", "step"))


def test_two_nodes_train_as_one_and_one_that_goes_away_and_comes_back_resumes(config, nodes):
    keys = dict(batch_size=6, num_epoch=60, frequent=1, val_targets=[], f2c_save_every=20, lr=0.01)
    run_on(2, config(output="whole", **keys))
    path, store = config(**keys), store_at(nodes[0])
    running = [node.start(path, store, restarts=3) for node in nodes]
    while not Path("out/history.jsonl").is_file() or len(losses()) < 45:
        assert all(process.poll() is None for process in running), Path("node_0").read_text()[-4000:]
        time.sleep(0.05)
    kill(running[1])
    gone_at = len(losses())
    time.sleep(2)
    assert running[0].poll() is None and gone_at < 600
    running[1] = nodes[1].start(path, store, restarts=3)
    for process, node in zip(running, nodes, strict=True):
        ends_well(process, node)
    assert "resume: going on from" in Path("out/training.log").read_text()
    assert_same_training()
    assert not list(Path("out").glob("*.partial"))
