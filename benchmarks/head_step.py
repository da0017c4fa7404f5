"""Time and memory of one training step of the head alone: F²C, Partial FC, the full FC layer, and the floor.

    python benchmarks/head_step.py --identities 1000000 --pool-rate 0.1 --batch-size 128 [--ranks 2] [--json]
    python benchmarks/head_step.py --identities 100000 1000000 100000000 --slots 200000 --plot sweep.png
    python benchmarks/head_step.py --network r18 --identities 1000000 --batch-size 64

Forward, backward and optimizer on embeddings of dimension 512. The net is one linear layer, so that
a gallery net costs next to nothing; with --network it is the whole training step of that backbone,
gallery net included, and on a GPU with the scaling of mixed precision and the clipping of arcface_torch's script. Each head
runs in processes of its own, one for each rank. On a CPU steps of all heads take turns; on a GPU, which they would have to
share, one head comes after the other, and a time is the mean of 20 warm steps between two events. Medians and quartiles are
over the repeats. Memory is the peak over what a process had before it built its head.

- f2c: this project's head. The weights of the identities that are not in its pool, D numbers for each, are no GPU's memory,
  and on a CPU show in the peak only as they come; all of them are printed by themselves;
- f2c_paper: as published, symmetric;
- partial_fc: arcface_torch's own file, from ARCFACE_TORCH or the cache that `f2c-plugin fetch-host` fills,
  patched in a copy to run without a GPU, at a sample rate that samples as many classes as the pool
  has slots, and in float32, as its script has it also with fp16;
- full_fc: every class in every step;
- floor: the three matrix products that f2c cannot do without, embeddings × pool, softmax × pool and softmax × embeddings,
  alone, in the fastest of several ways of cutting them up;
- backbone, gallery (with --network): the probe net's forward, backward and optimizer alone, and the
  gallery net's forward and following alone.
"""

import argparse
import importlib
import json
import math
import multiprocessing
import platform
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import distributed, nn
from torch.nn.functional import normalize

from f2c_plugin.arcface_torch import patching
from f2c_plugin.build import build_head
from f2c_plugin.config import POOL_DTYPES, F2CConfig
from f2c_plugin.method.gallery import GalleryNet
from f2c_plugin.method.margin import Margin
from f2c_plugin.method.schedule import Schedule
from f2c_plugin.models import NETWORKS, get_model
from f2c_plugin.tools.plan import Plan
from f2c_plugin.trainer.full_fc import FullFC

EMBEDDING_SIZE = 512
MARGIN = Margin(scale=64.0, additive=0.4)
# Memory of float32 matrices of classes × D that these heads are known to hold at their peak, to
# leave out what cannot fit. F²C's are small beside them.
COPIES = {"partial_fc": 4.5, "full_fc": 7}


def f2c(net, identities, arguments, recipe="resident", **others):
    kept_weights = Path(tempfile.gettempdir()) if arguments.kept_weights == "file" else None
    return build_head(net, identities, arguments.repeats + 2, embedding_size=EMBEDDING_SIZE, margin=MARGIN,
                      num_slots=arguments.slots_of(identities), pool_dtype=getattr(torch, arguments.pool_dtype),
                      recipe=recipe, kept_weights=kept_weights, autocast=arguments.fp16, **others)


def f2c_paper(net, identities, arguments):
    return f2c(net, identities, arguments, "paper", shard_pool=arguments.shard_pool, hook=True)


def full_fc(net, identities, arguments):
    return FullFC(EMBEDDING_SIZE, identities, Schedule(MARGIN))


def arcface_torch_modules(checkout):
    """arcface_torch's losses.py and partial_fc_v2.py, patched in a copy to run without a GPU."""
    modules = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "arcface_torch"
        shutil.copytree(checkout, copy)
        patching.apply(copy, patching.plan_install(copy))
        for name in "losses", "partial_fc_v2":
            with mock.patch.object(sys, "path", [str(copy), *sys.path]):
                modules.append(importlib.import_module(name))
    return modules


def partial_fc(net, identities, arguments):
    losses, partial_fc_v2 = arcface_torch_modules(arguments.checkout)
    margin_loss = losses.CombinedMarginLoss(MARGIN.scale, 1.0, 0.0, MARGIN.additive)
    rate = arguments.slots_of(identities) / identities
    with torch.device(arguments.device):  # a CPU would take a minute to draw the weights of ten million identities
        return partial_fc_v2.PartialFC_V2(margin_loss, EMBEDDING_SIZE, identities, rate, False)


class Floor(nn.Module):
    """The matrix products of a step, cut into chunks of some number of slots."""

    CHUNKS = (2048, 8192, 1 << 30)

    def __init__(self, slots, dtype, device):
        super().__init__()
        self.rows = normalize(torch.randn(slots, EMBEDDING_SIZE)).to(device, dtype)

    def products(self, embeddings, chunk):
        factors = embeddings.detach().to(self.rows.dtype).T.contiguous()
        for start in range(0, len(self.rows), chunk):
            part = self.rows[start:start + chunk]
            softmax = part @ factors
            _ = softmax.T @ part, softmax @ factors.T


def floor(net, identities, arguments):
    dtype = torch.get_autocast_dtype(arguments.device) if arguments.fp16 else torch.float32
    slots = arguments.slots_of(identities)
    return Floor(slots // arguments.ranks, dtype, arguments.device)


class Alone(nn.Module):
    """No head: the embeddings' sum as loss."""

    def forward(self, embeddings, labels):
        return embeddings.sum()


def backbone(net, identities, arguments):
    return Alone()


class Gallery(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.gallery = (net,), GalleryNet(net)

    def step(self, images):
        self.gallery(images)
        self.gallery.follow(self.net[0], 0.99)


def gallery(net, identities, arguments):
    return Gallery(net)


HEADS = {"f2c": f2c, "f2c_paper": f2c_paper, "floor": floor, "partial_fc": partial_fc, "full_fc": full_fc,
         "backbone": backbone, "gallery": gallery}
WITH_BACKBONE = ("backbone", "gallery")  # what is measured only with one, and what only without
WITHOUT_BACKBONE = ("floor",)


TIMED = 20  # steps between two events


class Memory:
    """The peak of this process, or of its GPU, over what it held at the beginning."""

    def __init__(self, device):
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
            self.before = self._kilobytes("VmRSS")

    @staticmethod
    def _kilobytes(name):
        status = Path("/proc/self/status").read_text()
        return int(status.split(name + ":")[1].split()[0])

    def peak_mb(self):
        if self.device == "cuda":
            return (torch.cuda.max_memory_allocated() - self.before) / 2**20
        return (self._kilobytes("VmHWM") - self.before) / 1024


def warm_up(device):
    """Have the libraries take what memory they want for themselves before any is measured."""
    net = nn.Linear(EMBEDDING_SIZE, EMBEDDING_SIZE).to(device)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=5e-4)
    for _ in range(2):
        normalize(net(torch.randn(256, EMBEDDING_SIZE, device=device))).softmax(0).topk(3).values.sum().backward()
        optimizer.step()


def work(name, identities, rank, arguments, rendezvous, pipe):
    """Answer each request for a step with its milliseconds, and the last, None, with the peak memory."""
    distributed.init_process_group("nccl" if arguments.device == "cuda" else "gloo", init_method=f"file://{rendezvous}",
                                   rank=rank, world_size=arguments.ranks)
    if arguments.device == "cuda":
        torch.cuda.set_device(rank)
        torch.backends.cudnn.benchmark = True  # as in arcface_torch's script
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // arguments.ranks))
    torch.manual_seed(rank)
    if arguments.network:
        net, shape = get_model(arguments.network, EMBEDDING_SIZE, fp16=arguments.fp16), (3, 112, 112)
    else:
        net, shape = nn.Linear(EMBEDDING_SIZE, EMBEDDING_SIZE, bias=False), (EMBEDDING_SIZE,)
    net = net.to(arguments.device).train()
    if arguments.network:
        net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    parameters = list(net.parameters())
    warm_up(arguments.device)
    memory = Memory(arguments.device)
    if name != "gallery" and arguments.network and arguments.ranks > 1:
        net = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)
    head = HEADS[name](net, identities, arguments).to(arguments.device)
    optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], 0.1, 0.9, weight_decay=5e-4)

    scaler = torch.amp.GradScaler(arguments.device, enabled=arguments.fp16 and bool(arguments.network), growth_interval=100)

    def step(images, labels):
        loss = head(net(images), labels)
        scaler.scale(loss).backward()
        if scaler.is_enabled():
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, 5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    def milliseconds(function, inputs, *others):
        """Of one call; on a GPU the mean of one for each of the inputs, which it takes in turn."""
        if arguments.device == "cpu":
            start = time.perf_counter()
            function(*inputs[0], *others)
            return 1000 * (time.perf_counter() - start)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for each in inputs:
            function(*each, *others)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / len(inputs)

    half = arguments.batch_size // 2
    rng = np.random.default_rng(rank)

    def batch():
        pairs = rng.integers(identities, size=half * 2 // 3)
        labels = np.concatenate([part for _ in range(2) for part in (pairs, rng.integers(identities, size=half - len(pairs)))])
        return torch.randn(2 * half, *shape, device=arguments.device), torch.from_numpy(labels).to(arguments.device)

    while pipe.recv() is not None:
        time.sleep(0.05)
        inputs = [batch() for _ in range(TIMED if arguments.device == "cuda" else 1)]
        if name == "gallery":
            pipe.send(milliseconds(head.step, [(images,) for images, _ in inputs]))
        elif name == "floor":
            pipe.send([milliseconds(head.products, [(images,) for images, _ in inputs], chunk) for chunk in Floor.CHUNKS])
        else:
            pipe.send(milliseconds(step, inputs))
    pipe.send(memory.peak_mb())
    distributed.destroy_process_group()


def measure(arguments, cases):
    """{(head, identities): (milliseconds of every step, peak MB)}; of several ranks the slowest and the largest."""
    together = [[case] for case in cases] if arguments.device == "cuda" else [cases]
    return {case: found for some in together for case, found in measure_in_turn(arguments, some).items()}


def measure_in_turn(arguments, cases):
    """As ``measure``; all cases at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["f2c_plugin.build"])  # PyTorch, once for all of them
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = {}, []
        for name, identities in cases:
            pipes[name, identities] = []
            for rank in range(arguments.ranks):
                mine, theirs = context.Pipe()
                pipes[name, identities].append(mine)
                processes.append(context.Process(target=work, daemon=True, args=(
                    name, identities, rank, arguments, f"{folder}/{name}-{identities}", theirs)))
                processes[-1].start()
                theirs.close()

        def ask(case, what):
            for pipe in pipes[case]:
                pipe.send(what)
            return np.max([pipe.recv() for pipe in pipes[case]], axis=0)

        times = {case: [] for case in cases}
        for _ in range(arguments.repeats + 2):
            for case in cases:
                times[case].append(ask(case, "step"))
        measured = {}
        for case in cases:
            taken = np.array(times[case][2:])  # the first steps allocate, and tune kernels
            if case[0] == "floor":
                taken = taken[:, np.median(taken, axis=0).argmin()]
            measured[case] = taken, ask(case, None)
        for process in processes:
            process.join()  # and give the memory back
        return measured


def needed_mb(name, identities, arguments):
    if arguments.device == "cuda" and name == "partial_fc":
        plan = plan_of(arguments, identities)
        return 1.1 * plan.partial_fc(plan.pool_rate) / 2**20
    return COPIES.get(name, 0) * identities * EMBEDDING_SIZE * 4 / 2**20


def free_mb(device):
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] / 2**20
    return int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) / 1024


def plan_of(arguments, identities):
    return Plan(identities, arguments.ranks, batch_size=arguments.batch_size, pool_dtype=arguments.pool_dtype,
                pool_rate=arguments.slots_of(identities) / identities, shard_pool=arguments.shard_pool)


def planned_mb(arguments, identities, here):
    """What ``f2c-plugin plan`` says of the heads measured."""
    plan = plan_of(arguments, identities)
    planned = {"f2c": plan.f2c(arguments.device), "f2c_paper": replace(plan, recipe="paper").f2c(arguments.device),
               "partial_fc": plan.partial_fc(plan.pool_rate)}
    return {f"{name}_planned_mb": round(size / 2**20) for name, size in planned.items() if name in here}


def summary(arguments, identities, measured):
    """What was measured at one number of identities, as a flat dictionary."""
    result = {"identities": identities, "slots": arguments.slots_of(identities)}
    here = {name: found for (name, number), found in measured.items() if number == identities}
    for name, (times, peak) in here.items():
        low, middle, high = np.percentile(times, [25, 50, 75])
        result |= {f"{name}_ms": round(middle, 1), f"{name}_ms_quartiles": [round(low, 1), round(high, 1)]}
        if name != "floor":
            result[f"{name}_peak_mb"] = round(peak)
    for name in ("f2c_paper", "partial_fc", "full_fc"):
        if name in here and "f2c" in here:
            result[f"ratio_vs_{name}"] = round(result[f"{name}_ms"] / result["f2c_ms"], 2)
            result[f"memory_ratio_vs_{name}"] = round(result[f"{name}_peak_mb"] / result["f2c_peak_mb"], 2)
    if "f2c" in here:
        result["f2c_kept_weights_mb"] = round(plan_of(arguments, identities).kept_weights() / 2**20)
    if not arguments.network:
        result |= planned_mb(arguments, identities, here)
    if arguments.network:
        images = 1000 * arguments.batch_size * arguments.ranks
        result |= {f"{name}_images_per_s": round(images / result[f"{name}_ms"], 1) for name in here if name != "gallery"}
    if "gallery" in here and "f2c_paper" in here:
        result["gallery_share"] = round(result["gallery_ms"] / result["f2c_paper_ms"], 3)
    if "floor" in here and "f2c" in here:
        result["ratio_to_floor"] = round(result["f2c_ms"] / result["floor_ms"], 2)
    return result


def show(result):
    print(f"{result['identities']:,} identities, {result['slots']:,} slots or sampled classes")
    for name in HEADS:
        if f"{name}_ms" in result:
            low, high = result[f"{name}_ms_quartiles"]
            peak = f"peak {result[f'{name}_peak_mb']:>6} MB" if name != "floor" else ""
            if f"{name}_planned_mb" in result:
                peak += f" (planned {result[f'{name}_planned_mb']})"
            print(f"  {name:<11} {result[f'{name}_ms']:>9.1f} ms  (quartiles {low} to {high})   {peak}")
    for key in result:
        if "ratio" in key or "per_s" in key or "share" in key or "kept" in key:
            print(f"  {key:<28} {result[key]}")


def plot(results, path):
    """Time and memory against the number of identities."""
    from f2c_plugin.tools.plotting import pyplot

    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, suffix, label in zip(axes, ("_ms", "_peak_mb"), ("ms a step", "peak MB"), strict=True):
        for name, title in (("f2c", "F²C"), ("f2c_paper", "F²C, as published"), ("partial_fc", "Partial FC"),
                            ("full_fc", "full FC")):
            points = [(result["identities"], result[name + suffix]) for result in results if name + suffix in result]
            if points:
                axis.loglog(*zip(*points, strict=True), "o-", label=title)
        kept = [(result["identities"], result["f2c_peak_mb"] + result["f2c_kept_weights_mb"]) for result in results
                if "f2c_peak_mb" in result]
        if suffix == "_peak_mb" and kept:
            axis.loglog(*zip(*kept, strict=True), "C0--", label="F²C with all weights in main memory")
        low, high = axis.get_ylim()
        axis.set(xlabel="identities", ylabel=label, ylim=(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high))))
        axis.grid(alpha=0.3, which="both")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    slots = {result["slots"] for result in results}
    if len(slots) == 1:
        figure.suptitle(f"one step of the head, {slots.pop():,} slots or sampled classes")
    figure.savefig(path, dpi=120)
    plt.close(figure)


class Arguments(argparse.Namespace):
    def slots_of(self, identities):
        return min(self.slots, identities) if self.slots else F2CConfig(pool_rate=self.pool_rate).num_slots(identities)


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--identities", type=int, nargs="+", default=[200_000])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--pool-rate", type=float, default=0.1, help="also Partial FC's sample rate")
    size.add_argument("--slots", type=int, help="size of the pool, and number of classes that Partial FC samples")
    parser.add_argument("--batch-size", type=int, default=128, help="of a rank")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--shard-pool", action="store_true", help="of f2c_paper; f2c's always is")
    parser.add_argument("--kept-weights", default="memory", choices=["memory", "file"], help="of f2c")
    parser.add_argument("--pool-dtype", default="float32", choices=POOL_DTYPES)
    parser.add_argument("--fp16", action="store_true", help="mixed precision, as config.fp16")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--network", choices=NETWORKS, help="measure the whole training step of this backbone")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--heads", nargs="+", default=list(HEADS), choices=list(HEADS))
    parser.add_argument("--plot", metavar="PNG", help="draw time and memory against the number of identities")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(namespace=Arguments())
    smallest = min(map(arguments.slots_of, arguments.identities))
    if smallest < arguments.batch_size * arguments.ranks:
        parser.error("the pool must hold the identities of a global batch: raise --identities, --pool-rate or --slots")
    try:
        arguments.checkout = patching.known_checkout()
    except patching.CheckoutError:
        print("without Partial FC: set ARCFACE_TORCH or run `f2c-plugin fetch-host`", file=sys.stderr)
        arguments.heads = [name for name in arguments.heads if name != "partial_fc"]

    available, cases = free_mb(arguments.device), []
    for identities in arguments.identities:
        for name in HEADS:
            if name not in arguments.heads or name in (WITHOUT_BACKBONE if arguments.network else WITH_BACKBONE):
                continue
            if (needed := needed_mb(name, identities, arguments)) < available:
                cases.append((name, identities))
                available -= needed if arguments.device == "cpu" else 0  # where all are measured at once
            else:
                print(f"without {name} at {identities:,} identities: it would not fit into memory", file=sys.stderr)
    measured = measure(arguments, cases)
    results = [summary(arguments, identities, measured) for identities in arguments.identities]
    if arguments.plot:
        plot(results, arguments.plot)
    keys = ("batch_size", "ranks", "shard_pool", "pool_dtype", "fp16", "network", "repeats")
    setting = {key: getattr(arguments, key) for key in keys}
    setting["machine"] = (torch.cuda.get_device_name() if arguments.device == "cuda"
                          else f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    setting["torch"] = torch.__version__
    if arguments.json:
        print(json.dumps(setting | (results[0] if len(results) == 1 else {"sweep": results}), indent=2))
        return
    print(", ".join(f"{key} {value}" for key, value in setting.items()))
    for result in results:
        show(result)


if __name__ == "__main__":
    main()
