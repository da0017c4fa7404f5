"""Compiles the fused kernels for a GPU that need not be there: python -m tests.method.compile_fused ARCHITECTURE

Prints JSON: bytes of shared memory of each kernel, for each type of rows, with each size of blocks that is tried.
"""

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from f2c_plugin.method import fused
from f2c_plugin.method.pool_softmax import LEFT_OUT

HALF, FLOAT, WHOLE = "*fp16", "*fp32", "*i64"
TYPES = dict(
    queries=HALF, probes=HALF, rows=HALF, lengths=FLOAT, left_out="*i1", own_slot=WHOLE, own_gradient=FLOAT,
    log_denominator=FLOAT, largest=FLOAT, total=FLOAT, weighted=FLOAT, top=FLOAT, where=WHOLE, numbers="*fp64",
    log_sum_exp=FLOAT, mean_row=FLOAT,
    scale="fp32", threshold="fp32", rate="fp32")
CONSTANTS = {
    fused._pass_kernel: dict(OUT=LEFT_OUT, FILTERED=True, LEFT_OUT=True, OWN=True, num_top=1, TOP=1, size=512, SIZE=512),
    fused._join_kernel: dict(size=512, SIZE=512, PARTS=16),
    fused._learn_kernel: dict(GIVEN=False, FILTERED=True, ROUNDED_BITS=13, size=512, SIZE=512)}


def tried(kernel):
    """The kernel's function, and what is tried; of one that is not tuned, what is used."""
    return (kernel.fn, kernel.configs) if hasattr(kernel, "configs") else (kernel, [triton.Config({})])


def shared_memory(kernel, rows: str, config: triton.Config, architecture: int) -> int:
    function = tried(kernel)[0]
    names = function.arg_names
    constants = CONSTANTS[kernel] | config.kwargs
    types = TYPES | {"rows": rows}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    source = ASTSource(function, signature, {(names.index(name),): value for name, value in constants.items()})
    options = dict(num_warps=config.num_warps, num_stages=config.num_stages)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options).metadata.shared


if __name__ == "__main__":
    print(json.dumps({f"{tried(kernel)[0].__name__} {rows}": [
        shared_memory(kernel, rows, config, int(sys.argv[1])) for config in tried(kernel)[1]]
        for kernel in CONSTANTS for rows in (HALF, FLOAT)}))
