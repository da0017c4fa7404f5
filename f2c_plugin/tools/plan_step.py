"""Whole training steps, with each head: the memory of each GPU, which heads fit, and how long they take.

The trainings planned are arcface_torch's and the built-in trainer's: SGD with momentum, and with several GPUs DDP, which
keeps a second copy of the gradients in its buckets.
"""

from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from f2c_plugin.errors import ConfigError
from f2c_plugin.tools import plan_time
from f2c_plugin.tools.net_costs import CostsByBatch, NetCosts
from f2c_plugin.tools.plan import Plan, mb
from f2c_plugin.tools.plan_time import HEADS, Milliseconds
from f2c_plugin.tools.plotting import pyplot, save_figure

# What a GPU holds beside PyTorch's tensors, an estimate: CUDA's context and kernels, NCCL, cuDNN's workspaces, gaps between
# tensors. Of these only the workspaces were measured, about 100 MB.
BESIDE = 3 * 2**29
_EQUAL = 1.05  # ratio of times within which two heads are about equal


def parts(plan: Plan, costs: NetCosts) -> dict[str, tuple[int, str]]:
    """{what: (bytes of each GPU, source)} of a step without a head."""
    return {"parameters": (costs.parameters, "counted"), "momentum": (costs.gradients, "counted"),
            "DDP's buckets": (costs.gradients if plan.gpus > 1 else 0, "counted"),
            "images, this batch and the next": (2 * costs.images, "counted"),
            "activations and gradients": (costs.peak, "counted"),
            "CUDA, workspaces, gaps": (BESIDE, "estimated")}


def memory(plan: Plan, costs_of: CostsByBatch, name: str) -> int:
    """Bytes of each GPU at the peak, with the head ``name`` of HEADS, or of the "backbone" alone.

    The peak is at the beginning of the backward pass, when all activations are alive, or in the optimizer's step, which in
    arcface_torch holds a copy of the gradients with weight decay. The gallery net's forward pass comes before the probe net's,
    and holds less than that one does later. With DCQ the probe net sees half of the batch.
    """
    costs = costs_of(plan.batch_size)
    peak = costs_of(plan.batch_size // 2).peak if name == "dcq" else costs.peak
    if name in ("partial_fc", "full_fc"):
        at_backward, at_optimizer = plan.partial_fc_moments(plan.pool_rate if name == "partial_fc" else 1.0)
    elif name == "f2c":
        at_backward = at_optimizer = replace(plan, recipe="resident").f2c()
    elif name == "backbone":
        at_backward = at_optimizer = 0
    else:
        head = plan.dcq() if name == "dcq" else replace(plan, recipe="paper").f2c()
        at_backward = at_optimizer = head + costs.parameters
    always = sum(size for size, _ in parts(plan, costs).values()) - costs.peak
    return always + max(peak + at_backward, 2 * costs.gradients + at_optimizer)


def largest_batch(plan: Plan, costs_of: CostsByBatch, name: str, gpu_memory: int) -> int:
    """The largest even batch of each GPU that fits; 0 if none does."""
    def fits(batch_size: int) -> bool:
        with suppress(ConfigError):  # the pool would be smaller than a batch
            return memory(replace(plan, batch_size=batch_size), costs_of, name) <= gpu_memory
        return False

    of_a_pair = costs_of(4).peak - costs_of(2).peak
    low, high = 0, 2 * gpu_memory // of_a_pair
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(2 * middle) else (low, middle - 1)
    return 2 * low


@dataclass(frozen=True)
class HeadStep:
    """A whole step with a head.

    Attributes:
        head: of HEADS, or "backbone".
        memory: bytes of each GPU.
        fits: whether the GPU has them.
        largest_batch: of each GPU, that would fit.
        time: of a step on an H200.
    """

    head: str
    memory: int
    fits: bool
    largest_batch: int
    time: Milliseconds


class StepPlan:
    """Whole steps of a training with each head that it can have.

    Args:
        plan: the training. Both recipes are planned, whatever its own.
        gpu_memory: of each GPU, GB of 2**30 bytes.
    Attributes:
        steps: of the backbone alone first.
        refused: {head: why it cannot have this training}.
    Raises:
        ConfigError: the GPU has no memory, or the net cannot be counted.
    """

    def __init__(self, plan: Plan, gpu_memory: float):
        if not 0.01 <= gpu_memory <= 10_000:
            raise ConfigError(f"--gpu-memory {gpu_memory:g}: must be from 0.01 to 10,000 GB")
        self.plan, self.gpu_memory = plan, int(gpu_memory * 2**30)
        costs_of = CostsByBatch(plan.network, plan.embedding_size, plan.batch_size, plan.fp16)
        self.costs_of, self.costs = costs_of, costs_of(plan.batch_size)
        self.steps: list[HeadStep] = []
        self.refused: dict[str, str] = {}
        for name in ("backbone", *HEADS):
            try:
                size, largest = memory(plan, costs_of, name), largest_batch(plan, costs_of, name, self.gpu_memory)
                self.steps.append(HeadStep(name, size, size <= self.gpu_memory, largest,
                                           plan_time.step(plan, name, self.costs)))
            except ConfigError as error:
                self.refused[name] = str(error)

    def verdict(self) -> str:
        """Which heads fit, and which of these is fastest; DCQ is by itself, because half of its images get no loss."""
        card = f"{self.gpu_memory / 2**30:g} GB"
        heads = self.steps[1:]
        fitting = sorted((step for step in heads if step.fits), key=lambda step: step.time)
        if not fitting:
            best = max(heads, key=lambda step: (step.largest_batch > 0 and step.head != "dcq", step.largest_batch))
            remedy = (f"lower the batch to {best.largest_batch}, for {HEADS[best.head]}" if best.largest_batch else
                      "take a smaller network or larger GPUs")
            return f"No head fits {card}: {remedy}."
        fit = f"All heads fit {card}" if len(fitting) == len(HEADS) else (
            f"{_listed([step for step in heads if step.fits])} {'fit' if len(fitting) > 1 else 'fits'} {card}")
        compared = [step for step in fitting if step.head != "dcq"]
        if not compared:
            return f"{fit}."
        shortest = compared[0].time.value
        fastest = [step for step in compared if step.time.value <= _EQUAL * shortest]
        speed = _listed(fastest) + (" are about equally fast" if len(fastest) > 1 else " is fastest")
        slower = [f"{HEADS[step.head]} takes {step.time.value / shortest:.1f} times as long"
                  for step in compared[len(fastest):]]
        said = ", ".join([speed, *slower])
        if queue := next((step for step in fitting if step.head == "dcq"), None):
            said = (f"of those that learn from every image {said}; DCQ, which learns from half of them, takes "
                    f"{queue.time.value / shortest:.1f} times as long")
        return f"{fit}; {said}."

    def report(self) -> str:
        """In lines for people."""
        plan, card = self.plan, f"{self.gpu_memory / 2**30:g} GB"
        low, high = plan_time.RANGE_OF_STEPS
        title = f"a whole step of {plan.network}, {'mixed precision' if plan.fp16 else 'float32'}"
        lines = [f"{title}, without a head"]
        lines += [f"  {what:<34} {mb(size):>14}  {source}" for what, (size, source) in parts(plan, self.costs).items() if size]
        lines += [f"{title}: all of these and the head, and the time on an H200"
                  + (", without what GPUs exchange" if plan.gpus > 1 else ""),
                  f"  {'':<18}{'memory':>12}{card:>9}{'largest batch':>15}{'ms':>9}{'':<12}{'of no head':>10}"]
        alone = self.steps[0].time.value
        lines += [f"  {HEADS.get(step.head, 'no head'):<18}{mb(step.memory):>12}{'fits' if step.fits else 'no':>9}"
                  f"{step.largest_batch:>15,}{step.time.value:>9.1f}  {step.time.source:<10}{step.time.value / alone:>10.2f}"
                  for step in self.steps]
        lines += [f"  {HEADS[name]:<18}{reason}" for name, reason in self.refused.items()]
        return "\n".join([*lines, f"What was measured on an H200, r50 and r100 in mixed precision, took {low} to {high} times "
                                  "what is estimated."])

    def summary(self) -> dict[str, Any]:
        """All figures, for JSON; memory in bytes."""
        plan = self.plan
        steps = [{"head": step.head, "memory": _figure(step.memory, "estimated"), "fits": step.fits,
                  "largest_batch": _figure(step.largest_batch, "estimated"), "milliseconds": step.time._asdict()}
                 for step in self.steps]
        return asdict(plan) | {
            "gpu_memory": self.gpu_memory, "head": {what.strip(): _figure(size, source) for what, size, source in plan.table()},
            "without_head": {what: _figure(*size) for what, size in parts(plan, self.costs).items()},
            "flops": _figure(self.costs.flops, "counted"), "steps": steps, "refused": self.refused,
            "measured_by_estimated": plan_time.RANGE_OF_STEPS,
            "verdict": [self.verdict(), plan.verdict()]}


def _figure(value: int, source: str) -> dict[str, int | str]:
    return {"value": value, "source": source}


def _listed(steps: list[HeadStep]) -> str:
    *names, last = (HEADS[step.head] for step in steps)
    return f"{', '.join(names)} and {last}" if names else last


def draw(planned: StepPlan, path: str | Path) -> None:
    """Draw memory and time of a step against the number of identities, around the plan's. Needs matplotlib."""
    plan, costs, costs_of = planned.plan, planned.costs, planned.costs_of
    plans = [replace(plan, identities=max(1, int(identities))) for identities in plan.identities * np.logspace(-1, 1, 21)]
    figure, axes = pyplot().subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    names = [step.head for step in planned.steps[1:]]
    for axis, label, value in ((axes[0], "GB of each GPU", lambda p, name: memory(p, costs_of, name) / 2**30),
                               (axes[1], "ms a step on an H200", lambda p, name: plan_time.estimate(p, name, costs))):
        for name in names:
            shown: dict[int, float] = {}
            for each in plans:
                with suppress(ConfigError):  # too few: the pool would be smaller than a batch
                    memory(each, costs_of, name)
                    shown[each.identities] = value(each, name)
            axis.semilogx([*shown], [*shown.values()], label=HEADS[name])
        axis.axhline(value(plan, "backbone"), color="black", linestyle=":", label="no head")
        axis.axvline(plan.identities, color="grey", linestyle=":")
        axis.set(xlabel="identities", ylabel=label, ylim=(0, None))
        axis.grid(alpha=0.3, which="both")
    if (gpu_memory := planned.gpu_memory / 2**30) < axes[0].get_ylim()[1]:  # else the curves would be flat below it
        axes[0].axhline(gpu_memory, color="grey", linestyle="--", label="memory of a GPU")
    gpus = f"each of {plan.gpus} GPUs" if plan.gpus > 1 else "one GPU"
    figure.suptitle(f"a step of {plan.network} on {gpus}, batch {plan.batch_size}, rate {plan.pool_rate:g}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save_figure(figure, path)
