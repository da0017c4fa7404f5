"""The memory that the heads need on each GPU, worked out from sizes. For whole steps see ``plan_step``.

State follows from shapes. How many temporary matrices are alive at the peak was counted: tests compare the
F²C head with what a stand-in for a GPU counts, and ``benchmarks/head_step.py`` prints the plan beside what it
measures on a CPU. The optimizer is SGD with momentum and weight decay, as arcface_torch's; classes and gradients
are float32.
"""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from f2c_plugin.config import F2CConfig, problems as config_problems
from f2c_plugin.errors import ConfigError
from f2c_plugin.method.loss import default_hard_negatives
from f2c_plugin.method.pool_softmax import CHUNK_ENTRIES, are_kept, num_parts
from f2c_plugin.models import get_model_on_meta, networks

SIMILAR = 1.25  # ratio of memory within which two heads are about equal
_FLOAT, _INT32, _INT64 = 4, 4, 8  # bytes
# What the published step holds beside once it is recorded: not counted, but measured on an H200, with 100,000 and 200,000
# slots. Libraries take memory for the stream of a recording.
_RECORDED_PAPER = 50 * 2**20
_MOST = {"identities": 10**10, "gpus": 10**6, "batch_size": 10**6, "queue_size": 10**9, "embedding_size": 2**16}
# Keys of a config, and the options that give them.
_OPTIONS = {"f2c_pool_rate=": "--pool-rate ", "f2c_pool_dtype=": "--pool-dtype ", "f2c_recipe=": "--recipe ",
            "f2c_shard_pool=": "--shard-pool ", "batch_size=": "--batch-size ", "num_classes=": "--identities "}


@dataclass(frozen=True)
class Plan:
    """A training to plan. The pool's settings are those of F2CConfig. All sizes are bytes on each GPU."""

    identities: int
    gpus: int = 8
    network: str = "r100"  # one of networks()
    batch_size: int = 128  # images per GPU
    pool_rate: float = 0.1
    pool_dtype: str = "float32"
    recipe: str = "resident"
    shard_pool: bool = False
    fp16: bool = True  # mixed precision
    queue_size: int = F2CConfig.queue_size
    embedding_size: int = 512  # D

    def __post_init__(self) -> None:
        problems = [f"--{name.replace('_', '-')} {getattr(self, name)}: must be from 1 to {most:,}"
                    for name, most in _MOST.items() if not 1 <= getattr(self, name) <= most]
        if self.network not in networks():
            problems.append(f"--network {self.network}: must be one of {', '.join(networks())}")
        problems += self._problems({"f2c_pool_rate": self.pool_rate, "f2c_pool_dtype": self.pool_dtype,
                                    "f2c_recipe": self.recipe})
        if problems:
            raise ConfigError("\n".join(problems))

    def _problems(self, keys: dict[str, Any]) -> list[str]:
        """What is wrong with the keys of a config that these options stand for, in the words of the options."""
        found = "\n".join(config_problems(keys, self.gpus))
        for key, option in _OPTIONS.items():
            found = found.replace(key, option)
        return found.splitlines()

    def check_pool(self) -> None:
        """Raise ConfigError if the pool has no room for a batch, or the recipe splits batches and this one is odd."""
        keys = {"f2c_pool_rate": self.pool_rate, "batch_size": self.batch_size, "f2c_recipe": self.recipe,
                "num_classes": self.identities, "f2c_shard_pool": self.shard_pool}
        if found := self._problems(keys):
            raise ConfigError("\n".join(found))

    @property
    def slots(self) -> int:
        return F2CConfig(pool_rate=self.pool_rate).num_slots(self.identities)

    @property
    def is_resident(self) -> bool:
        return self.recipe == "resident"

    def pool(self) -> int:
        """The pool's rows, slots · embedding size, divided among the GPUs if sharded; two as published, else with lengths."""
        rows = -(-self.slots // self.gpus) if self.shard_pool or self.is_resident else self.slots
        return rows * (self._weight() + _FLOAT) if self.is_resident else rows * 2 * self._weight()

    def _weight(self) -> int:
        return self.embedding_size * getattr(torch, self.pool_dtype).itemsize

    def kept_weights(self) -> int:
        """The weights of all identities, in the main memory of all machines together, or in files."""
        return self.identities * self._weight() if self.is_resident else 0

    def slot_table(self) -> int:
        """The slot of each identity, as int32; of each slot identity and recency, as published the next row, too, as int64."""
        return _INT32 * (self.identities + 1) + (2 if self.is_resident else 3) * _INT64 * self.slots

    def gallery_net(self) -> int:
        """The gallery net's parameters and buffers; 0 without one."""
        return 0 if self.is_resident else self._copied_net()

    def _copied_net(self) -> int:
        return sum(tensor.nbytes for tensor in get_model_on_meta(self.network, self.embedding_size).state_dict().values())

    def working_memory(self, device: str = "cuda") -> int:
        """What a step of the F²C head takes for a while.

        On a GPU, with the fused kernels: for each part of the slots, of which there is about one for each multiprocessor
        and block of probes, a vector for each probe; and a few vectors for each image of all GPUs. As published, the
        touched slots' rows in both views, and, not at the same time as the parts, the hardest negatives' rows. In float32,
        where PyTorch's operators make the passes: 2.5 chunks of logits, and vectors for each image. On the CPU: 3
        chunks of logits, and the hardest negatives' rows or the cosines to the touched slots; where slots learn, 4 chunks, and
        the logits, if they are few enough to be kept.
        """
        probes, gathered = self.batch_size, self.batch_size * self.gpus
        hardest_rows = probes * default_hard_negatives(self.slots) * self.embedding_size
        # Sharded, each GPU scores the probes of all.
        scored = gathered if self.shard_pool or self.is_resident else probes
        touched = scored + gathered  # as published: target slots, slots written
        if device == "cpu" and self.is_resident:
            logits = -(-self.slots // self.gpus) * gathered
            kept = logits if are_kept(logits, device) else 0
            return _FLOAT * (max(4 * CHUNK_ENTRIES[device], 8 * gathered * self.embedding_size) + kept)
        if device == "cpu":
            # Two views; cosines, their filtered and scaled copies, logits and their gradients: about 12 matrices.
            return _FLOAT * (3 * CHUNK_ENTRIES[device] + max(8 * hardest_rows, 12 * 2 * probes * touched))
        if not self.fp16:
            logits = scored * (-(-self.slots // self.gpus) if scored == gathered else self.slots)
            return int(_FLOAT * (2.5 * min(CHUNK_ENTRIES[device], logits) + 16 * gathered * self.embedding_size))
        parts = num_parts(-(-self.slots // self.gpus) if scored == gathered else self.slots, scored)
        vectors = parts * scored
        if self.is_resident:
            return _FLOAT * self.embedding_size * (vectors + 5 * gathered)
        return _FLOAT * (max(vectors * self.embedding_size, 4 * hardest_rows) + 8 * touched * self.embedding_size)

    def recording(self, device: str = "cuda") -> int:
        """What a recorded step holds beside its working memory."""
        return 0 if self.is_resident or device == "cpu" else _RECORDED_PAPER

    def f2c(self, device: str = "cuda") -> int:
        """The F²C head at the peak, without the gallery net. Raises ConfigError as ``check_pool``."""
        self.check_pool()
        return self.pool() + self.slot_table() + self.working_memory(device) + self.recording(device)

    def dcq(self) -> int:
        """The DCQ head at the peak, without the gallery net. It has no table of all identities.

        A step takes, for each probe and class weight of the queue, cosines, logits, their gradients and what makes them,
        5.25 float32 in all; the queue in float32, if it is not kept so; and the features gathered.

        Raises:
            ConfigError: an odd batch, or a queue without room for a batch.
        """
        if self.batch_size % 2:
            raise ConfigError(f"--batch-size {self.batch_size}: DCQ splits a batch into two halves: make it even")
        if self.queue_size < (entering := self.batch_size // 2 * self.gpus):
            raise ConfigError(f"--queue-size {self.queue_size}: a gathered batch brings {entering} class weights: raise it")
        queue = self.queue_size * (self._weight() + 2 * _INT64)
        copied = 0 if self.pool_dtype == "float32" else self.queue_size * self.embedding_size
        probes = self.batch_size // 2
        gathered = (1 + self.gpus) * probes * self.embedding_size
        return queue + int(_FLOAT * (5.25 * probes * self.queue_size + copied + gathered))

    def partial_fc(self, sample_rate: float) -> int:
        """arcface_torch's Partial FC at the peak; at sample rate 1 it is the full FC layer, split."""
        return max(self.partial_fc_moments(sample_rate))

    def partial_fc_moments(self, sample_rate: float) -> tuple[int, int]:
        """Partial FC at its peak before the backbone's backward pass, and in the optimizer's step.

        In matrices of (classes of this GPU) × D, of which the weights and their momentum are always there.
        The first is the highest of three moments: the backward pass through the normalised sampled weights, the
        one through the logits of all GPUs' batches (four matrices of batch × sampled classes), and the gradient of
        all classes beside that of the sampled ones. The optimizer has weights, momentum, gradient, gradient
        with weight decay, and the sampled weights.
        """
        classes = -(-self.identities // self.gpus)
        if sample_rate < 1:
            optimizer, weights, at_logits = 4 + sample_rate, max(2 + 6 * sample_rate, 3 + sample_rate), 2 + 2 * sample_rate
        else:  # nothing is copied out of the weights
            optimizer, weights, at_logits = 4, 7, 3
        matrix = classes * self.embedding_size
        logits = 4 * self.batch_size * self.gpus * sample_rate * classes
        return int(_FLOAT * max(weights * matrix, at_logits * matrix + logits)), int(_FLOAT * optimizer * matrix)

    def verdict(self) -> str:
        """Which head to use, by memory, in a sentence; or why it cannot be F²C."""
        try:
            self.check_pool()
        except ConfigError as error:
            return f"No pool of F²C: {error}."
        f2c, partial_fc = self.f2c() + self.gallery_net(), self.partial_fc(self.pool_rate)
        sizes = f"{mb(f2c)} of each GPU for F²C, {mb(partial_fc)} for Partial FC"
        more = (f"F²C keeps {mb(self.kept_weights())} of class weights in main memory" if self.is_resident else
                "F²C adds a forward pass of the backbone to every step")
        if f2c > SIMILAR * partial_fc:
            parts = {"the gallery net": self.gallery_net(), "the pool": self.pool(), "working memory": self.working_memory()}
            largest = max(parts, key=lambda part: parts[part])
            return f"Use Partial FC: {sizes}. The largest part of F²C's is {largest}, {mb(parts[largest])}, and {more}."
        if f2c * SIMILAR > partial_fc:
            return f"By memory, either: {sizes}. {more}."
        return f"Use F²C if memory is what you lack: {sizes}. {more}, and saves Partial FC's passes over all classes."

    def table(self) -> list[tuple[str, int, str]]:
        """(what, its size, source): states are counted, from their shapes; peaks are estimated."""
        rows: list[tuple[str, int, str]] = []
        with suppress(ConfigError):
            pool = "pool" if self.is_resident else "pool, two rows a slot"
            shared = self.gpus > 1 and (self.is_resident or self.shard_pool)
            rows += [(f"F²C, {self.slots:,} slots", self.f2c() + self.gallery_net(), "estimated"),
                     (f"  {pool}" + (", shared by the GPUs" if shared else ""), self.pool(), "counted"),
                     ("  slot table", self.slot_table(), "counted"), ("  working memory", self.working_memory(), "estimated")]
            if self.is_resident:
                rows.append(("  in main memory: class weights", self.kept_weights(), "counted"))
            else:
                rows += [("  recorded step", self.recording(), "measured"),
                         (f"  gallery net ({self.network})", self.gallery_net(), "counted")]
        with suppress(ConfigError):
            rows += [(f"DCQ, {self.queue_size:,} class weights", self.dcq() + self._copied_net(), "estimated"),
                     (f"  gallery net ({self.network})", self._copied_net(), "counted")]
        return [*rows, (f"Partial FC, sample rate {self.pool_rate:g}", self.partial_fc(self.pool_rate), "estimated"),
                ("full FC, split over the GPUs", self.partial_fc(1.0), "estimated")]


def mb(size: float) -> str:
    """A number of bytes for people."""
    return f"{size / 2**20:,.0f} MB"
