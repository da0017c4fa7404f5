"""Checkpoints of the built-in trainer: one file for all ranks, whole or absent, good for any number of ranks."""

import errno
import hashlib
import logging
import os
import random
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import distributed, nn

from f2c_plugin.config import DCQ, Config, TrainConfig, with_defaults
from f2c_plugin.data.identities import IdentityIndex
from f2c_plugin.data.sampler import DualSampler, Position
from f2c_plugin.errors import CheckpointError, ConfigError, TrainingDiverged
from f2c_plugin.trainer.output import checkpoints_in, write_states
from f2c_plugin.utils.distributed import this_rank
from f2c_plugin.utils.finite import not_finite, some
from f2c_plugin.utils.safe_load import load_states
from f2c_plugin.utils.schema import FORMAT, is_plain, problems

log = logging.getLogger(__name__)

KEPT = 2
_NAME = "checkpoint_{:012d}.pt"  # of the images seen: they only grow, while steps shrink with more ranks
# What identifies the batches of a training: they come again only if all of these are as they were.
_Layout = tuple[int, int, int, int]  # ranks, batch size, pairs per step, seed
_PACK_SAMPLES = 1 << 12  # images that identify a pack

# A checkpoint with another value of one of these, or of another pack, does not fit.
SAME_TRAINING = ("head", "network", "embedding_size", "num_classes", "num_image", "optimizer", "f2c_pool_rate",
                 "f2c_margin", "f2c_recipe", "f2c_sub_centers", "f2c_forget_rate", "f2c_low_resolution",
                 "f2c_queue_size", "f2c_gallery_images")
# Other changes are reported, margin_list and lr among them, except those that change nothing in the training.
NOT_REPORTED = ("resume", "output", "rec", "val_targets", "frequent", "verbose", "num_workers", "save_all_states",
                "f2c_save_every")


def save_due(cfg: Config, step: int, num_steps: int, total_steps: int) -> bool:
    """Whether the config asks for a checkpoint after ``step``, with ``num_steps`` in an epoch."""
    every = cfg.get("f2c_save_every")
    return bool((every and (step % every == 0 or step == total_steps)) or (cfg["save_all_states"] and step % num_steps == 0))


class Checkpoints:
    """The checkpoints in ``config.output``; the last two good ones are kept.

    A damaged one counts for nothing: it stays until there are two newer good ones, or until the training
    comes to its step again and replaces it. Which are good is known without reading them again: the one that
    the training has resumed from, and those that it has written since.

    All ranks call the methods together. Rank 0 writes one file for all of them: nets, optimizer,
    scaler, head (a sharded pool as a whole), the position in the training and in each pass over the
    data, and the random states of every rank.

    Args:
        cfg: the config.
        parts: what has a state, by name: "backbone", "head", "optimizer", "scaler".
        sampler: the DualSampler.
    """

    def __init__(self, cfg: TrainConfig, parts: dict[str, Any], sampler: DualSampler):
        self.cfg, self.parts, self.sampler = cfg, parts, sampler
        self.folder = Path(cfg.output)
        self.rank, world_size = this_rank()
        self.images_per_step = cfg.batch_size * world_size
        self.layout: _Layout = (world_size, cfg.batch_size, sampler.pairs_per_step, sampler.seed)
        self.settings = {key: value for key, value in cfg.items() if is_plain(value)}
        self.pack = pack_digest(sampler.index)
        self.good: list[Path] = []

    def begin(self) -> tuple[int, float]:
        """Where the training begins: (steps done, seconds spent), (0, 0.0) for a new one.

        ``config.resume`` True goes on from the newest whole checkpoint; "auto" does if there is one,
        and so does a training that torchrun has restarted.

        Raises:
            ConfigError: there is no checkpoint; it belongs to another training: the pack or a key in SAME_TRAINING
                differs (other differences are logged); or a new training would overwrite an earlier one's.
        """
        found, refusal = None, None
        # Of two nodes, one that has come back does not know that the training had begun.
        restarted = any(_of_all_ranks(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0))
        if self.rank == 0:  # one rank decides for all
            try:
                found = self._find(restarted)
            except ConfigError as error:
                refusal = str(error)
        found, refusal = _from_rank_0((found, refusal))
        if refusal:
            raise ConfigError(refusal)
        if found is None:
            return 0, 0.0
        if not found.is_file():
            raise ConfigError(f"{found}: rank 0 sees this checkpoint and rank {self.rank} does not: put config.output "
                              "where all nodes see it")
        self.good = [found]
        return self._load(found)

    def _find(self, restarted: bool) -> Path | None:
        files = checkpoints_in(self.folder)
        if not self.cfg.resume and not restarted:
            if files:
                raise ConfigError(f"resume=False, but {self.folder} holds checkpoints of an earlier training, which this one "
                                  f"would replace ({files[0].name}): set resume=True to go on from them, choose another "
                                  "output, or delete them")
            return None
        for file in files:
            try:
                _check(load_states(file), file)
                return file
            except CheckpointError as error:
                log.warning("%s; the one before it is taken", error)
        if self.cfg.resume is True:
            raise ConfigError(f"resume=True, but there is no {'whole ' if files else ''}checkpoint in {self.folder}: train "
                              "with f2c_save_every or save_all_states=True first, or set resume='auto' to start anew where "
                              "there is none")
        return None

    def _load(self, path: Path) -> tuple[int, float]:
        saved = load_states(path)
        self._compare(saved, path)
        for name, part in self.parts.items():
            try:
                _load_part(part, saved[name])
            except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
                raise ConfigError(f"{path}: its {name} cannot be used: {error}") from error

        step = saved["images"] // self.images_per_step
        same_layout = tuple(saved["layout"]) == self.layout
        if same_layout:
            self.sampler.origin = Position(*saved["origin"])
            _set_random_state(saved["random"][self.rank])
        position = Position(step, *saved["position"][1:])
        # The passes go on behind the last image that was seen. Up to version 0.2, more images came in pairs.
        if not same_layout or self.sampler.position(step) != position:
            self.sampler.origin = position
        if hasattr(self.parts["head"], "continue_at"):
            self.parts["head"].continue_at(step)
        log.info("resume: going on from %s: %d images seen, step %d", path, saved["images"], step)
        return step, float(saved["seconds"])

    def _compare(self, saved: dict[str, Any], path: Path) -> None:
        """Compare the settings, by value: a key that is not set has its default. Lists were not kept up to version 0.2."""
        settings = saved["settings"]
        is_paper = any(name.startswith("gallery.") for name in saved["head"]) and "pool.lengths.rows" not in saved["head"]
        if is_paper and settings.get("head") != DCQ:  # of version 0.2, which had another default
            settings = {"f2c_recipe": "ramp", **settings}
        before, now = ({key: list(value) if isinstance(value, tuple) else value for key, value in with_defaults(each).items()}
                       for each in (settings, self.settings))
        changed = {key: f"{key} was {before.get(key)!r} and is now {now.get(key)!r}"
                   for key in sorted({*before, *now} - {*NOT_REPORTED}) if before.get(key) != now.get(key)
                   and not (isinstance(now.get(key), list) and key not in saved["settings"])}
        refused = [what for key, what in changed.items() if key in SAME_TRAINING]
        if before["f2c_recipe"] == "ramp":
            refused.append("the recipe 'ramp' is no more, and f2c-plugin 0.2 can end this training")
        if saved.get("pack", self.pack) != self.pack:
            refused.append(f"rec={self.cfg.rec!r} is another pack: its images or identities differ")
        if refused:
            raise ConfigError(f"resume={self.cfg.resume!r}, but {path} belongs to another training: {', '.join(refused)}; set "
                              "them back, or choose another output")
        for what in changed.values() if self.rank == 0 else ():
            log.warning("%s: %s", path.name, what)

    def save(self, step: int, seconds: float) -> None:
        """Write a checkpoint and remove those before the last two good ones.

        Raises:
            TrainingDiverged: the states are not finite.
            CheckpointError: it cannot be written; those before it are as they were.
        """
        states = {name: part.state_dict() for name, part in self.parts.items()}  # gathers a sharded pool: all ranks take part
        if found := not_finite(states):
            raise self.diverged(found, step)
        random_states = _of_all_ranks(_random_state())
        if self.rank:
            return
        path = self.folder / _NAME.format(step * self.images_per_step)
        states |= {"format": FORMAT, "settings": self.settings, "pack": self.pack, "step": step,
                   "images": step * self.images_per_step, "seconds": seconds, "layout": list(self.layout),
                   "origin": list(self.sampler.origin), "position": list(self.sampler.position(step)), "random": random_states}
        try:
            write_states(states, path)
        except OSError as error:
            first = {errno.ENOSPC: "make room and ", errno.EDQUOT: "make room and ", errno.EEXIST: "move it away and "}
            raise CheckpointError(f"{path}: cannot be written: {error.strerror} ({_free(self.folder)} free): "
                                  + first.get(error.errno or 0, "") + self.remedy()) from error
        self.good = sorted({*self.good, path})[-KEPT:]
        for old in checkpoints_in(self.folder) if len(self.good) == KEPT else ():
            if old < self.good[0]:
                old.unlink()

    def diverged(self, found: list[str], step: int) -> TrainingDiverged:
        """The error of a training in which something is not finite."""
        return TrainingDiverged(f"not finite after step {step}: {some(found)}: nothing of it is written; lower lr or set "
                                f"fp16=False, and {self.remedy()}")

    def remedy(self) -> str:
        """How to go on after an error."""
        return f"go on from {self.good[-1].name}, which is whole, with resume=True" if self.good else "start again"

    def require_room(self) -> None:
        """Raise ConfigError if the disk has no room for the checkpoints to come, beside those that are there."""
        parameters = sum(each.nbytes for group in self.parts["optimizer"].param_groups for each in group["params"]
                         if each.requires_grad)
        moments = 2 if self.cfg.optimizer == "adamw" else 1
        nets = sum(each.nbytes for name in ("backbone", "head") for each in self.parts[name].state_dict().values())
        # One more is written before the older is removed. Damaged ones are the newest there are, and stay.
        there = len([file for file in checkpoints_in(self.folder) if self.good and file <= self.good[-1]][:KEPT])
        needed = (KEPT + 1 - there) * (nets + moments * parameters)
        free = shutil.disk_usage(self.folder).free
        if self.rank == 0 and free < needed:
            raise ConfigError(f"output={self.cfg.output!r}: checkpoints need about {needed / 2**20:,.0f} MB, and "
                              f"{_free(self.folder)} are free: make room, or choose another output")


def _check(saved: dict[str, Any], path: Path) -> None:
    """Raise CheckpointError unless ``saved`` is a checkpoint of the built-in trainer that holds only finite numbers."""
    if saved.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of f2c_plugin.train")
    if wrong := problems(saved) or [name for name in ["random"] if not all(map(_is_random_state, saved[name]))]:
        raise CheckpointError(f"{path}: not a whole checkpoint: {some(wrong)} not as it should be")
    if path.name != (name := _NAME.format(saved["images"])):  # it would count as newer than it is
        raise CheckpointError(f"{path}: a checkpoint after {saved['images']} images is named {name}: rename it")
    if wrong := not_finite({name: value for name, value in saved.items() if name != "settings"}):
        raise CheckpointError(f"{path}: {some(wrong)} not finite")


def pack_digest(index: IdentityIndex) -> str:
    """Identifies a pack: where its images are and whose they are, of up to 4096 of them, however large it is."""
    sample = np.linspace(0, len(index) - 1, min(len(index), _PACK_SAMPLES)).astype(np.int64)
    digest = hashlib.sha256()
    for array in ([len(index), len(index.numbers)], index.offsets[sample], index.identity[sample]):
        digest.update(np.asarray(array, "<i8").tobytes())
    return digest.hexdigest()


def _load_part(part: Any, state: dict[str, Any]) -> None:
    if isinstance(part, torch.optim.Optimizer):
        _load_optimizer(part, state)
    elif isinstance(part, nn.Module):
        for name, own in (*part.named_parameters(), *part.named_buffers()):
            if name in state and (not isinstance(state[name], torch.Tensor) or _kind(state[name]) != _kind(own)):
                raise ValueError(f"{name} holds no numbers of the kind of {own.dtype}")
        part.load_state_dict(state)
    elif state:  # a scaler; it was not in use if it has none
        part.load_state_dict(state)


def _kind(tensor: torch.Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Take the moments; learning rate and decay are the config's, not those of before."""
    groups = optimizer.state_dict()["param_groups"]
    if [group["params"] for group in saved["param_groups"]] != [group["params"] for group in groups]:
        raise ValueError("it has other parameters")
    parameters = dict(enumerate(each for group in optimizer.param_groups for each in group["params"]))
    moments = {"exp_avg", "exp_avg_sq"} if isinstance(optimizer, torch.optim.AdamW) else {"momentum_buffer"}
    for number, of_parameter in saved["state"].items():
        values = {name: value for name, value in of_parameter.items() if value is not None}
        steps = values.pop("step", None) if isinstance(optimizer, torch.optim.AdamW) else None
        is_whole = not values or (values.keys() == moments and (len(moments) == 1 or (steps is not None and steps >= 1)))
        if number not in parameters or not is_whole or any(
                value.shape != parameters[number].shape or not value.is_floating_point() for value in values.values()):
            raise ValueError(f"the state of parameter {number} does not fit it")
        if (values.get("exp_avg_sq", torch.zeros(1)) < 0).any():
            raise ValueError(f"a square of parameter {number} is negative")
    # Copied: the optimizer would keep the tensors, which are mapped from the file.
    optimizer.load_state_dict({"state": deepcopy(saved["state"]), "param_groups": groups})


def _random_state() -> dict[str, Any]:
    _, keys, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate(),
                             "numpy": [torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest]}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _is_random_state(state: dict[str, Any]) -> bool:
    """Whether the generators take a state. They keep theirs."""
    before = _random_state()
    try:
        _set_random_state(state)
    except (ValueError, TypeError, RuntimeError, OverflowError):
        return False
    finally:
        _set_random_state(before)
    return True


_T = TypeVar("_T")


def _of_all_ranks(value: _T) -> list[_T]:
    _, world_size = this_rank()
    gathered = [value] * world_size
    if world_size > 1:
        distributed.all_gather_object(gathered, value)
    return gathered


def _from_rank_0(value: _T) -> _T:
    if this_rank()[1] == 1:
        return value
    broadcast = [value]
    distributed.broadcast_object_list(broadcast, src=0)
    return broadcast[0]


def _free(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MB"
