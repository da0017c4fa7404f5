"""What a step asks of a GPU, counted by the stand-in for one: see `tests/cuda_stand_in`."""

import pytest

from f2c_plugin.tools.plan import Plan
from tests.cuda_stand_in import counts

PAPER = dict(f2c_recipe="paper")
FLOAT32 = dict(fp16=False, f2c_pool_dtype="float32")


@pytest.mark.parametrize("case", [
    {}, dict(f2c_fused=False), FLOAT32, dict(ranks=2),
    dict(autocast="bfloat16", f2c_pool_dtype="bfloat16"),
    PAPER, PAPER | dict(f2c_symmetric=False), PAPER | dict(ranks=2, f2c_shard_pool=True),
    dict(head="dcq"), dict(f2c_sub_centers=3, f2c_forget_rate=0.2), dict(ranks=2, f2c_forget_rate=0.2)], ids=str)
def test_the_cpu_never_waits(case):
    counted = counts(**case, slots=20_000, identities=200_000)
    assert counted["kernels"]["head"] > 100  # so it has run
    assert counted["mixed"] == counted["reads"] == []


@pytest.mark.parametrize("case, kernels, kilobytes_per_slot, megabytes", [
    ({}, 150, 4, 100),
    (dict(autocast="bfloat16", f2c_pool_dtype="bfloat16"), 150, 4, 100),
    # By operators: in float32 they are faster on a GPU than the fused kernels, though many more.
    (FLOAT32, 480, 60, 200),
    (PAPER, 400, 2, 150),
    (PAPER | dict(f2c_fused=False), 450, 4, 150)], ids=str)
def test_a_step_launches_few_kernels_and_moves_few_bytes(case, kernels, kilobytes_per_slot, megabytes):
    """At 200,000 slots and a batch of 128; bytes are those that operators take and return."""
    counted = counts(**case)
    assert counted["strided"] == []
    assert counted["kernels"]["head"] <= kernels
    assert counted["kernels"].get("gallery net", 0) <= 12  # its update, however many parameters it has
    assert counted["bytes_per_slot"] <= 1024 * kilobytes_per_slot
    assert counted["peak"] <= megabytes << 20


@pytest.mark.parametrize("case", [{}, dict(ranks=8), dict(batch_size=1024), PAPER, PAPER | dict(batch_size=1024),
                                  PAPER | dict(ranks=8, f2c_shard_pool=True), FLOAT32, FLOAT32 | PAPER], ids=str)
def test_the_plan_says_what_is_counted(case):
    counted = counts(**case)
    plan = Plan(2_000_000, gpus=case.get("ranks", 1), batch_size=case.get("batch_size", 128),
                pool_dtype=case.get("f2c_pool_dtype", "float16"), fp16=case.get("fp16", True),
                recipe=case.get("f2c_recipe", "resident"), shard_pool=case.get("f2c_shard_pool", False))
    assert plan.working_memory() == pytest.approx(counted["peak"], rel=0.2)
    assert plan.f2c() - plan.recording() == pytest.approx(counted["pool"] + counted["peak"], rel=0.1)


@pytest.mark.parametrize("case", [{}, dict(f2c_queue_size=65_536), dict(ranks=8), dict(batch_size=1024), FLOAT32], ids=str)
def test_the_plan_says_what_is_counted_of_dcq(case):
    counted = counts(head="dcq", **case)
    plan = Plan(2_000_000, gpus=case.get("ranks", 1), batch_size=case.get("batch_size", 128),
                pool_dtype=case.get("f2c_pool_dtype", "float16"), queue_size=case.get("f2c_queue_size", 8192))
    assert plan.dcq() == pytest.approx(counted["pool"] + counted["peak"], rel=0.03)
