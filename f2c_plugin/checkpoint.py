"""Checkpoints of the built-in host: one file for all ranks, whole or not there, good for any number of ranks."""

import logging
import math
import os
import pickle
import pickletools
import random
import re
import shutil
import zipfile
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from f2c_plugin.config import ConfigError
from f2c_plugin.data.sampler import Position
from f2c_plugin.files import PARTIAL, written_whole
from f2c_plugin.ranks import this_rank

FORMAT = "f2c-plugin checkpoint 1"
KEPT = 2
_NAME = "checkpoint_{:012d}.pt"  # of the images seen: they only grow, where steps shrink with more ranks
_ANY_NAME = "checkpoint_" + 12 * "[0-9]" + ".pt"
# The names of which a file of torch.save is made that holds tensors in dictionaries, lists and tuples.
_IN_STATES = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch (\w+Storage|Size)")

# With another value of one of these, what was saved does not fit.
SAME_TRAINING = ("head", "network", "embedding_size", "num_classes", "num_image", "optimizer", "f2c_pool_rate")
# Whatever else has changed is told, but for what changes nothing in the training.
_UNTOLD = ("resume", "output", "rec", "val_targets", "frequent", "verbose", "num_workers", "save_all_states", "f2c_save_every")


def checkpoints_in(folder) -> list[Path]:
    """Checkpoints of the built-in host, the newest first."""
    return sorted(Path(folder).glob(_ANY_NAME), reverse=True)


class CheckpointError(ValueError):
    """A file that is no whole checkpoint, or cannot be written."""


def load_states(path) -> dict:
    """What ``torch.save`` wrote, every byte of it as it was written. Runs no code from the file.

    ``torch.load`` by itself does not notice a changed byte, nor does it mind what a file of a few
    bytes unpacks to; so the archive is looked through first.

    Raises:
        CheckpointError: the file is missing, cut short, changed, or holds no dictionary.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise CheckpointError(f"{path}: unpacks to more than it holds, which no file of torch.save does")
            if (changed := archive.testzip()) is not None:
                raise CheckpointError(f"{path}: damaged: {changed} is not as it was written")
            for name in archive.namelist():
                if name.endswith("/data.pkl"):
                    _check_names(archive.read(name), path)
        states = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        _check_sizes(states, path)
    except (OSError, EOFError, RuntimeError, AttributeError, TypeError, ValueError, KeyError, IndexError, AssertionError,
            OverflowError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: no whole checkpoint: {(str(error) or type(error).__name__).splitlines()[0]}") from error
    if not isinstance(states, dict):
        raise CheckpointError(f"{path}: holds a {type(states).__name__}, not the states of a training")
    return states


def _check_names(pickled, path):
    """Refuse what states are not made of: torch.load(weights_only=True) knows more, some of which takes any memory it is told."""
    for opcode, what, _ in pickletools.genops(pickled):
        if opcode.name == "STACK_GLOBAL" or opcode.name in ("GLOBAL", "INST") and not _IN_STATES.fullmatch(what):
            raise CheckpointError(f"{path}: holds {what or 'a name that is made up as it is read'}, which states of a training "
                                  "do not")


def _check_sizes(states, path):
    """Refuse tensors that stand for more numbers than the file holds."""
    seen, stack = set(), [states]
    while stack:
        each = stack.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, dict):
            stack += [*each.keys(), *each.values()]
        elif isinstance(each, (list, tuple)):
            stack += each
        elif isinstance(each, torch.Tensor):
            if each.layout != torch.strided or each.device.type != "cpu" or (
                    math.prod(each.shape) * each.element_size() > each.untyped_storage().nbytes()):
                raise CheckpointError(f"{path}: a tensor of shape {tuple(each.shape)} stands for more than the file holds")


class Checkpoints:
    """The checkpoints in ``config.output``; the last two are kept.

    All ranks call the methods together. Rank 0 writes, and what it writes is that of all ranks: nets,
    optimizer, scaler, head (a sharded pool as a whole), how far the training and each pass of the
    data have come, and the random states of every rank.

    Args:
        cfg: the config.
        parts: what has a state, by name: "backbone", "head", "optimizer", "scaler".
        sampler: the DualSampler.
    """

    def __init__(self, cfg, parts: dict, sampler):
        self.cfg, self.parts, self.sampler = cfg, parts, sampler
        self.folder = Path(cfg.output)
        self.rank, world_size = this_rank()
        self.images_per_step = cfg.batch_size * world_size
        # The same batches come only if all of these are as they were.
        self.layout = [world_size, cfg.batch_size, sampler.pairs_per_step, sampler.seed]
        self.settings = {key: value for key, value in cfg.items() if isinstance(value, (int, float, str, bool, type(None)))}

    def begin(self) -> tuple[int, float]:
        """Where the training begins: (steps done, seconds spent), (0, 0.0) for a new one.

        ``config.resume`` True goes on from the newest whole checkpoint, "auto" does if there is
        one, and so does a training that torchrun has started again.

        Raises:
            ConfigError: there is nothing to go on from, what there is is of another training, or a
                new training would overwrite the checkpoints of one before.
        """
        found, refusal = None, None
        # Of two nodes, one that has come back does not know that the training had begun.
        started_again = any(_of_all_ranks(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0))
        if self.rank == 0:  # one rank decides for all
            try:
                found = self._find(started_again)
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

    def _find(self, started_again):
        for partial in self.folder.glob("*" + PARTIAL):
            partial.unlink()  # of a process that was killed while it wrote
        files = checkpoints_in(self.folder)
        if not self.cfg.resume and not started_again:
            if files:
                raise ConfigError(f"resume=False, but {self.folder} holds checkpoints of an earlier training, which this one "
                                  f"would replace ({files[0].name}): set resume=True to go on from them, take another "
                                  "output, or delete them")
            return None
        for file in files:
            try:
                _check(load_states(file), file)
                return file
            except CheckpointError as error:
                logging.warning("%s; the one before it is taken", error)
        if self.cfg.resume is True:
            raise ConfigError(f"resume=True, but there is no {'whole ' if files else ''}checkpoint in {self.folder}: train with "
                              "f2c_save_every or save_all_states=True first, or set resume='auto' to begin anew where there "
                              "is none")
        return None

    def _load(self, path):
        saved = load_states(path)
        self._compare_settings(saved["settings"], path)
        lacking = self.parts.keys() - saved.keys()
        if lacking:
            raise ConfigError(f"{path}: lacks {', '.join(sorted(lacking))}: it is of another training; set resume=False")
        for name, part in self.parts.items():
            try:
                _load_part(part, saved[name])
            except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError) as error:
                raise ConfigError(f"{path}: its {name} cannot be used: {error}") from error

        step = saved["images"] // self.images_per_step
        if saved["layout"] == self.layout:
            self.sampler.origin = Position(*saved["origin"])
            _set_random_state(saved["random"][self.rank])
        else:  # the passes go on behind the last image that was seen
            self.sampler.origin = Position(step, *saved["position"][1:])
            if hasattr(self.parts["head"], "continue_at"):
                self.parts["head"].continue_at(step)
        logging.info("resume: going on from %s: %d images seen, step %d", path, saved["images"], step)
        return step, saved["seconds"]

    def _compare_settings(self, before, path):
        changed = {key: f"{key} was {before.get(key)!r} and is now {self.settings.get(key)!r}"
                   for key in sorted({*before, *self.settings} - {*_UNTOLD}) if before.get(key) != self.settings.get(key)}
        refused = [what for key, what in changed.items() if key in SAME_TRAINING]
        if refused:
            raise ConfigError(f"resume={self.cfg.resume!r}, but {path} is of another training: {', '.join(refused)}; set them "
                              "back, or take another output")
        for what in changed.values() if self.rank == 0 else ():
            logging.warning("%s: %s", path.name, what)

    def save(self, step: int, seconds: float):
        """Write a checkpoint and remove all but the last two.

        Raises:
            CheckpointError: it cannot be written; those before it are as they were.
        """
        states = {name: part.state_dict() for name, part in self.parts.items()}  # ranks share out a pool: all take part
        random_states = _of_all_ranks(_random_state())
        if self.rank:
            return
        position = self.sampler.position(step)
        path = self.folder / _NAME.format(step * self.images_per_step)
        states |= {"format": FORMAT, "settings": self.settings, "step": step, "images": step * self.images_per_step,
                   "seconds": seconds, "layout": self.layout, "origin": list(self.sampler.origin), "position": list(position),
                   "random": random_states}
        try:
            with written_whole(path) as file:
                torch.save(states, file)
        except (OSError, RuntimeError) as error:  # torch's writer has errors of its own for a full disk
            kept = checkpoints_in(self.folder)
            raise CheckpointError(f"{path}: cannot be written: {str(error).splitlines()[0]} ({_free(self.folder)} free). "
                                  + (f"{kept[0].name} is whole: make room and go on with resume=True" if kept else
                                     "Make room and begin again")) from error
        for old in checkpoints_in(self.folder)[KEPT:]:
            old.unlink()

    def require_room(self):
        """Raise ConfigError if the folder's disk has no room for the checkpoints to come, beside those that are there."""
        parameters = sum(each.nbytes for group in self.parts["optimizer"].param_groups for each in group["params"]
                         if each.requires_grad)
        moments = 2 if self.cfg.optimizer == "adamw" else 1
        nets = sum(each.nbytes for name in ("backbone", "head") for each in self.parts[name].state_dict().values())
        there = len(checkpoints_in(self.folder)[:KEPT])  # one more is written before the older is removed
        needed = (KEPT + 1 - there) * (nets + moments * parameters)
        free = shutil.disk_usage(self.folder).free
        if self.rank == 0 and free < needed:
            raise ConfigError(f"output={self.cfg.output!r}: checkpoints need about {needed / 2**20:,.0f} MB, and "
                              f"{_free(self.folder)} are free: make room, or take another output")


def _check(saved, path):
    """Raise CheckpointError unless ``saved`` is a checkpoint of the built-in host, with finite nets."""
    if saved.get("format") != FORMAT:
        raise CheckpointError(f"{path}: no checkpoint of f2c_plugin.train")
    kinds = dict(settings=dict, images=int, step=int, seconds=float, layout=list, origin=list, position=list, random=list,
                 backbone=dict, head=dict, optimizer=dict)
    wrong = [name for name, kind in kinds.items() if not isinstance(saved.get(name), kind)]
    if wrong or saved["images"] < 0 or len(saved["layout"]) != 4 or len(saved["origin"]) != 3 or len(saved["position"]) != 3 or not all(
            isinstance(each, int) and each >= 0 for each in saved["layout"] + saved["origin"] + saved["position"]):
        raise CheckpointError(f"{path}: no whole checkpoint: {', '.join(wrong) or 'its position'} is not what it should be")
    for name in "backbone", "head":
        for key, value in saved[name].items():
            if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.isfinite().all():
                raise CheckpointError(f"{path}: {name}.{key} is not finite")


def _load_part(part, state):
    if not isinstance(part, torch.optim.Optimizer):
        part.load_state_dict(state)
        return
    state = deepcopy(state)  # the optimizer would keep the tensors, which are those of the file, mapped into memory
    groups = [{key: value for key, value in group.items() if key != "params"} for group in part.param_groups]
    part.load_state_dict(state)
    for group, configured in zip(part.param_groups, groups):
        group.update(configured)  # the config's learning rate and decay, not those it had before
        for parameter in group["params"]:
            for name, value in part.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor) and value.dim() and value.shape != parameter.shape:
                    raise ValueError(f"{name} of shape {tuple(value.shape)} for a parameter of {tuple(parameter.shape)}")


def _random_state():
    _, keys, *rest = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "numpy": [torch.from_numpy(keys.astype(np.int64)), *rest],
             "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state):
    torch.set_rng_state(state["torch"])
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _of_all_ranks(what):
    _, world_size = this_rank()
    gathered = [what] * world_size
    if world_size > 1:
        distributed.all_gather_object(gathered, what)
    return gathered


def _from_rank_0(what):
    if this_rank()[1] == 1:
        return what
    told = [what]
    distributed.broadcast_object_list(told, src=0)
    return told[0]


def _free(folder):
    return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MB"
