"""All that is to be measured on a GPU, in eleven minutes: `make gpu`.

    python benchmarks/gpu.py [--parts head steps nets loader] [--ranks 2]
    python benchmarks/gpu.py --small --device cpu        # every line of it without a GPU, in two minutes; measures nothing

- head: a step of the head alone, against Partial FC and against the products that it cannot do without, from 1 to 100 million
  identities, in mixed precision; and its memory against what `f2c-plugin plan` says;
- steps: whole training steps with r50 and r100, channels_last and in mixed precision, as arcface_torch has them;
- nets: the same with a light net and a vision transformer, with the full FC layer, and in float32, to see how far off
  `f2c-plugin plan` estimates them;
- loader: training steps with r50 that are fed by the loader from a pack, against steps on one batch in the GPU's memory.

Writes OUT/gpu_NAME.json, and a page with tables, gpu_NAME.md, and a plot beside it. How heads are measured: see `head_step.py`.
Partial FC is arcface_torch's own file, from ARCFACE_TORCH or the cache that `f2c-plugin fetch-host` fills.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparison import Result, provenance
from head_step import EMBEDDING_SIZE, HEADS, MARGIN, TIMED, plot

from f2c_plugin.build import build_head
from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.data.loader import DualLoader
from f2c_plugin.data.sampler import DualSampler
from f2c_plugin.models import get_model
from f2c_plugin.synthetic.dataset import write_dataset
from f2c_plugin.tools import plan_time
from f2c_plugin.tools.net_costs import CostsByBatch
from f2c_plugin.tools.plan import Plan
from f2c_plugin.tools.plan_step import BESIDE, memory

HEAD_STEP = Path(__file__).with_name("head_step.py")

# (identities, pool rate, heads). Weights of 100 million identities do not fit into most main memories: published head alone.
HEAD = [(1_000_000, 0.1, "f2c f2c_paper partial_fc floor"), (10_000_000, 0.1, "f2c f2c_paper partial_fc floor"),
        (29_000_000, 0.1, "f2c f2c_paper partial_fc floor"), (100_000_000, 0.01, "f2c_paper floor")]
# (network, identities, mixed precision, heads)
WHOLE = "f2c f2c_paper partial_fc backbone"
STEPS = [("r50", 1_000_000, True, f"{WHOLE} gallery"), ("r100", 1_000_000, True, f"{WHOLE} gallery")]
NETS = [("mbf", 1_000_000, True, WHOLE), ("vit_b", 1_000_000, True, WHOLE), ("r50", 200_000, True, "f2c full_fc backbone"),
        ("r50", 200_000, False, "f2c partial_fc full_fc backbone")]
SMALL_HEAD = [(20_000, 0.1, "f2c f2c_paper partial_fc floor"), (50_000, 0.1, "f2c_paper floor")]
SMALL_STEPS = [("tiny", 20_000, False, f"{WHOLE} gallery")]
SMALL_NETS = [("tiny", 20_000, False, "f2c full_fc backbone")]


def head_step(arguments: argparse.Namespace, fp16: bool, *options: object) -> Result | None:
    """What `head_step.py` measures; None if it fails, or there is no time for it, which is shown."""
    command = [sys.executable, "-W", "ignore", str(HEAD_STEP), "--json", "--device", arguments.device, "--ranks",
               str(arguments.ranks), "--repeats", str(arguments.repeats), *map(str, options)]
    if fp16:
        command += ["--fp16", "--pool-dtype", "float16"]
    seconds = arguments.end - time.monotonic()
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=max(0.0, seconds))
    except subprocess.TimeoutExpired:
        print(f"left out, for --minutes {arguments.minutes:g} are over: {' '.join(command[3:])}", file=sys.stderr)
        return None
    if done.returncode:
        print(f"left out, for it failed: {' '.join(command[3:])}", file=sys.stderr)
        return None
    return json.loads(done.stdout)


def head(arguments: argparse.Namespace) -> list[Result]:
    fp16 = not arguments.small
    found = [head_step(arguments, fp16, "--identities", identities, "--pool-rate", rate, "--heads", *heads.split())
             for identities, rate, heads in (SMALL_HEAD if arguments.small else HEAD)]
    return [each for each in found if each]


def steps(arguments: argparse.Namespace) -> list[Result]:
    return whole_steps(arguments, SMALL_STEPS if arguments.small else STEPS)


def nets(arguments: argparse.Namespace) -> list[Result]:
    return whole_steps(arguments, SMALL_NETS if arguments.small else NETS)


def whole_steps(arguments: argparse.Namespace, cases: list[tuple[str, int, bool, str]]) -> list[Result]:
    """What each case took, and what `f2c-plugin plan` estimates of its time on an H200."""
    found: list[Result] = []
    for network, identities, fp16, heads in cases:
        plan = Plan(identities, arguments.ranks, network, batch_size=8 if arguments.small else 128,
                    pool_dtype="float16" if fp16 else "float32", fp16=fp16)
        result = head_step(arguments, fp16, "--network", network, "--identities", identities, "--pool-rate", plan.pool_rate,
                           "--batch-size", plan.batch_size, "--heads", *heads.split())
        if result:
            costs_of = CostsByBatch(network, EMBEDDING_SIZE, plan.batch_size, fp16)
            costs = costs_of(plan.batch_size)
            for name in {"backbone", *plan_time.HEADS} & set(heads.split()):
                result[f"{name}_estimated_ms"] = round(plan_time.estimate(plan, name, costs), 1)
                # The benchmark's peak is above the net's parameters, and it holds more batches of images than a training.
                planned = memory(plan, costs_of, name) - BESIDE - costs.parameters + (TIMED - 2) * costs.images
                result[f"{name}_planned_mb"] = round(planned / 2**20)
            found.append(result)
    return found


def loader(arguments: argparse.Namespace) -> list[Result]:
    """Steps fed by the loader, and steps on one batch."""
    network, batch_size, steps = ("tiny", 16, 6) if arguments.small else ("r50", 128, 60)
    device, workers = torch.device(arguments.device), min(16, os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(folder, *((20, 10) if arguments.small else (400, 20)), num_pairs=2)
        dataset = RecordDataset(folder)
        net = get_model(network, EMBEDDING_SIZE, fp16=not arguments.small).to(device).train()
        net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        dataset_loader = DualLoader(dataset, DualSampler(dataset.index, batch_size, steps), device, workers)
        classifier = build_head(net, 100_000, 10 * steps, margin=MARGIN, autocast=not arguments.small)
        optimizer = torch.optim.SGD(net.parameters(), 0.01, 0.9, weight_decay=5e-4)
        rates: dict[str, list[float]] = {"fed": [], "one_batch": []}
        one = next(iter(dataset_loader))
        for _ in range(max(2, arguments.repeats // 3)):
            for name, batches in ("fed", dataset_loader), ("one_batch", repeat(one, steps)):
                count, start = 0, time.perf_counter()
                for images, labels in batches:
                    classifier(net(images), labels).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    count += 1
                    if count == steps // 3:  # workers have started
                        synchronize(device)
                        start = time.perf_counter()
                synchronize(device)
                rates[name].append((count - steps // 3) * batch_size / (time.perf_counter() - start))
    medians = {f"{name}_images_per_s": round(float(np.median(found))) for name, found in rates.items()}
    return [dict(network=network, batch_size=batch_size, workers=workers) | medians
            | dict(share_of_one_batch=round(medians["fed_images_per_s"] / medians["one_batch_images_per_s"], 3))]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


PARTS = {"head": head, "steps": steps, "nets": nets, "loader": loader}
TITLES = {"head": "The head alone", "steps": "Whole training steps", "nets": "Whole training steps of other kinds",
          "loader": "Steps fed by the loader"}


def rows(result: Result) -> list[Result]:
    """A row of the table for each head that `head_step.py` measured; or the result itself."""
    if "slots" not in result:
        return [result]
    heads = [head for head in HEADS if f"{head}_ms" in result]
    made: list[Result] = []
    for name in heads:
        keys = dict(ms="ms", quartiles="ms_quartiles", estimated_ms="estimated_ms", images_per_s="images_per_s",
                    peak_mb="peak_mb", planned_mb="planned_mb")
        row = {title: result.get(f"{name}_{key}", "") for title, key in keys.items()}
        of_f2c = round(result[f"{name}_ms"] / result["f2c_ms"], 2) if "f2c" in heads else ""
        precision = "" if result["fp16"] else "float32"
        made.append({"network": result.get("network") or "", "precision": precision, "identities": result["identities"],
                     "slots": result["slots"], "head": name, **row, "time / f2c": of_f2c})
    return made


def table(results: list[Result]) -> str:
    """A Markdown table; without the columns that are empty."""
    lines = [row for each in results for row in rows(each)]
    columns = [key for key in lines[0] if any(row[key] != "" for row in lines)]

    def text(value: Any) -> str:
        if isinstance(value, list):
            return " to ".join(map(text, value))
        return f"{value:,}" if isinstance(value, (int, float)) else str(value)

    made = [columns, ["---"] * len(columns), *([text(row[key]) for key in columns] for row in lines)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in made)


def page(report: Result, picture: str | None) -> str:
    """The results for people."""
    setting = f"PyTorch {report['versions']['torch']}, {report['ranks']} rank(s), commit {report['commit']}."
    parts = [f"# {report['machine']}",
             f"{setting} Milliseconds a step, medians and quartiles; peak MB; and what `f2c-plugin plan` says of them."]
    for name, results in report["parts"].items():
        parts += [f"## {TITLES[name]}", table(results) if results else "nothing could be measured"]
    if picture:
        parts.append(f"![Time and memory of a step against the number of identities]({picture})")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--ranks", type=int, default=1, help="GPUs")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--minutes", type=float, default=11, help="after which what is left is left out")
    parser.add_argument("--small", action="store_true", help="only to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU: --small --device cpu only shows that every line runs")
    machine = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.machine()
    arguments.end = time.monotonic() + 60 * arguments.minutes
    report: Result = provenance() | dict(machine=machine, ranks=arguments.ranks, parts={})
    name = "gpu_" + re.sub(r"\W+", "_", machine).strip("_").lower()
    arguments.out.mkdir(parents=True, exist_ok=True)
    picture = None
    for part in arguments.parts:
        start = time.perf_counter()
        results = report["parts"][part] = PARTS[part](arguments)
        print(f"{TITLES[part]} ({time.perf_counter() - start:.0f} s)\n\n{table(results)}\n" if results else "", flush=True)
        if part == "head" and results:
            picture = f"{name}.png"
            plot(results, arguments.out / picture)
        # After each part, so that what has been measured is not lost with the rest.
        (arguments.out / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
        (arguments.out / f"{name}.md").write_text(page(report, picture))
    print(arguments.out / f"{name}.md")


if __name__ == "__main__":
    main()
