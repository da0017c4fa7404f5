"""What a step asks of a GPU, counted by the stand-in for one: see `tests/cuda_stand_in`."""

import pytest

from tests.cuda_stand_in import counts

PAPER = dict(f2c_recipe="paper")


@pytest.mark.parametrize("case", [
    {}, dict(fp16=False, f2c_pool_dtype="float32"), dict(autocast="bfloat16", f2c_pool_dtype="bfloat16"), dict(ranks=2),
    PAPER, PAPER | dict(f2c_symmetric=False), PAPER | dict(ranks=2, f2c_shard_pool=True)], ids=str)
def test_the_cpu_never_waits(case):
    counted = counts(**case, slots=20_000, identities=200_000)
    assert counted["kernels"]["head"] > 100  # so it has run
    assert counted["mixed"] == counted["reads"] == []
