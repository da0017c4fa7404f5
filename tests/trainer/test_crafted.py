"""Checkpoints that someone has altered: each is passed over for the one before it, or refused; none ends in a traceback."""

import shutil
from collections import OrderedDict
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest
import torch

from f2c_plugin.config_files import load_config
from f2c_plugin.data.from_config import steps_per_epoch, training_device
from f2c_plugin.errors import ConfigError
from f2c_plugin.trainer import build
from f2c_plugin.trainer.checkpoint import Checkpoints
from f2c_plugin.trainer.loop import build_state
from f2c_plugin.trainer.rendezvous import process_group
from tests.runs import run

KEYS = {"adamw": dict(optimizer="adamw", lr=1e-3, fp16=True), "sgd": {}}
COMMON = dict(num_epoch=1, val_targets=[], f2c_save_every=4)  # checkpoints of steps 8 and 10


@pytest.fixture(scope="module")
def trained():
    """Folders of real checkpoints, by optimizer; filled by the first test that needs one."""
    return {}


@pytest.fixture
def altered(config, trained, tmp_path_factory):
    """Alters the newest of two checkpoints; returns what a training that resumes finds: step and parts."""
    def begin(alter, optimizer="sgd"):
        keys = COMMON | KEYS[optimizer]
        if optimizer not in trained:
            trained[optimizer] = tmp_path_factory.mktemp(optimizer) / "out"
            run(config(**keys))
            shutil.copytree("out", trained[optimizer])
        shutil.copytree(trained[optimizer], "out", dirs_exist_ok=True)
        newest = max(Path("out").glob("checkpoint_*.pt"))
        saved = torch.load(newest, weights_only=True)
        alter(saved)
        torch.save(saved, newest)
        cfg = load_config(config(resume=True, **keys))
        with process_group():
            loader = build.build_loader(cfg, build.head_factory(cfg.head), 0)
            state = build_state(cfg, training_device(0), steps_per_epoch(cfg, 1))
            step, _ = Checkpoints(cfg, state.parts(), loader.sampler).begin()
        return step, state
    return begin


def setting(*path):
    """Sets, in nested containers, the value that the last of ``path`` is at the place that the others name."""
    *places, last, value = path

    def alter(saved):
        reduce(getitem, places, saved)[last] = value
    return alter


def deleting(*path):
    *places, last = path

    def alter(saved):
        del reduce(getitem, places, saved)[last]
    return alter


def changing(*path):
    """As ``setting``, to what a function makes of the value."""
    *places, change = path

    def alter(saved):
        each = saved
        for place in places[:-1]:
            each = each[place]
        each[places[-1]] = change(each[places[-1]])
    return alter


def recursive():
    inside = []
    inside.append(inside)
    return inside


FIRST, ROWS = ("optimizer", "state", 0), ("head", "pool.rows")
CRAFTED = {
    "no format": deleting("format"), "a tensor as format": setting("format", torch.zeros(2)),
    "settings, a list": setting("settings", []), "settings, a number as key": setting("settings", 3, 4),
    "settings, a tensor": setting("settings", "lr", torch.zeros(3)), "settings, 10**5000": setting("settings", "lr", 10**5000),
    "settings, a list in itself": setting("settings", "lr", recursive()),
    "step, a string": setting("step", "10"), "step, negative": setting("step", -10),
    "step, not that of images": setting("step", 9),
    "images, a bool": setting("images", True), "images, huge": setting("images", 1 << 80),
    "images, a float": setting("images", 120.0),
    "seconds, NaN": setting("seconds", torch.nan), "seconds, negative": setting("seconds", -1.0),
    "seconds, a string": setting("seconds", "1"),
    "layout, short": setting("layout", [1, 12]), "layout, strings": setting("layout", ["1", "12", "4", "2048"]),
    "layout, no ranks": setting("layout", 0, 0), "layout, a bool": setting("layout", 0, True),
    "layout, a dict": setting("layout", {0: 1, 1: 12, 2: 4, 3: 2048}),
    "origin, beyond": setting("origin", [11, 0, 0]), "origin, floats": setting("origin", [0.0, 0.0, 0.0]),
    "position, of other images": setting("position", 2, 41), "position, a number": setting("position", 7),
    "random, of no rank": setting("random", []), "random, none of torch": deleting("random", 0, "torch"),
    "random, torch's cut short": changing("random", 0, "torch", lambda value: value[:-1]),
    "random, torch's zeros": changing("random", 0, "torch", torch.zeros_like),
    "random, python's cut short": changing("random", 0, "python", lambda value: (value[0], value[1][:-1], value[2])),
    "random, python's of strings": changing("random", 0, "python", lambda value: (value[0], ("a",) * 625, value[2])),
    "random, python's huge": changing("random", 0, "python", lambda value: (value[0], (1 << 40,) * 625, value[2])),
    "random, numpy's beyond its end": setting("random", 0, "numpy", 1, 10**6),
    "random, numpy's floats": changing("random", 0, "numpy", 0, lambda value: value.float()),
    "optimizer, a list": setting("optimizer", []), "optimizer, no groups": deleting("optimizer", "param_groups"),
    "optimizer, a group less": changing("optimizer", "param_groups", lambda groups: groups[:1]),
    "optimizer, a group that is none": setting("optimizer", "param_groups", 0, [1]),
    "optimizer, no parameters": deleting("optimizer", "param_groups", 0, "params"),
    "optimizer, other parameters": changing("optimizer", "param_groups", 0, "params", lambda numbers: numbers[:-1]),
    "optimizer, parameters by name": setting("optimizer", "param_groups", 0, "params", 0, "weight"),
    "optimizer, state a list": setting("optimizer", "state", []), "optimizer, one state a list": setting(*FIRST, [1]),
    "optimizer, a state by name": setting("optimizer", "state", "weight", {}),
    "optimizer, a state of none": setting("optimizer", "state", 10**6, {"momentum_buffer": torch.zeros(1)}),
    "optimizer, a number": setting(*FIRST, "momentum_buffer", 3.0),
    "optimizer, NaN": changing(*FIRST, "momentum_buffer", lambda value: value * torch.nan),
    "optimizer, infinite": changing(*FIRST, "momentum_buffer", lambda value: value + torch.inf),
    "optimizer, another shape": changing(*FIRST, "momentum_buffer", lambda value: value.flatten()),
    "optimizer, whole numbers": changing(*FIRST, "momentum_buffer", lambda value: value.long()),
    "optimizer, another moment": setting(*FIRST, "exp_avg", torch.zeros(1)),
    "adamw, no square": deleting(*FIRST, "exp_avg_sq"), "adamw, no step": deleting(*FIRST, "step"),
    "adamw, step 0": setting(*FIRST, "step", torch.tensor(0.0)), "adamw, steps": setting(*FIRST, "step", torch.ones(2)),
    "adamw, negative squares": changing(*FIRST, "exp_avg_sq", lambda value: value - 1),
    "scaler, a list": setting("scaler", [1]), "scaler, NaN": setting("scaler", "scale", torch.nan),
    "scaler, a string": setting("scaler", "scale", "1"), "scaler, half of it": deleting("scaler", "scale"),
    "scaler, half an interval": setting("scaler", "growth_interval", 0.5),
    "backbone, a list": setting("backbone", []), "backbone, a number as key": setting("backbone", 3, torch.zeros(1)),
    "backbone, a string": setting("backbone", "fc.bias", "x"), "backbone, none of it": setting("backbone", OrderedDict()),
    "backbone, NaN": changing("backbone", "fc.bias", lambda value: value * torch.nan),
    "backbone, whole numbers": changing("backbone", "fc.bias", lambda value: value.long()),
    "backbone, complex": changing("backbone", "fc.bias", lambda value: value.cfloat()),
    "backbone, another shape": changing("backbone", "fc.bias", lambda value: value[:-1]),
    "head, rows NaN": changing(*ROWS, lambda value: value * torch.nan),
    "head, rows of fewer slots": changing(*ROWS, lambda value: value[:, :-1]),
    "head, rows flat": changing(*ROWS, lambda value: value.flatten()), "head, no rows": deleting(*ROWS),
    "head, rows a list": setting(*ROWS, [1]), "head, identities beyond": setting("head", "pool.slot_identity", 0, 10**9),
    "head, identities of fractions": changing("head", "pool.slot_identity", lambda value: value + 0.5),
    "head, steps negative": setting("head", "_extra_state", torch.tensor(-1)),
    "head, steps a string": setting("head", "_extra_state", "10"),
    "head, steps NaN": setting("head", "_extra_state", torch.nan),
    "head, steps in two": setting("head", "_extra_state", torch.tensor([1, 2])),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_an_altered_checkpoint_is_passed_over_or_refused(altered, name):
    try:
        outcome, _ = altered(CRAFTED[name], "adamw" if name.startswith(("adamw", "scaler")) else "sgd")
    except ConfigError as error:
        outcome = str(error)
    assert outcome == 8 or "checkpoint_000000000120.pt: its " in str(outcome)


def test_the_steps_of_a_head_are_those_of_the_checkpoint(altered):
    step, state = altered(setting("head", "_extra_state", torch.tensor(10**9)))
    assert step == state.head.steps == 10
