"""Collectives that are recorded instead of called, as between the parts of a step that a GPU repeats."""

import torch
from torch import distributed

from f2c_plugin.utils.distributed import Shard, gather, recording
from tests.runs import on_ranks


def _of_two_ranks(rank, store, folder):
    distributed.init_process_group("gloo", store=distributed.FileStore(store, 2), rank=rank, world_size=2)
    recorded = []
    own = torch.zeros(3)
    with recording(recorded.append):
        gathered = gather(own)
        total = Shard(rank, 2).sum(own)
    found = []
    for step in range(2):
        own.fill_(10 * step + rank)
        for collective in recorded:
            collective()
        found.append((gathered.clone(), total.clone()))
    torch.save((len(recorded), found), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_recorded_collectives_are_called_again_on_the_same_tensors(tmp_path):
    on_ranks(_of_two_ranks, (str(tmp_path / "store"), str(tmp_path)), 2)
    for rank in range(2):
        count, found = torch.load(tmp_path / f"{rank}.pt")
        assert count == 2
        for step, (gathered, total) in enumerate(found):
            assert gathered.tolist() == [[10 * step] * 3, [10 * step + 1] * 3] and total.tolist() == [20 * step + 1] * 3
