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
POOL_DTYPES = ("float32", "bfloat16", "float16")
EXPORTS = ("probe", "gallery", "best")


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
        pool_dtype: "float32", "bfloat16" or "float16", in which the pool keeps its rows.
        shard_pool: whether the ranks share out the slots' rows, instead of each holding all.
        skip_damaged: whether an image that cannot be decoded is replaced by another of its identity,
            and counted in the log, instead of ending the training; a record so damaged that its
            identity is unknown is left out.
        save_every: steps between two checkpoints of the built-in host; None for none but those that
            ``save_all_states`` asks for, after every epoch.
        max_bad_steps: so many steps in a row whose gradient is not finite end a training of the
            built-in host.
        export: which net the built-in host leaves as model.pt and model.onnx: "probe", "gallery", or
            the one that is better at the first of ``val_targets``.
    """

    pool_rate: float = 0.1
    momentum: float = 0.99
    symmetric: bool = True
    identity_rate: float = 2 / 3
    hard_negatives: int | None = None
    recipe: str = "ramp"
    pool_dtype: str = "float32"
    shard_pool: bool = False
    skip_damaged: bool = False
    export: str = "probe"
    save_every: int | None = None
    max_bad_steps: int = 50

    @classmethod
    def read(cls, cfg, world_size: int = 1) -> "F2CConfig":
        """Take the ``f2c_`` keys from a host's config and check them with what they depend on.

        Args:
            cfg: mapping of the host's config keys.
            world_size: number of ranks.
        Raises:
            ConfigError: lists everything that is wrong.
        """
        problems = _unknown_keys(cfg)
        names = [field.name for field in fields(cls)]
        settings = cls(**{name: cfg[PREFIX + name] for name in names if PREFIX + name in cfg})
        problems += settings._problems(cfg, world_size)
        if problems:
            raise ConfigError("\n".join(problems))
        return settings

    def num_slots(self, num_identities: int) -> int:
        """K for a training set of ``num_identities``."""
        return int(self.pool_rate * num_identities + 1e-6)  # 0.29 of 100 is 29, whatever 0.29 is in binary

    def _problems(self, cfg, world_size):
        bad = {}
        for name, kind, valid, range_text in (
                ("pool_rate", (int, float), lambda v: 0 < v <= 1, "above 0, up to 1"),
                ("momentum", (int, float), lambda v: 0 <= v < 1, "from 0 to below 1"),
                ("symmetric", bool, lambda v: True, "True or False"),
                ("skip_damaged", bool, lambda v: True, "True or False"),
                ("shard_pool", bool, lambda v: True, "True or False"),
                ("save_every", (int, type(None)), lambda v: v is None or v > 0, "a whole number of steps above 0, or None"),
                ("max_bad_steps", int, lambda v: v > 0, "a whole number above 0"),
                ("export", str, lambda v: v in EXPORTS, "one of " + ", ".join(map(repr, EXPORTS))),
                ("pool_dtype", str, lambda v: v in POOL_DTYPES, "one of " + ", ".join(map(repr, POOL_DTYPES))),
                ("identity_rate", (int, float), lambda v: 0 <= v <= 1, "from 0 to 1"),
                ("hard_negatives", (int, type(None)), lambda v: v is None or v > 0, "a whole number above 0, or None"),
                ("recipe", str, lambda v: v in RECIPES, "one of " + ", ".join(map(repr, RECIPES)))):
            value = getattr(self, name)
            if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind) or not valid(value):
                bad[name] = f"{PREFIX}{name}={value!r}: must be {range_text}"
        batch, classes = cfg["batch_size"], cfg["num_classes"]
        if batch < 2 or batch % 2:
            nearest = "2" if batch < 2 else f"{batch - 1} or {batch + 1}"
            bad["batch_size"] = (f"batch_size={batch}: F²C splits a batch into two halves, gallery and probe: "
                                 f"make it even, {nearest}")
        gathered = min(batch // 2 * world_size, classes)
        if "pool_rate" not in bad and self.num_slots(classes) < gathered:
            needed = math.ceil(gathered / classes * 1e6) / 1e6
            bad["slots"] = (f"{PREFIX}pool_rate={self.pool_rate} gives {self.num_slots(classes)} slots for "
                            f"num_classes={classes}, but a gathered batch holds up to {gathered} identities: "
                            f"raise it to at least {needed:g}")
        if self.shard_pool is True and "pool_rate" not in bad and self.num_slots(classes) < world_size:
            bad["shard_pool"] = (f"{PREFIX}shard_pool=True: {self.num_slots(classes)} slots cannot be shared out over {world_size} "
                                 "ranks: set it to False")
        return list(bad.values())


def _unknown_keys(cfg):
    known = [field.name for field in fields(F2CConfig)]
    problems = []
    for key in cfg:
        name = key.removeprefix(PREFIX)
        if name != key and name not in known:
            close = difflib.get_close_matches(name, known, 1)
            problems.append(f"{key}: unknown key; " + (f"did you mean {PREFIX}{close[0]}?" if close else
                                                       f"there are {', '.join(PREFIX + name for name in known)}"))
    return problems


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
    problems = [f"lacks {key}" for key in REQUIRED if key not in cfg] + _unknown_keys(cfg) + list(_wrong_types(cfg))
    if problems:
        raise ConfigError("\n".join(f"{path}: {problem}" for problem in problems))
    if cfg.output is None:
        cfg.output = str(Path("work_dirs") / path.stem)
    return cfg


def _wrong_types(cfg):
    for key in ("num_classes", "num_image", "batch_size", "num_epoch", "gradient_acc", "verbose", "frequent", "embedding_size"):
        value = cfg.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            yield f"{key}={value!r}: must be a whole number above 0"
    for key in "lr", "momentum", "weight_decay", "scale":
        if isinstance(cfg[key], bool) or not isinstance(cfg[key], (int, float)):
            yield f"{key}={cfg[key]!r}: must be a number"
    if not isinstance(cfg.val_targets, (list, tuple)):
        yield f"val_targets={cfg.val_targets!r}: must be a list of names"


def _find_config(name):
    given = Path(name if name.endswith(".py") else name + ".py")
    shipped = data_folder("configs") / given.name
    if given.is_file():
        return given
    if given.name == str(given) and shipped.is_file():
        return shipped
    known = sorted(file.stem for file in shipped.parent.glob("*.py") if file.stem != "__init__")
    raise ConfigError(f"{name}: no such config file, nor one of those that come with the package: {', '.join(known)}")
