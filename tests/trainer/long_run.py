"""A training that goes on for hours, whose ranks compare their pools as it goes; for test_long_run.py, or by hand:

    torchrun --nproc_per_node=2 tests/long_run.py CONFIG HOURS

Ends itself by SIGTERM; rank 0 prints how often the pools were compared.
"""

import os
import signal
import sys
import time

import torch
from torch import distributed

from f2c_plugin import train
from f2c_plugin.method.resident_head import ResidentHead

CONFIG, HOURS = sys.argv[1], float(sys.argv[2])
EVERY = 200  # steps between two comparisons

deadline = time.monotonic() + 3600 * HOURS
compared = 0


def forward(self, *arguments, forward=ResidentHead.forward):
    global compared
    loss = forward(self, *arguments)
    if self.steps % EVERY == 0:
        for name, buffer in self.pool.named_buffers():
            if name.endswith("rows"):  # every rank has its own
                continue
            of_rank_0 = buffer.clone()
            distributed.broadcast(of_rank_0, 0)
            assert torch.equal(buffer, of_rank_0), f"step {self.steps}: {name} differs on rank {distributed.get_rank()}"
        self.pool.validate()
        compared += 1
        if time.monotonic() > deadline:
            os.kill(os.getpid(), signal.SIGTERM)
    return loss


ResidentHead.forward = forward
try:
    train.main([CONFIG])
finally:
    if os.environ["RANK"] == "0":
        print(f"the pools were equal {compared} times, every {EVERY} steps", flush=True)
