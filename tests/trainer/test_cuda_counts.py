"""What loader and trainer ask of a GPU, counted by the stand-in for one: see `tests/cuda_stand_in`."""

import pytest

from tests.cuda_stand_in import counts


@pytest.mark.parametrize("case", [dict(fp16=True), dict(fp16=False), dict(fp16=True, f2c_recipe="paper"),
                                  dict(fp16=True, optimizer="adamw")], ids=str)
def test_neither_a_step_of_the_trainer_nor_the_loader_makes_the_cpu_wait(case):
    counted = counts("count_training", **case)
    assert counted["kernels"]["step"] > 200  # so it has run
    assert counted["mixed"] == counted["reads"] == []
    assert counted["settled"] == 2  # after three steps: whether a step was bad is asked for during the next one
    assert counted["loader"] == [False] * 9  # faces, labels and which to mirror, of three batches
