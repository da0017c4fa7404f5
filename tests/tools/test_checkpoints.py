"""Summaries of checkpoints, and converting arcface_torch's to another number of ranks."""

import errno
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from f2c_plugin.cli import main as cli
from f2c_plugin.errors import CheckpointError, OverwriteError
from f2c_plugin.method.kept_weights import KeptWeights
from f2c_plugin.method.margin import Margin
from f2c_plugin.method.pool import DynamicClassPool
from f2c_plugin.method.pool_head import PoolHead
from f2c_plugin.method.resident import ResidentPool
from f2c_plugin.method.schedule import Schedule
from f2c_plugin.tools import checkpoints as checkpoint_tools
from f2c_plugin.tools.checkpoints import describe, merge
from f2c_plugin.utils.distributed import Shard
from f2c_plugin.utils.safe_load import load_states
from tests.conftest import FIXTURES
from tests.runs import run
from tests.trainer.test_checkpoint import checkpoints

CLASSES = 11


class Head(nn.Module):
    """Names and shapes of arcface_torch's Partial FC on one rank."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)


def write_checkpoints(folder, heads, epoch=3, per_epoch=40):
    """Write what arcface_torch writes, with heads after one step. Returns each rank's optimizer."""
    torch.manual_seed(5)
    net = nn.Linear(4, 4)
    optimizers = []
    for rank, head in enumerate(heads):
        optimizer = torch.optim.SGD([{"params": net.parameters()}, {"params": head.parameters()}], lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=10 * per_epoch)
        schedule.last_epoch = epoch * per_epoch
        for parameter in [*net.parameters(), *head.parameters()]:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        optimizers.append(optimizer)
        torch.save({"epoch": epoch, "global_step": epoch * per_epoch, "state_dict_backbone": net.state_dict(),
                    "state_dict_softmax_fc": head.state_dict(), "state_optimizer": optimizer.state_dict(),
                    "state_lr_scheduler": schedule.state_dict()}, folder / f"checkpoint_gpu_{rank}.pt")
    return optimizers


@pytest.mark.parametrize("before, after", [(2, 1), (1, 3), (2, 3), (3, 2)])
def test_partial_fc_is_joined_and_split_with_its_optimizer_state(tmp_path, before, after):
    weight = torch.randn(CLASSES, 4)
    heads = [Head(part.clone()) for part in weight.tensor_split(before)]
    optimizers = write_checkpoints(tmp_path, heads)
    written = merge(tmp_path, tmp_path / "new", after)
    assert [path.name for path in written] == [f"checkpoint_gpu_{rank}.pt" for rank in range(after)]
    states = [load_states(path) for path in written]
    # Partial FC's own rule for the number of classes per rank.
    assert [len(state["state_dict_softmax_fc"]["weight"]) for state in states] == [
        CLASSES // after + (rank < CLASSES % after) for rank in range(after)]
    assert torch.equal(torch.cat([state["state_dict_softmax_fc"]["weight"] for state in states]),
                       torch.cat([head.weight.detach() for head in heads]))
    momentum = [optimizer.state[head.weight]["momentum_buffer"] for optimizer, head in zip(optimizers, heads, strict=True)]
    assert torch.equal(torch.cat([state["state_optimizer"]["state"][2]["momentum_buffer"] for state in states]),
                       torch.cat(momentum))
    for state in states:
        head = Head(torch.zeros_like(state["state_dict_softmax_fc"]["weight"]))
        optimizer = torch.optim.SGD([{"params": nn.Linear(4, 4).parameters()}, {"params": head.parameters()}], lr=0.1)
        optimizer.load_state_dict(state["state_optimizer"])
        per_epoch = 40 * before // after
        assert state["epoch"] == 3 and state["global_step"] == 3 * per_epoch
        assert state["state_lr_scheduler"]["last_epoch"] == 3 * per_epoch
        assert state["state_lr_scheduler"]["total_iters"] == 10 * per_epoch


def pool_head(seed=0, pool=None):
    head = PoolHead(nn.Linear(1, 1), pool or DynamicClassPool(8, 20, 4, seed), Schedule.paper(Margin(8.0, additive=0.1)))
    head.continue_at(120)
    return head


def test_a_pool_is_the_same_on_any_number_of_ranks_and_pools_that_differ_are_refused(tmp_path):
    write_checkpoints(tmp_path, [pool_head(), pool_head()])
    for path in merge(tmp_path, tmp_path / "new", 3):
        head = pool_head(seed=1)
        head.load_state_dict(load_states(path)["state_dict_softmax_fc"])
        assert torch.equal(head.pool.rows, pool_head().pool.rows)
        assert head.steps == load_states(path)["global_step"] == 3 * (40 * 2 // 3)  # where the schedule continues
    write_checkpoints(tmp_path, [pool_head(), pool_head(seed=1)])
    with pytest.raises(CheckpointError, match="checkpoint_gpu_1.pt: pool.rows differs from checkpoint_gpu_0.pt"):
        merge(tmp_path, tmp_path / "newer", 3)
    assert not (tmp_path / "newer").exists()


def test_kept_weights_are_split_over_the_new_ranks(tmp_path):
    pool = ResidentPool(8, 20, 4)
    pool.kept.rows.normal_()
    before = [pool_head(pool=ResidentPool(8, 20, 4)) for _ in range(2)]
    for head in before:
        head.pool.kept.rows = pool.kept.rows  # as rank 0 saves them
    write_checkpoints(tmp_path, before)
    paths = merge(tmp_path, tmp_path / "new", 3)
    for rank, path in enumerate(paths):
        state = load_states(path)["state_dict_softmax_fc"]
        shard = Shard(rank, 3)
        kept = KeptWeights(20, 4, shard=shard)
        kept.load_state_dict({"rows": state["pool.kept.rows"]})
        assert torch.equal(kept.rows, pool.kept.rows[:, slice(*shard.range_of(20))])
        assert state["pool.kept.rows"].size(1) == (20 if rank == 0 else kept.rows.size(1))
        assert state["_extra_state"] == 3 * (40 * 2 // 3)
    assert dict(describe(paths[0]))["head"] == "F²C, 8 slots of class weights of 4, 0 taken, 0 writes"


def test_files_that_do_not_belong_together_are_refused_with_the_reason_and_nothing_is_written(tmp_path):
    with pytest.raises(CheckpointError, match="lacks checkpoint_gpu_0.pt"):
        merge(tmp_path, tmp_path / "new", 2)
    heads = [Head(torch.randn(3, 4)) for _ in range(3)]
    write_checkpoints(tmp_path, heads)
    for ranks, message in (0, "--ranks 0"), (-1, "--ranks -1"), (10**9, "--ranks 1000000000: must be from 1 to 65536"):
        with pytest.raises(CheckpointError, match=message):
            merge(tmp_path, tmp_path / "new", ranks)
    with pytest.raises(OverwriteError, match="checkpoint_gpu_0.pt exists and is not overwritten"):
        merge(tmp_path, tmp_path, 2)
    (tmp_path / "checkpoint_gpu_1.pt").rename(tmp_path / "one")
    with pytest.raises(CheckpointError, match="lacks checkpoint_gpu_1.pt: the files of all ranks"):
        merge(tmp_path, tmp_path / "new", 2)
    (tmp_path / "checkpoint_gpu_1.pt").write_bytes((tmp_path / "one").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="checkpoint_gpu_1.pt: not a whole checkpoint"):
        merge(tmp_path, tmp_path / "new", 2)
    (tmp_path / "one").rename(tmp_path / "checkpoint_gpu_1.pt")
    saved = load_states(tmp_path / "checkpoint_gpu_1.pt")
    torch.save(saved | {"global_step": 7}, tmp_path / "other.pt")
    (tmp_path / "other.pt").replace(tmp_path / "checkpoint_gpu_1.pt")
    with pytest.raises(CheckpointError, match="checkpoint_gpu_1.pt: is from step 7, but checkpoint_gpu_0.pt is from step 120"):
        merge(tmp_path, tmp_path / "new", 2)
    saved["state_optimizer"]["state"][0]["momentum_buffer"][0] = torch.nan
    torch.save(saved, tmp_path / "checkpoint_gpu_1.pt")
    with pytest.raises(CheckpointError, match=r"checkpoint_gpu_1.pt: state_optimizer.state.0.momentum_buffer not finite"):
        merge(tmp_path, tmp_path / "new", 2)
    assert not (tmp_path / "new").exists()


def test_a_merge_that_cannot_write_all_files_leaves_none(tmp_path, monkeypatch):
    write_checkpoints(tmp_path, [Head(torch.randn(3, 4))])

    def write(states, path, original=checkpoint_tools.write_states):
        if path.name == "checkpoint_gpu_2.pt":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        original(states, path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_tools, "write_states", write)
        with pytest.raises(OSError, match=r"No space left on device: .*checkpoint_gpu_2.pt"):
            merge(tmp_path, tmp_path / "new", 3)
    assert not list((tmp_path / "new").iterdir())
    assert len(merge(tmp_path, tmp_path / "new", 3)) == 3


THEIRS = {
    "no epoch": lambda saved: saved.pop("epoch"), "no optimizer": lambda saved: saved.pop("state_optimizer"),
    "epoch as a string": lambda saved: saved.update(epoch="3"), "negative epoch": lambda saved: saved.update(epoch=-1),
    "epoch as a tensor": lambda saved: saved.update(epoch=torch.tensor(3)),
    "true for an epoch": lambda saved: saved.update(epoch=True),
    "step as a list": lambda saved: saved.update(global_step=[120]),
    "huge step": lambda saved: saved.update(global_step=1 << 80),
    "fewer steps than epochs": lambda saved: saved.update(global_step=2),
    "net as a list": lambda saved: saved.update(state_dict_backbone=[1]),
    "net of numbers": lambda saved: saved.update(state_dict_backbone={"weight": 5}),
    "net with numbers as names": lambda saved: saved.update(state_dict_backbone={5: torch.ones(1)}),
    "head as a tensor": lambda saved: saved.update(state_dict_softmax_fc=torch.ones(3)),
    "optimizer as a list": lambda saved: saved.update(state_optimizer=[]),
    "group as a number": lambda saved: saved["state_optimizer"].update(param_groups=[1]),
    "parameters as strings": lambda saved: saved["state_optimizer"]["param_groups"][-1].update(params=["a"]),
    "state as a list": lambda saved: saved["state_optimizer"].update(state=[1]),
    "state of a parameter as a number": lambda saved: saved["state_optimizer"]["state"].update({2: 5}),
    "schedule as a string": lambda saved: saved.update(state_lr_scheduler="linear"),
    "counter as a string": lambda saved: saved["state_lr_scheduler"].update(last_epoch="7"),
}
HEADS = {  # which "inspect" calls unknown, and "merge" refuses
    "weight as a number": lambda saved: saved.update(state_dict_softmax_fc={"weight": 5}),
    "weight of one dimension": lambda saved: saved.update(state_dict_softmax_fc={"weight": torch.ones(3)}),
    "empty head": lambda saved: saved.update(state_dict_softmax_fc={}),
    "pool as a number": lambda saved: saved.update(state_dict_softmax_fc={"pool.rows": 5}),
    "pool without slots": lambda saved: saved.update(state_dict_softmax_fc={"pool.rows": torch.ones(2, 3, 4), "pool.clock": 1}),
}
PARTS = {  # which "inspect" does not look at
    "no groups": lambda saved: saved["state_optimizer"].update(param_groups=[]),
    "no parameters": lambda saved: saved["state_optimizer"]["param_groups"][-1].update(params=[]),
    "momentum of another shape": lambda saved: saved["state_optimizer"]["state"][2].update(momentum_buffer=torch.ones(5, 4)),
    "momentum of another width": lambda saved: saved["state_optimizer"]["state"][2].update(momentum_buffer=torch.ones(3, 5)),
    "no momentum on one rank": lambda saved: saved["state_optimizer"]["state"].pop(2),
    "another width on one rank": lambda saved: (saved["state_dict_softmax_fc"].update(weight=torch.ones(3, 5)),
                                                saved["state_optimizer"]["state"].pop(2)),
    "another dtype on one rank": lambda saved: (saved["state_dict_softmax_fc"].update(weight=torch.ones(3, 4).half()),
                                                saved["state_optimizer"]["state"].pop(2)),
}


@pytest.mark.parametrize("name", [*THEIRS, *HEADS, *PARTS])
def test_crafted_checkpoints_of_arcface_torch_end_in_an_error_that_names_the_file(tmp_path, name, capsys):
    write_checkpoints(tmp_path, [Head(torch.randn(3, 4)), Head(torch.randn(3, 4))])
    path = tmp_path / "checkpoint_gpu_1.pt"
    saved = load_states(path)
    (THEIRS | HEADS | PARTS)[name](saved)
    torch.save(saved, tmp_path / "crafted.pt")
    (tmp_path / "crafted.pt").replace(path)
    with pytest.raises(SystemExit, match=r"f2c-plugin checkpoint: .*checkpoint_gpu_[01]\.pt: "):
        cli(["checkpoint", "merge", str(tmp_path), str(tmp_path / "new"), "--ranks", "3"])
    assert not (tmp_path / "new").exists()
    if name in THEIRS:
        with pytest.raises(CheckpointError, match="checkpoint_gpu_1.pt: not a whole checkpoint: .* not as it should be"):
            describe(path)
    else:
        assert name in PARTS or "unknown head" in dict(describe(path))["head"]


OURS = {
    "no step": lambda saved: saved.pop("step"), "step as a string": lambda saved: saved.update(step="4"),
    "images as a tensor": lambda saved: saved.update(images=torch.tensor(4)),
    "layout of one": lambda saved: saved.update(layout=[1]), "settings as a list": lambda saved: saved.update(settings=[]),
    "net as a tensor": lambda saved: saved.update(backbone=torch.ones(3)),
    "head as a number": lambda saved: saved.update(head=3),
    "net of strings": lambda saved: saved.update(backbone={"weight": "a"}),
}


@pytest.mark.parametrize("name", OURS)
def test_crafted_checkpoints_of_the_built_in_trainer_cannot_be_inspected(tmp_path, name):
    saved = load_states(FIXTURES / "v0_1/checkpoint_000000000120.pt")
    torch.save(saved, tmp_path / "whole.pt")
    assert dict(describe(tmp_path / "whole.pt"))["images seen"] == "120"
    OURS[name](saved)
    torch.save(saved, tmp_path / "crafted.pt")
    with pytest.raises(CheckpointError, match="crafted.pt: not a whole checkpoint: .* not as it should be"):
        describe(tmp_path / "crafted.pt")


def test_a_file_of_a_rank_without_end_costs_nothing(tmp_path):
    write_checkpoints(tmp_path, [Head(torch.randn(3, 4))])
    (tmp_path / f"checkpoint_gpu_{10 ** 30}.pt").touch()
    with pytest.raises(CheckpointError, match="lacks checkpoint_gpu_1.pt, checkpoint_gpu_2.pt, checkpoint_gpu_3.pt: the files"):
        merge(tmp_path, tmp_path / "new", 2)


def test_inspect_summarizes_checkpoints_of_arcface_torch_and_the_built_in_trainer(config, capsys, tmp_path):
    run(config(num_epoch=1, val_targets=[], save_all_states=True))
    write_checkpoints(tmp_path, [pool_head(), Head(torch.full((3, 4), torch.nan))])
    cli(["checkpoint", "inspect", str(checkpoints()[0]), "checkpoint_gpu_0.pt", "checkpoint_gpu_1.pt"])
    printed = capsys.readouterr().out
    for line in ("f2c_plugin.train", "1 with 12 images each", "F²C, 12 slots of class weights of 32, 12 taken", "arcface_torch",
                 "F²C, 8 slots of 2 × 4, 0 taken", "weights of 3 classes × 4, 12 of them NOT FINITE"):
        assert line in printed, printed
    for keys, line in ((dict(f2c_sub_centers=3), "F²C, 12 slots of 3 class weights of 32, 12 taken"),
                       (dict(head="softmax", f2c_low_resolution=0.5), "weights of 12 classes × 32")):
        run(config(num_epoch=1, val_targets=[], save_all_states=True, output="other", **keys))
        assert dict(describe(checkpoints("other")[0]))["head"].startswith(line)
        shutil.rmtree("other")
    Path("model.pt").write_bytes(b"PK")
    with pytest.raises(SystemExit, match="f2c-plugin checkpoint: model.pt: not a whole checkpoint"):
        cli(["checkpoint", "inspect", "model.pt"])
    torch.save({"weight": torch.zeros(3)}, "model.pt")
    with pytest.raises(SystemExit, match="model.pt: not a checkpoint of arcface_torch or f2c_plugin.train; it holds weight"):
        cli(["checkpoint", "inspect", "model.pt"])


def test_merge_is_a_command(tmp_path, capsys):
    write_checkpoints(tmp_path, [Head(torch.randn(3, 4))])
    cli(["checkpoint", "merge", str(tmp_path), str(tmp_path / "new"), "--ranks", "2"])
    assert capsys.readouterr().out.split() == [str(tmp_path / "new" / f"checkpoint_gpu_{rank}.pt") for rank in (0, 1)]
