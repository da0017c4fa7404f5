"""Checkpoints of the built-in trainer: one file for all ranks, whole or absent, good for any number of ranks."""

import logging
import os
import random
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import distributed

from f2c_plugin.config import Config, TrainConfig
from f2c_plugin.data.sampler import DualSampler, Position
from f2c_plugin.errors import CheckpointError, ConfigError
from f2c_plugin.utils.atomic import PARTIAL, written_whole
from f2c_plugin.utils.distributed import this_rank
from f2c_plugin.utils.safe_load import load_states

log = logging.getLogger(__name__)

FORMAT = "f2c-plugin checkpoint 1"
KEPT = 2
_NAME = "checkpoint_{:012d}.pt"  # of the images seen: they only grow, while steps shrink with more ranks
_ANY_NAME = "checkpoint_" + 12 * "[0-9]" + ".pt"
# What identifies the batches of a training: they come again only if all of these are as they were.
_Layout = tuple[int, int, int, int]  # ranks, batch size, pairs per step, seed

# A checkpoint with another value of one of these does not fit.
SAME_TRAINING = ("head", "network", "embedding_size", "num_classes", "num_image", "optimizer", "f2c_pool_rate")
# Other changes are reported, except those that change nothing in the training.
NOT_REPORTED = ("resume", "output", "rec", "val_targets", "frequent", "verbose", "num_workers", "save_all_states",
                "f2c_save_every")


def checkpoints_in(folder: str | Path) -> list[Path]:
    """Checkpoints of the built-in trainer, the newest first."""
    return sorted(Path(folder).glob(_ANY_NAME), reverse=True)


def save_due(cfg: Config, step: int, num_steps: int, total_steps: int) -> bool:
    """Whether the config asks for a checkpoint after ``step``, with ``num_steps`` in an epoch."""
    every = cfg.get("f2c_save_every")
    return bool((every and (step % every == 0 or step == total_steps)) or (cfg["save_all_states"] and step % num_steps == 0))


class Checkpoints:
    """The checkpoints in ``config.output``; the last two are kept.

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
        self.settings = {key: value for key, value in cfg.items() if isinstance(value, (int, float, str, bool, type(None)))}

    def begin(self) -> tuple[int, float]:
        """Where the training begins: (steps done, seconds spent), (0, 0.0) for a new one.

        ``config.resume`` True goes on from the newest whole checkpoint; "auto" does if there is one,
        and so does a training that torchrun has restarted.

        Raises:
            ConfigError: there is no checkpoint, it belongs to another training, or a new training would
                overwrite the checkpoints of an earlier one.
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
        return self._load(found)

    def _find(self, restarted: bool) -> Path | None:
        for partial in self.folder.glob(_ANY_NAME + ".*" + PARTIAL):
            partial.unlink()  # of a process that was killed while it wrote
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
        self._compare_settings(saved["settings"], path)
        missing = self.parts.keys() - saved.keys()
        if missing:
            raise ConfigError(f"{path}: lacks {', '.join(sorted(missing))}: it belongs to another training; set resume=False")
        for name, part in self.parts.items():
            try:
                _load_part(part, saved[name])
            except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError) as error:
                raise ConfigError(f"{path}: its {name} cannot be used: {error}") from error

        step = saved["images"] // self.images_per_step
        if tuple(saved["layout"]) == self.layout:
            self.sampler.origin = Position(*saved["origin"])
            _set_random_state(saved["random"][self.rank])
        else:  # the passes go on behind the last image that was seen
            _, identities, images = saved["position"]
            self.sampler.origin = Position(step, identities, images)
            if hasattr(self.parts["head"], "continue_at"):
                self.parts["head"].continue_at(step)
        log.info("resume: going on from %s: %d images seen, step %d", path, saved["images"], step)
        return step, saved["seconds"]

    def _compare_settings(self, before: dict[str, Any], path: Path) -> None:
        changed = {key: f"{key} was {before.get(key)!r} and is now {self.settings.get(key)!r}"
                   for key in sorted({*before, *self.settings} - {*NOT_REPORTED}) if before.get(key) != self.settings.get(key)}
        refused = [what for key, what in changed.items() if key in SAME_TRAINING]
        if refused:
            raise ConfigError(f"resume={self.cfg.resume!r}, but {path} belongs to another training: {', '.join(refused)}; set "
                              "them back, or choose another output")
        for what in changed.values() if self.rank == 0 else ():
            log.warning("%s: %s", path.name, what)

    def save(self, step: int, seconds: float) -> None:
        """Write a checkpoint and remove all but the last two.

        Raises:
            CheckpointError: it cannot be written; those before it are as they were.
        """
        states = {name: part.state_dict() for name, part in self.parts.items()}  # gathers a sharded pool: all ranks take part
        random_states = _of_all_ranks(_random_state())
        if self.rank:
            return
        position = self.sampler.position(step)
        path = self.folder / _NAME.format(step * self.images_per_step)
        states |= {"format": FORMAT, "settings": self.settings, "step": step, "images": step * self.images_per_step,
                   "seconds": seconds, "layout": list(self.layout), "origin": list(self.sampler.origin),
                   "position": list(position), "random": random_states}
        try:
            with written_whole(path) as file:
                torch.save(states, file)
        except (OSError, RuntimeError) as error:  # torch's writer has errors of its own for a full disk
            kept = checkpoints_in(self.folder)
            raise CheckpointError(f"{path}: cannot be written: {str(error).splitlines()[0]} ({_free(self.folder)} free). "
                                  + (f"{kept[0].name} is whole: make room and go on with resume=True" if kept else
                                     "Make room and start again")) from error
        for old in checkpoints_in(self.folder)[KEPT:]:
            old.unlink()

    def require_room(self) -> None:
        """Raise ConfigError if the disk has no room for the checkpoints to come, beside those that are there."""
        parameters = sum(each.nbytes for group in self.parts["optimizer"].param_groups for each in group["params"]
                         if each.requires_grad)
        moments = 2 if self.cfg.optimizer == "adamw" else 1
        nets = sum(each.nbytes for name in ("backbone", "head") for each in self.parts[name].state_dict().values())
        there = len(checkpoints_in(self.folder)[:KEPT])  # one more is written before the older is removed
        needed = (KEPT + 1 - there) * (nets + moments * parameters)
        free = shutil.disk_usage(self.folder).free
        if self.rank == 0 and free < needed:
            raise ConfigError(f"output={self.cfg.output!r}: checkpoints need about {needed / 2**20:,.0f} MB, and "
                              f"{_free(self.folder)} are free: make room, or choose another output")


def _check(saved: dict[str, Any], path: Path) -> None:
    """Raise CheckpointError unless ``saved`` is a checkpoint of the built-in trainer, with finite nets."""
    if saved.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of f2c_plugin.train")
    kinds: dict[str, type] = dict(settings=dict, images=int, step=int, seconds=float, layout=list, origin=list, position=list,
                                  random=list, backbone=dict, head=dict, optimizer=dict)
    wrong = [name for name, kind in kinds.items() if not isinstance(saved.get(name), kind)]
    lengths = {} if wrong else {"layout": 4, "origin": 3, "position": 3}
    wrong += [name for name, length in lengths.items() if len(saved[name]) != length or not all(
        isinstance(each, int) and each >= 0 for each in saved[name])]
    if not wrong and saved["images"] < 0:
        wrong = ["images"]
    if wrong:
        raise CheckpointError(f"{path}: not a whole checkpoint: {', '.join(wrong)} not as it should be")
    for name in "backbone", "head":
        for key, value in saved[name].items():
            if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.isfinite().all():
                raise CheckpointError(f"{path}: {name}.{key} is not finite")


def _load_part(part: Any, state: dict[str, Any]) -> None:
    if not isinstance(part, torch.optim.Optimizer):
        part.load_state_dict(state)
        return
    state = deepcopy(state)  # the optimizer would keep the tensors, which are mapped from the file
    groups = [{key: value for key, value in group.items() if key != "params"} for group in part.param_groups]
    part.load_state_dict(state)
    for group, configured in zip(part.param_groups, groups, strict=True):
        group.update(configured)  # the config's learning rate and decay, not those of before
        for parameter in group["params"]:
            for name, value in part.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor) and value.dim() and value.shape != parameter.shape:
                    raise ValueError(f"{name} of shape {tuple(value.shape)} for a parameter of {tuple(parameter.shape)}")


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
