"""The process group of the ranks that torchrun has started, once or again."""

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed
from torch.distributed import HashStore, PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]

_POLL_SECONDS = 0.1
_latest: "distributed.ProcessGroup | None" = None


@contextmanager
def process_group() -> Iterator[None]:
    """Join the ranks that torchrun started, or make a group of this process alone."""
    global _latest
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ:
        store, rank, world_size = next(distributed.rendezvous("env://"))  # pyright: ignore[reportPrivateImportUsage]
        distributed.init_process_group(backend, store=rendezvous(store, rank, world_size), rank=rank, world_size=world_size)
    else:
        distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    # Kept, so that a net in DDP never holds the last reference, also where an error has one of its frames: DDP would end the
    # group's threads with the GIL held, and with activation checkpointing one may need it to end (seen with torch 2.13).
    _latest = distributed.group.WORLD
    try:
        yield
    finally:
        distributed.destroy_process_group()


def rendezvous(store: Store, rank: int, world_size: int) -> Store:
    """A part of ``store`` that nobody has written to yet, the same for all ranks of one start.

    torchrun keeps its store over restarts, and with it the addresses of dead processes: a rank that
    finds one there waits for it until the group's timeout (seen with torch 2.13). The number of the
    restart cannot tell starts apart, because it differs between two nodes. So rank 0 announces a
    rendezvous under a new name; the other ranks register under that name, and trust it once rank 0
    has listed them as present. A rendezvous of an earlier start does not list them.

    Raises:
        TimeoutError: the ranks have not met within the store's timeout.
    """
    me = uuid.uuid4().hex
    timeout = store.timeout  # pyright: ignore[reportAttributeAccessIssue]  # missing in torch's stubs
    deadline = time.monotonic() + timeout.total_seconds()
    if rank == 0:
        store.set("f2c/rendezvous", me)
    while time.monotonic() < deadline:  # and not in the store's own wait, in which Python hears no signal
        if rank == 0 and store.check(others := [f"f2c/{me}/{other}" for other in range(1, world_size)]):
            store.set(f"f2c/{me}/present", ",".join(store.get(other).decode() for other in others))
            return PrefixStore(f"f2c/{me}", store)
        if rank and store.check(["f2c/rendezvous"]):
            name = store.get("f2c/rendezvous").decode()
            store.set(f"f2c/{name}/{rank}", me)
            present = f"f2c/{name}/present"
            if store.check([present]) and me in store.get(present).decode():
                return PrefixStore(f"f2c/{name}", store)
        time.sleep(_POLL_SECONDS)
    raise TimeoutError(f"rank {rank} has not met the others in {timeout}: are all of them running and reachable?")
