"""Configs: the ``f2c_`` keys, their defaults and what is wrong with them; loading config files."""

import difflib
import math
import runpy
from dataclasses import dataclass, fields
from pathlib import Path

from easydict import EasyDict

from f2c_plugin.resources import data_folder

PREFIX = "f2c_"
RECIPES = ("ramp", "paper")


class ConfigError(ValueError):
    """A config that cannot be trained with; names each key, the value found and the remedy."""


@dataclass(frozen=True)
class F2CConfig:
    """Settings of F²C; ``config.f2c_<name>`` in a config file.

    Attributes:
        pool_rate: slots of the pool as a share of ``num_classes``.
        momentum: m of the gallery net.
        symmetric: whether a step does both half-steps, or only the second with half the images
            of a batch as probes.
        identity_rate: share of a batch that the identity-based loader fills.
        hard_negatives: h, per probe that is not in the pool; None takes it from the pool's size.
        recipe: "ramp" or "paper", see ``Recipe``.
    """

    pool_rate: float = 0.1
    momentum: float = 0.99
    symmetric: bool = True
    identity_rate: float = 2 / 3
    hard_negatives: int | None = None
    recipe: str = "ramp"

    @classmethod
    def read(cls, cfg, world_size: int = 1) -> "F2CConfig":
        """Take the ``f2c_`` keys from a host's config and check them with what they depend on.

        Args:
            cfg: mapping of the host's config keys.
            world_size: number of ranks.
        Raises:
            ConfigError: lists everything that is wrong.
        """
        names = [field.name for field in fields(cls)]
        given = {key.removeprefix(PREFIX): value for key, value in cfg.items() if key.startswith(PREFIX)}
        problems = [_unknown_key(PREFIX + name, [PREFIX + known for known in names])
                    for name in given if name not in names]
        settings = cls(**{name: value for name, value in given.items() if name in names})
        problems += settings._problems(cfg, world_size)
        if problems:
            raise ConfigError("\n".join(problems))
        return settings

    def num_slots(self, num_identities: int) -> int:
        """K for a training set of ``num_identities``."""
        return int(self.pool_rate * num_identities + 1e-6)  # 0.29 of 100 is 29, whatever 0.29 is in binary

    def _problems(self, cfg, world_size):
        for name, kind, valid, range_text in (
                ("pool_rate", (int, float), lambda v: 0 < v <= 1, "above 0, up to 1"),
                ("momentum", (int, float), lambda v: 0 <= v < 1, "from 0 to below 1"),
                ("symmetric", bool, lambda v: True, "True or False"),
                ("identity_rate", (int, float), lambda v: 0 <= v <= 1, "from 0 to 1"),
                ("hard_negatives", (int, type(None)), lambda v: v is None or v > 0, "a whole number above 0, or None"),
                ("recipe", str, lambda v: v in RECIPES, "one of " + ", ".join(map(repr, RECIPES)))):
            value = getattr(self, name)
            if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind) or not valid(value):
                yield f"{PREFIX}{name}={value!r}: must be {range_text}"
                return  # what follows builds on these
        if cfg.get("dali"):
            yield "dali=True: F²C's loader decodes by itself and needs pairs of images: set dali=False"
        batch = cfg["batch_size"]
        if batch < 2 or batch % 2:
            yield (f"batch_size={batch}: F²C splits a batch into two halves, gallery and probe: "
                   f"make it even, {max(batch - 1, 2)} or {batch + 1}")
            return
        classes = cfg["num_classes"]
        gathered = min(batch // 2 * world_size, classes)
        slots = self.num_slots(classes)
        if slots < gathered:
            needed = math.ceil(gathered / classes * 1e6) / 1e6
            yield (f"{PREFIX}pool_rate={self.pool_rate} gives {slots} slots for num_classes={classes}, but a gathered "
                   f"batch holds up to {gathered} identities: raise it to at least {needed:g}")


def _unknown_key(key, known):
    close = difflib.get_close_matches(key, known, 1)
    return f"{key}: unknown key" + (f"; did you mean {close[0]}?" if close else f"; there are {', '.join(known)}")


# Keys that arcface_torch's configs/base.py sets, as far as the built-in host knows them, and its own.
HOST_DEFAULTS = dict(
    head=None, sampler=None, output=None, resume=False, save_all_states=False, seed=2048,
    network="r50", embedding_size=512, fp16=False, margin_list=(1.0, 0.5, 0.0), interclass_filtering_threshold=0,
    scale=64.0,  # the host has it in its code
    batch_size=128, gradient_acc=1, num_workers=2, dali=False,
    optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=5e-4, num_epoch=20, warmup_epoch=0,
    val_targets=[], verbose=2000, frequent=10,
)
REQUIRED = ("rec", "num_classes", "num_image")


def load_config(name: str) -> EasyDict:
    """Load a config file of arcface_torch's kind: Python that sets ``config``.

    A ``base.py`` beside the file is loaded first, as the host does.

    Args:
        name: path of the file, with or without ``.py``, or the name of a config that comes with
            this package.
    Raises:
        ConfigError: there is no such file, it does not set ``config``, or lacks what has no default.
    """
    path = _find_config(name)
    cfg = EasyDict(HOST_DEFAULTS)
    base = path.with_name("base.py")
    for file in ([base] if base.is_file() and base != path else []) + [path]:
        found = runpy.run_path(str(file)).get("config")
        if not isinstance(found, dict):
            raise ConfigError(f"{file}: sets no `config`; a config file ends with one, config = EasyDict()")
        cfg.update(found)
    missing = [key for key in REQUIRED if key not in cfg]
    if missing:
        raise ConfigError(f"{path}: lacks {', '.join(missing)}")
    if cfg.output is None:
        cfg.output = str(Path("work_dirs") / path.stem)
    return cfg


def _find_config(name):
    given = Path(name if name.endswith(".py") else name + ".py")
    shipped = data_folder("configs") / given.name
    if given.is_file():
        return given
    if given.name == str(given) and shipped.is_file():
        return shipped
    known = sorted(file.stem for file in shipped.parent.glob("*.py") if file.stem != "__init__")
    raise ConfigError(f"{name}: no such config file, nor one of those that come with the package: {', '.join(known)}")
