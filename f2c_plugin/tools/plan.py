"""What the heads need of a GPU's memory, worked out from sizes alone.

The pool's share follows from its shapes. How many matrices of which size are held at the peak has been
measured; ``benchmarks/head_step.py`` prints what is planned here beside what it measures. The
optimizer is SGD with momentum and weight decay, as the host's; classes and gradients are float32.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from f2c_plugin.models import NETWORKS, get_model
from f2c_plugin.config import F2CConfig
from f2c_plugin.errors import ConfigError
from f2c_plugin.method.loss import default_hard_negatives
from f2c_plugin.method.pool_softmax import CHUNK_ENTRIES

EMBEDDING_SIZE = 512
_FLOAT = 4
_INT32, _INT64 = 4, 8


@dataclass(frozen=True)
class Plan:
    """A training to be planned.

    Attributes:
        identities: N.
        gpus: W.
        network: one of the built-in host's.
        batch_size: images of a GPU and step.
        pool_rate, pool_dtype, shard_pool: as in F2CConfig.
    """

    identities: int
    gpus: int = 8
    network: str = "r100"
    batch_size: int = 128
    pool_rate: float = 0.1
    pool_dtype: str = "float32"
    shard_pool: bool = False

    def __post_init__(self):
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
        """K."""
        return F2CConfig(pool_rate=self.pool_rate).num_slots(self.identities)

    def pool(self) -> int:
        """Bytes of the pool's rows on each GPU: 2 · K · D, over W if sharded."""
        rows = -(-self.slots // self.gpus) if self.shard_pool else self.slots
        return 2 * rows * EMBEDDING_SIZE * getattr(torch, self.pool_dtype).itemsize

    def slot_table(self) -> int:
        """Bytes that say who is where: 4 an identity; owner, recency and due row of every slot."""
        return _INT32 * (self.identities + 1) + 3 * _INT64 * self.slots

    def gallery_net(self) -> int:
        """Bytes of the gallery net's parameters and buffers."""
        with torch.device("meta"):
            net = get_model(self.network, EMBEDDING_SIZE)
        return sum(tensor.nbytes for tensor in net.state_dict().values())

    def working_memory(self, device: str = "cuda") -> int:
        """Bytes that a step of the F²C head takes for a while: a chunk of logits, and what the slots apart need."""
        probes = self.batch_size
        own = probes * self.gpus if self.shard_pool else probes
        apart = own + probes * self.gpus  # slots of the probes' own identities, slots written
        hardest_rows = 8 * probes * default_hard_negatives(self.slots) * EMBEDDING_SIZE
        cosines_apart = 12 * 2 * probes * apart  # two views
        return _FLOAT * (3 * CHUNK_ENTRIES[device] + max(hardest_rows, cosines_apart))

    def f2c(self, device: str = "cuda") -> int:
        """Bytes of the F²C head on each GPU at the peak, beside the gallery net."""
        return self.pool() + self.slot_table() + self.working_memory(device)

    def partial_fc(self, sample_rate: float) -> int:
        """Bytes of the host's Partial FC on each GPU at the peak; at sample rate 1 it is the full FC layer, split.

        The peak is the highest of three: the optimizer's step (weight, gradient, momentum, gradient
        with weight decay), the backward pass through the normalised weights, and that through
        the logits of all GPUs' batches.
        """
        classes = -(-self.identities // self.gpus)
        rate = sample_rate
        if rate < 1:
            optimizer, weights, at_logits = 4 + rate, 2 + 6 * rate, 2 + 2 * rate
        else:  # nothing is copied out of the weights
            optimizer, weights, at_logits = 4, 7, 3
        matrix = classes * EMBEDDING_SIZE
        logits = 4 * self.batch_size * self.gpus * rate * classes
        return int(_FLOAT * max(optimizer * matrix, weights * matrix, at_logits * matrix + logits))

    def table(self) -> list[tuple[str, int]]:
        """(what, bytes on each GPU)."""
        return [
            (f"F²C, {self.slots:,} slots", self.f2c() + self.gallery_net()),
            ("  pool, two rows a slot" + (", sharded" if self.shard_pool else ""), self.pool()),
            ("  slot table", self.slot_table()),
            ("  working memory", self.working_memory()),
            (f"  gallery net ({self.network})", self.gallery_net()),
            (f"Partial FC, sample rate {self.pool_rate:g}", self.partial_fc(self.pool_rate)),
            ("full FC, split over the GPUs", self.partial_fc(1.0)),
        ]


def draw(plan: Plan, path) -> None:
    """Draw memory per GPU against the number of identities, around the plan's. Needs matplotlib."""
    from f2c_plugin.tools.plotting import pyplot

    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    plans, gallery_net = [], plan.gallery_net()
    for identities in plan.identities * np.logspace(-1, 1, 21):
        try:
            plans.append(replace(plan, identities=int(identities)))
        except ConfigError:  # so few that the pool would be smaller than a batch
            continue
    for label, size in ((f"F²C, pool rate {plan.pool_rate:g}, gallery net {plan.network}", lambda p: p.f2c() + gallery_net),
                        (f"Partial FC, sample rate {plan.pool_rate:g}", lambda p: p.partial_fc(p.pool_rate)),
                        ("full FC", lambda p: p.partial_fc(1.0))):
        axis.loglog([each.identities for each in plans], [size(each) / 2**30 for each in plans], label=label)
    axis.axvline(plan.identities, color="grey", linestyle=":")
    axis.set(title=f"the head on each of {plan.gpus} GPUs, batch {plan.batch_size}", xlabel="identities", ylabel="GiB")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
