"""The memory that the heads need on each GPU, worked out from sizes.

State follows from shapes. How many temporary matrices are alive at the peak was counted in each step's
code and checked against measurements: ``benchmarks/head_step.py`` prints the plan beside what it
measures. The optimizer is SGD with momentum and weight decay, as arcface_torch's; classes and gradients
are float32.
"""

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from f2c_plugin.config import F2CConfig
from f2c_plugin.errors import ConfigError
from f2c_plugin.method.loss import default_hard_negatives
from f2c_plugin.method.pool_softmax import CHUNK_ENTRIES
from f2c_plugin.models import NETWORKS, get_model
from f2c_plugin.tools.plotting import pyplot, save_figure

EMBEDDING_SIZE = 512
SIMILAR = 1.25  # ratio of memory within which two heads are about equal
_FLOAT, _INT32, _INT64 = 4, 4, 8  # bytes


@dataclass(frozen=True)
class Plan:
    """A training to plan. The pool's settings are those of F2CConfig. All sizes are bytes on each GPU."""

    identities: int
    gpus: int = 8
    network: str = "r100"  # one of NETWORKS
    batch_size: int = 128  # images per GPU
    pool_rate: float = 0.1
    pool_dtype: str = "float32"
    shard_pool: bool = False

    def __post_init__(self) -> None:
        problems = [f"--{name.replace('_', '-')} {getattr(self, name)}: must be above 0"
                    for name in ("identities", "gpus") if getattr(self, name) < 1]
        if self.network not in NETWORKS:
            problems.append(f"--network {self.network}: must be one of {', '.join(NETWORKS)}")
        if problems:
            raise ConfigError("\n".join(problems))
        F2CConfig.read({"f2c_pool_rate": self.pool_rate, "f2c_pool_dtype": self.pool_dtype, "batch_size": self.batch_size,
                        "num_classes": self.identities}, self.gpus)

    @property
    def slots(self) -> int:
        return F2CConfig(pool_rate=self.pool_rate).num_slots(self.identities)

    def pool(self) -> int:
        """The pool's rows: 2 · slots · embedding size, divided among the GPUs if sharded."""
        rows = -(-self.slots // self.gpus) if self.shard_pool else self.slots
        return 2 * rows * EMBEDDING_SIZE * getattr(torch, self.pool_dtype).itemsize

    def slot_table(self) -> int:
        """The slot of each identity, as int32; the identity, recency and next row of each slot, as int64."""
        return _INT32 * (self.identities + 1) + 3 * _INT64 * self.slots

    def gallery_net(self) -> int:
        """The gallery net's parameters and buffers."""
        with torch.device("meta"):
            net = get_model(self.network, EMBEDDING_SIZE)
        return sum(tensor.nbytes for tensor in net.state_dict().values())

    def working_memory(self, device: str = "cuda") -> int:
        """What a step of the F²C head takes for a while.

        Three chunks of logits (the logits, their softmax, its copy in the type of the product); and, not at
        the same time, the hardest negatives' rows or the cosines to the touched slots.
        """
        probes = self.batch_size
        targets = probes * self.gpus if self.shard_pool else probes
        touched = targets + probes * self.gpus  # target slots, slots written
        # Rows of the h hardest slots of every probe, gathered, in the product and in its gradient.
        hardest_rows = 8 * probes * default_hard_negatives(self.slots) * EMBEDDING_SIZE
        # Two views; cosines, their filtered and scaled copies, logits and their gradients: about 12 matrices.
        touched_cosines = 12 * 2 * probes * touched
        return _FLOAT * (3 * CHUNK_ENTRIES[device] + max(hardest_rows, touched_cosines))

    def f2c(self, device: str = "cuda") -> int:
        """The F²C head at the peak, without the gallery net."""
        return self.pool() + self.slot_table() + self.working_memory(device)

    def partial_fc(self, sample_rate: float) -> int:
        """arcface_torch's Partial FC at the peak; at sample rate 1 it is the full FC layer, split.

        In matrices of (classes of this GPU) × D, of which the weights and their momentum are always there.
        The peak is the highest of three moments: the optimizer's step (weights, momentum, gradient, gradient
        with weight decay, sampled weights), the backward pass through the normalised sampled weights, and the
        one through the logits of all GPUs' batches (four matrices of batch × sampled classes).
        """
        classes = -(-self.identities // self.gpus)
        if sample_rate < 1:
            optimizer, weights, at_logits = 4 + sample_rate, 2 + 6 * sample_rate, 2 + 2 * sample_rate
        else:  # nothing is copied out of the weights
            optimizer, weights, at_logits = 4, 7, 3
        matrix = classes * EMBEDDING_SIZE
        logits = 4 * self.batch_size * self.gpus * sample_rate * classes
        return int(_FLOAT * max(optimizer * matrix, weights * matrix, at_logits * matrix + logits))

    def verdict(self) -> str:
        """Which head to use, by memory, in a sentence."""
        f2c, partial_fc = self.f2c() + self.gallery_net(), self.partial_fc(self.pool_rate)
        sizes = f"{_mb(f2c)} of each GPU for F²C, {_mb(partial_fc)} for Partial FC"
        if f2c > SIMILAR * partial_fc:
            parts = {"the gallery net": self.gallery_net(), "the pool": self.pool(), "working memory": self.working_memory()}
            largest = max(parts, key=lambda part: parts[part])
            return (f"Use Partial FC: {sizes}. The largest part of F²C's is {largest}, {_mb(parts[largest])}, and F²C adds a "
                    "forward pass of the backbone to every step.")
        if f2c * SIMILAR > partial_fc:
            return f"Use Partial FC if it fits: {sizes}, and F²C adds a forward pass of the backbone to every step."
        return (f"Use F²C if memory is what you lack: {sizes}. It adds a forward pass of the backbone to every step, and saves "
                "Partial FC's passes over all classes.")

    def table(self) -> list[tuple[str, int]]:
        """(what, its size)."""
        return [
            (f"F²C, {self.slots:,} slots", self.f2c() + self.gallery_net()),
            ("  pool, two rows a slot" + (", sharded" if self.shard_pool else ""), self.pool()),
            ("  slot table", self.slot_table()), ("  working memory", self.working_memory()),
            (f"  gallery net ({self.network})", self.gallery_net()),
            (f"Partial FC, sample rate {self.pool_rate:g}", self.partial_fc(self.pool_rate)),
            ("full FC, split over the GPUs", self.partial_fc(1.0)),
        ]


def draw(plan: Plan, path: str | Path) -> None:
    """Draw memory per GPU against the number of identities, around the plan's. Needs matplotlib."""
    figure, axis = pyplot().subplots(figsize=(7, 4.2), layout="constrained")
    plans: list[Plan] = []
    gallery_net = plan.gallery_net()
    for identities in plan.identities * np.logspace(-1, 1, 21):
        with suppress(ConfigError):  # too few: the pool would be smaller than a batch
            plans.append(replace(plan, identities=int(identities)))
    for label, size in ((f"F²C, pool rate {plan.pool_rate:g}, gallery net {plan.network}", lambda p: p.f2c() + gallery_net),
                        (f"Partial FC, sample rate {plan.pool_rate:g}", lambda p: p.partial_fc(p.pool_rate)),
                        ("full FC", lambda p: p.partial_fc(1.0))):
        axis.loglog([each.identities for each in plans], [size(each) / 2**30 for each in plans], label=label)
    axis.axvline(plan.identities, color="grey", linestyle=":")
    axis.set(title=f"the head on each of {plan.gpus} GPUs, batch {plan.batch_size}", xlabel="identities", ylabel="GiB")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    save_figure(figure, path)


def _mb(size: float) -> str:
    return f"{size / 2**20:,.0f} MB"
