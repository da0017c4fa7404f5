"""Planned memory against the memory that the parts really take."""

import pytest
import torch

from f2c_plugin.cli import main as cli
from f2c_plugin.errors import ConfigError
from f2c_plugin.method.gallery import GalleryNet
from f2c_plugin.method.pool import DynamicClassPool
from f2c_plugin.method.resident import ResidentPool
from f2c_plugin.models import get_model
from f2c_plugin.tools.plan import Plan
from f2c_plugin.utils.distributed import WHOLE, Shard


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shard_pool", [False, True])
def test_pool_and_slot_table_take_what_is_planned(dtype, shard_pool):
    plan = Plan(40_000, gpus=3, batch_size=8, pool_rate=0.05, pool_dtype=dtype, recipe="paper", shard_pool=shard_pool)
    pools = [DynamicClassPool(plan.slots, 40_000, 512, dtype=getattr(torch, dtype),
                              shard=Shard(rank, 3) if shard_pool else WHOLE) for rank in range(3)]
    assert max(pool.rows.nbytes for pool in pools) == plan.pool()
    others = sum(buffer.nbytes for name, buffer in pools[0].named_buffers() if name != "rows")
    assert others == plan.slot_table() + 8  # the clock


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_class_weights_and_slot_table_take_what_is_planned(dtype):
    plan = Plan(40_000, gpus=3, batch_size=8, pool_rate=0.05, pool_dtype=dtype)
    pools = [ResidentPool(plan.slots, 40_000, 512, dtype=getattr(torch, dtype), shard=Shard(rank, 3)) for rank in range(3)]
    assert max(pool.rows.nbytes + pool.lengths.rows.nbytes for pool in pools) == plan.pool()
    assert sum(pool.kept.rows.nbytes for pool in pools) == plan.kept_weights()
    others = sum(buffer.nbytes for name, buffer in pools[0].named_buffers() if not name.endswith("rows"))
    assert others == plan.slot_table() + 8  # the clock


@pytest.mark.parametrize("network", ["r18", "vit_t"])
def test_the_gallery_net_takes_what_is_planned(network):
    gallery = GalleryNet(get_model(network, 512))
    planned = Plan(10_000, network=network, recipe="paper").gallery_net()
    assert sum(tensor.nbytes for tensor in gallery.state_dict().values()) == planned
    assert Plan(100_000, network=network).gallery_net() == 0


def test_partial_fc_keeps_its_classes_whatever_the_rate_and_f2c_does_not():
    small, large = (Plan(identities, pool_rate=rate) for identities, rate in ((10**6, 0.1), (10**7, 0.01)))
    assert small.pool() == large.pool()
    assert large.partial_fc(0.01) > 9 * small.partial_fc(0.1) and large.f2c() - small.f2c() == 4 * (10**7 - 10**6)
    assert small.partial_fc(1.0) > small.partial_fc(0.1)


def test_the_command_prints_the_table_and_draws_it(tmp_path, capsys):
    cli(["plan", "--identities", "1000000", "--gpus", "8", "--network", "r18", "--plot", str(tmp_path / "plan.png")])
    text = capsys.readouterr().out
    assert "100,000 slots" in text and "Partial FC, sample rate 0.1" in text and "24 MB" in text
    assert text.splitlines()[-1].startswith("Use F²C if memory is what you lack: ")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_the_number_of_identities_may_come_from_a_pack(faces, capsys):
    cli(["plan", str(faces), "--pool-rate", "1", "--gpus", "1", "--batch-size", "12"])
    assert "12 identities on 1 GPU, batch 12, embeddings of 512: " in capsys.readouterr().out
    for arguments in ["plan"], ["plan", str(faces), "--identities", "12"]:
        with pytest.raises(SystemExit, match="f2c-plugin plan: name a pack or --identities N, one of them"):
            cli(arguments)


def test_the_verdict_names_the_head_that_takes_less_memory():
    published = dict(network="r50", recipe="paper")
    assert Plan(93_431, gpus=8, **published).verdict().startswith(
        "Use Partial FC: 274 MB of each GPU for F²C, 94 MB for Partial FC. The largest part of F²C's is the gallery net, 166")
    assert Plan(2_059_906, gpus=1, **published).verdict().startswith("Use F²C if memory is what you lack: 1,054 MB of each")
    assert Plan(2_059_906, gpus=1, network="r50").verdict() == (
        "Use F²C if memory is what you lack: 432 MB of each GPU for F²C, 16,495 MB for Partial FC. F²C keeps 4,023 MB of class "
        "weights in main memory, and saves Partial FC's passes over all classes.")
    for even in Plan(700_000, gpus=8, recipe="paper"), Plan(12_000, gpus=8):
        assert 0.8 < (even.f2c() + even.gallery_net()) / even.partial_fc(0.1) < 1.25
        assert even.verdict().startswith("By memory, either: ")


def test_what_cannot_be_planned_is_refused_with_the_value():
    with pytest.raises(ConfigError, match="(?s)--gpus 0: must be from 1 to .*--network r7: must be one of r18"):
        Plan(1000, gpus=0, network="r7")
    with pytest.raises(SystemExit, match="f2c-plugin plan: --pool-rate 0.0: must be above 0"):
        cli(["plan", "--identities", "10000", "--pool-rate", "0"])
