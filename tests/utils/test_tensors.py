"""Operations on tensors: what is asked of all vectors of a large table."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from f2c_plugin.method.pool import DynamicClassPool
from f2c_plugin.method.resident import ResidentPool
from f2c_plugin.utils import tensors


class LargestResult(TorchDispatchMode):
    """Bytes of the largest tensor that was made; views are none."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inputs = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in inputs:
                self.largest = max(self.largest, leaf.nbytes)
        return result


@pytest.mark.parametrize("wrong", [None, (0, 0), (1, 99), (1, 64)])
@pytest.mark.parametrize("count", [100, 64, 1, 0])
def test_a_condition_is_asked_of_every_vector(monkeypatch, count, wrong):
    monkeypatch.setattr(tensors, "_BLOCK", 32)
    vectors = torch.ones(2, 100, 3)
    if wrong:
        vectors[(*wrong, 2)] = torch.nan
    vectors = vectors[:, :count]
    assert tensors.true_of_all(vectors, torch.isfinite) == vectors.isfinite().all()


@pytest.mark.parametrize("pool_type", [ResidentPool, DynamicClassPool])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_pool_is_checked_and_loaded_in_blocks(monkeypatch, pool_type, dtype):
    monkeypatch.setattr(tensors, "_BLOCK", 100)
    pool = pool_type(2000, 2000, 64, dtype=dtype)
    with LargestResult() as made:
        pool.load_state_dict(pool.state_dict())
    assert made.largest <= 2 * 100 * 64 * 4  # two rows of a block in float32; the pool's 2000 slots take 20 times as much
