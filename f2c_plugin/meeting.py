"""The process group of the ranks that torchrun has started, once or again."""

import os
import time
import uuid
from contextlib import contextmanager

import torch
from torch import distributed

_TRIED_EVERY = 0.1  # seconds


@contextmanager
def process_group():
    """Joins the ranks that torchrun started, or makes a group of this process alone."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ:
        store, rank, world_size = next(distributed.rendezvous("env://"))
        distributed.init_process_group(backend, store=met(store, rank, world_size), rank=rank, world_size=world_size)
    else:
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def met(store: distributed.Store, rank: int, world_size: int) -> distributed.Store:
    """A part of ``store`` that nobody has written to before, the same for all ranks of one start.

    torchrun keeps its store over restarts, and with it the addresses of processes that are dead: a
    rank that finds one there waits for it until the group's timeout (seen with torch 2.13). The
    number of the restart cannot tell starts apart, for on two nodes it differs. So rank 0 calls a
    meeting under a new name; the others say under that name that they are there, and believe that
    it is theirs once rank 0 has named them as present. One that is over does not name them.

    Raises:
        TimeoutError: the ranks have not met within the store's timeout.
    """
    me = uuid.uuid4().hex
    if rank == 0:
        store.set("f2c/meeting", me)
        others = [store.get(f"f2c/{me}/{other}").decode() for other in range(1, world_size)]  # waits for each
        store.set(f"f2c/{me}/present", ",".join(others))
        return distributed.PrefixStore(f"f2c/{me}", store)
    deadline = time.monotonic() + store.timeout.total_seconds()
    while time.monotonic() < deadline:
        meeting = store.get("f2c/meeting").decode()
        store.set(f"f2c/{meeting}/{rank}", me)
        present = f"f2c/{meeting}/present"
        if store.check([present]) and me in store.get(present).decode():
            return distributed.PrefixStore(f"f2c/{meeting}", store)
        time.sleep(_TRIED_EVERY)
    raise TimeoutError(f"rank {rank} has not met rank 0 in {store.timeout}: is it running, and can it be reached?")
