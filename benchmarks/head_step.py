"""Time and memory of one training step of the head alone: F²C, Partial FC and the full FC layer.

    python benchmarks/head_step.py --identities 200000 --pool-rate 0.1 --batch-size 128 [--json]

Forward, backward and optimizer on embeddings of dimension 512, float32, one rank. The net is one
linear layer, so the gallery net costs next to nothing here: what it adds to a real step is the
forward pass of the backbone. Each head runs in a process of its own; steps of all heads take
turns, and medians and quartiles are over these. Memory is the peak of a process over what it had
before it built its head. Partial FC is the host's own file, from ARCFACE_TORCH or the cache that
`f2c-plugin fetch-host` fills, patched in a copy to run without a GPU.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import distributed, nn

from f2c_plugin.cache import cache_folder
from f2c_plugin.head import F2CHead
from f2c_plugin.host import patching
from f2c_plugin.loss import Margin
from f2c_plugin.pool import DynamicClassPool
from f2c_plugin.recipe import Recipe
from f2c_plugin.softmax import SoftmaxHead

EMBEDDING_SIZE = 512
MARGIN = Margin(scale=64.0, additive=0.4)


def f2c(net, arguments):
    slots = int(arguments.pool_rate * arguments.identities)
    pool = DynamicClassPool(slots, arguments.identities, EMBEDDING_SIZE)
    return F2CHead(net, pool, Recipe("paper", MARGIN, 1))


def full_fc(net, arguments):
    return SoftmaxHead(EMBEDDING_SIZE, arguments.identities, MARGIN)


def partial_fc(net, arguments):
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    modules = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "host"
        shutil.copytree(arguments.host, copy)
        patching.apply(copy, patching.plan_install(copy))
        for name in "losses", "partial_fc_v2":
            spec = importlib.util.spec_from_file_location(name, copy / f"{name}.py")
            modules.append(importlib.util.module_from_spec(spec))
            spec.loader.exec_module(modules[-1])
    margin_loss = modules[0].CombinedMarginLoss(MARGIN.scale, 1.0, 0.0, MARGIN.additive)
    return modules[1].PartialFC_V2(margin_loss, EMBEDDING_SIZE, arguments.identities, arguments.pool_rate, False)


HEADS = {"f2c": f2c, "partial_fc": partial_fc, "full_fc": full_fc}


def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def work(name, arguments, pipe):
    """Answer each request for a step with its milliseconds, and the last, None, with the peak memory."""
    torch.manual_seed(0)
    net = nn.Linear(EMBEDDING_SIZE, EMBEDDING_SIZE, bias=False)
    before = peak_mb()
    head = HEADS[name](net, arguments)
    optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], 0.1, 0.9, weight_decay=5e-4)
    half = arguments.batch_size // 2
    while pipe.recv() is not None:
        pairs = torch.randperm(arguments.identities)[:half * 2 // 3]
        labels = torch.cat([part for _ in range(2) for part in
                            (pairs, torch.randint(arguments.identities, (half - len(pairs),)))])
        images = torch.randn(2 * half, EMBEDDING_SIZE)
        start = time.perf_counter()
        head(net(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        pipe.send(1000 * (time.perf_counter() - start))
    pipe.send(peak_mb() - before)


def measure(arguments, names):
    """{name: (milliseconds of every step, peak MB)}."""
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for name in names:
        pipes[name], end = context.Pipe()
        context.Process(target=work, args=(name, arguments, end), daemon=True).start()
    times = {name: [] for name in names}
    for _ in range(arguments.repeats + 1):
        for name, pipe in pipes.items():
            pipe.send("step")
            times[name].append(pipe.recv())
    peaks = {}
    for name, pipe in pipes.items():
        pipe.send(None)
        peaks[name] = pipe.recv()
    return {name: (times[name][1:], peaks[name]) for name in names}  # the first step allocates


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--identities", type=int, default=200_000)
    parser.add_argument("--pool-rate", type=float, default=0.1, help="also Partial FC's sample rate")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--without", nargs="*", default=[], choices=list(HEADS)[1:], help="heads that would not fit")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.pool_rate * arguments.identities < arguments.batch_size // 2:
        parser.error("the pool must hold the identities of half a batch: raise --identities or --pool-rate")
    try:
        arguments.host = patching.find_host(os.environ.get("ARCFACE_TORCH")
                                            or cache_folder() / f"insightface-{patching.HOST_REVISION[:12]}")
    except patching.HostError:
        print("without Partial FC: set ARCFACE_TORCH or run `f2c-plugin fetch-host`")
        arguments.without.append("partial_fc")
    measured = measure(arguments, [name for name in HEADS if name not in arguments.without])

    result = {key: getattr(arguments, key) for key in ("identities", "pool_rate", "batch_size", "repeats")}
    result["machine"] = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    result["torch"] = torch.__version__
    for name, (times, peak) in measured.items():
        low, middle, high = np.percentile(times, [25, 50, 75])
        result |= {f"{name}_ms": round(middle, 1), f"{name}_ms_quartiles": [round(low, 1), round(high, 1)],
                   f"{name}_peak_mb": round(peak)}
    for name in ("partial_fc", "full_fc"):
        if name in measured:
            result[f"ratio_vs_{name}"] = round(result[f"{name}_ms"] / result["f2c_ms"], 2)
            result[f"memory_ratio_vs_{name}"] = round(result[f"{name}_peak_mb"] / result["f2c_peak_mb"], 2)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{arguments.identities:,} identities, pool or sample rate {arguments.pool_rate}, batch {arguments.batch_size}")
    for name in measured:
        low, high = result[f"{name}_ms_quartiles"]
        print(f"  {name:<11} {result[f'{name}_ms']:>9.1f} ms  (quartiles {low} to {high})   peak {result[f'{name}_peak_mb']:>6} MB")
    for key in result:
        if "ratio_vs" in key:
            print(f"  {key:<28} {result[key]}")


if __name__ == "__main__":
    main()
