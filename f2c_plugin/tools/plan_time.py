"""How long a training step takes on an H200: measured where it was, and estimated from what was.

A step is estimated as the backbone's floating point operations at one rate, and the head's products and the bytes that it
moves at others. All constants come from ``benchmarks/results/gpu_nvidia_h200*.json`` and docs/benchmarks.md: one GPU, batch
128, D = 512. The exchange between GPUs is not in it.
"""

from typing import NamedTuple

from f2c_plugin.tools.net_costs import NetCosts
from f2c_plugin.tools.plan import Plan

HEADS = {"f2c": "F²C", "f2c_paper": "F²C as published", "dcq": "DCQ", "partial_fc": "Partial FC", "full_fc": "full FC"}

# Milliseconds of whole steps: 1 million identities, pool and samples of 10 %, the pool in float16, mixed precision.
MEASURED = {("r50", "backbone"): 34.6, ("r50", "f2c"): 34.2, ("r50", "f2c_paper"): 45.8, ("r50", "partial_fc"): 45.3,
            ("r100", "backbone"): 64.9, ("r100", "f2c"): 58.5, ("r100", "f2c_paper"): 98.5, ("r100", "partial_fc"): 77.3}
_MEASURED_SIZE = 512  # of the embeddings
# Least and most that a whole step, or a step of a head alone, took of its estimate.
RANGE_OF_STEPS, RANGE_OF_HEADS = (0.82, 1.17), (0.92, 1.25)

# Operations a second, mixed precision: the median of six steps of r50 and r100, which reached 140e12 to 182e12.
_BACKBONE = 150e12
# In float32 convolutions are computed in TF32, whose rate is half of float16's by the data sheet. Not measured.
_BACKBONE_FLOAT32 = _BACKBONE / 2
# F²C, milliseconds however small the pool, and nanoseconds for each slot and 128 probes: of the three products alone 0.97
# for a million slots and more; the recipe "resident" makes four, "paper" two.
_FIXED = {"resident": 0.8, "paper": 1.3}
_PRODUCTS = {"resident": 4 * 0.97 / 3, "paper": 2 * 0.97 / 3}
# Nanoseconds for each slot of a GPU, in float16, of reading and writing: at 1 to 2.9 million slots "resident" takes 3.95 less
# the products. "paper" moves 1.6 KB a slot, counted, where "resident" moves 3.3.
_SLOT = {"resident": 2.66, "paper": 2.66 * 1.6 / 3.3}
# Without mixed precision, by PyTorch's operators, nanoseconds for each slot and 128 probes.
_FLOAT32 = {"resident": 23.0, "paper": 10.0}
# Partial FC: its head alone took 2.7 ms and 15.7 ns a class. Rows of D float32 that it reads or writes for a class: 13 for
# all (gradient, weight decay, momentum, weights), 12 for those sampled (8 without a copy), 3 for their logits of 128 images.
_PARTIAL_FC_FIXED, _ROWS, _BYTES_A_NS = 2.7, (13, 12, 8, 3), 2000
# DCQ: bytes that its operators move for each number of a class weight, if it is kept in half precision and if not, and for
# each pair of probe and class weight, counted on the stand-in for a GPU. Not measured: its fixed part is that of "paper".
_DCQ_BYTES = (14, 8), 78
_FLOAT32_PRODUCTS = 50e12  # operations a second, by the data sheet at most 67e12


class Milliseconds(NamedTuple):
    value: float
    source: str  # "measured" or "estimated"


def step(plan: Plan, name: str, costs: NetCosts) -> Milliseconds:
    """A whole step with the head ``name`` of HEADS, or of the "backbone" alone."""
    setting = (plan.gpus, plan.batch_size, plan.fp16, plan.identities, plan.pool_rate, plan.pool_dtype, plan.embedding_size)
    if (plan.network, name) in MEASURED and setting == (1, 128, True, 10**6, 0.1, "float16", _MEASURED_SIZE):
        return Milliseconds(MEASURED[plan.network, name], "measured")
    return Milliseconds(estimate(plan, name, costs), "estimated")


def estimate(plan: Plan, name: str, costs: NetCosts) -> float:
    """Milliseconds as of ``step``, estimated also where it was measured."""
    flops = costs.flops + (costs.forward_flops if name in ("f2c_paper", "dcq") else 0)
    if name == "dcq":  # half of the batch is gallery, the other half probes
        flops //= 2
    return 1000 * flops / (_BACKBONE if plan.fp16 else _BACKBONE_FLOAT32) + head(plan, name)


def head(plan: Plan, name: str) -> float:
    """Milliseconds of a head alone, without gallery net, estimated."""
    if name == "backbone":
        return 0.0
    if name == "dcq":
        return _dcq(plan)
    if name.startswith("f2c"):
        return _f2c(plan, "paper" if name == "f2c_paper" else "resident")
    return _partial_fc(plan, plan.pool_rate if name == "partial_fc" else 1.0)


def _f2c(plan: Plan, recipe: str) -> float:
    # A GPU that has a share of the slots compares them with the probes of all.
    products = plan.slots * plan.batch_size / 128 * plan.embedding_size / _MEASURED_SIZE
    if not plan.fp16:
        return _FIXED[recipe] + 1e-6 * _FLOAT32[recipe] * products
    slots = plan.slots / plan.gpus if recipe == "resident" or plan.shard_pool else plan.slots
    size = (2 if plan.pool_dtype == "float32" else 1) * plan.embedding_size / _MEASURED_SIZE  # of float16
    return _FIXED[recipe] + 1e-6 * (_PRODUCTS[recipe] * products + _SLOT[recipe] * size * slots)


def _dcq(plan: Plan) -> float:
    rows, matrices = _DCQ_BYTES
    probes = plan.batch_size // 2
    moved = plan.queue_size * (rows[plan.pool_dtype == "float32"] * plan.embedding_size + matrices * probes)
    flops = 2 * 2 * plan.embedding_size * probes * plan.queue_size
    return _FIXED["paper"] + 1e-6 * moved / _BYTES_A_NS + 1000 * flops / _FLOAT32_PRODUCTS


def _partial_fc(plan: Plan, rate: float) -> float:
    every, sampled, uncopied, logits = _ROWS
    rows = every + (sampled if rate < 1 else uncopied) * rate + logits * rate * plan.batch_size * plan.gpus / 128
    moved = rows * 4 * plan.embedding_size * plan.identities / plan.gpus  # bytes
    flops = 3 * 2 * plan.embedding_size * plan.batch_size * rate * plan.identities
    return _PARTIAL_FC_FIXED + 1e-6 * moved / _BYTES_A_NS + 1000 * flops / _FLOAT32_PRODUCTS
