"""The keys of a config: the ``f2c_`` keys, defaults, valid values."""

import ast
import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from easydict import EasyDict

from f2c_plugin.errors import ConfigError

Config = Mapping[str, Any]  # the keys of a config file


class TrainConfig(EasyDict):
    """A config as ``load_config`` returns it: keys are attributes, too."""

    if TYPE_CHECKING:
        def __getattr__(self, key: str) -> Any: ...


PREFIX = "f2c_"
RECIPES = ("resident", "paper")
DCQ = "dcq"  # a head of its own, with its own recipe
MARGINS = ("arcface", "cosface", "adaface", "sface")
KEPT_WEIGHTS = ("memory", "file")
POOL_DTYPES = ("float32", "bfloat16", "float16")
EXPORTS = ("probe", "gallery", "best")


@dataclass(frozen=True)
class F2CConfig:
    """Settings of F²C; ``config.f2c_<name>`` in a config file.

    Attributes:
        pool_rate: slots of the pool as a share of ``num_classes``.
        recipe: "resident", slots that learn; or "paper", as published, with a gallery net. See ``Schedule``.
        init: file of a pretrained net to start from: a ``model.pt``, or a checkpoint of arcface_torch or the built-in
            trainer. The ramp is shorter then. See ``initialize``, ``Schedule``.
        init_classes: whether the class weights in it are those of the first identities of the pack, and are taken, too.
        margin: the margin by name, which gives the numbers of ``margin_list``, (m1, m2, m3), their meaning: "arcface", m2;
            "cosface", m3; "adaface", whose m is m3; "sface", whose a and b are m2 and m3. None is ArcFace or CosFace,
            whichever the list fits.
        kept_weights: where the weights of identities out of the pool are, "memory" or "file", a file in
            ``config.output`` that is gone when the training ends. Recipe "resident".
        momentum: m of the gallery net. Recipe "paper".
        symmetric: whether a step does both half-steps. If not, it does the second only, with half of
            the batch as probes. Recipe "paper".
        identity_rate: share of a batch that the identity-based loader fills with pairs. None is 2/3 with the recipe
            "paper", no pairs with "resident", and nothing else with ``head = "dcq"``.
        sub_centers: class weights of an identity, of which the one nearest to an image counts. Recipe "resident", and
            ``head = "softmax"``.
        forget_rate: share of the images that get no loss, because their labels may be wrong: those with the largest losses of
            the gallery net. Recipe "resident", which has a gallery net for it.
        low_resolution: share of the images that the net sees at 7 to 56 pixels, in a training that draws their embeddings to
            those of the sharp images.
        teacher: file of a trained net whose embeddings the net is to learn, too: a ``model.pt`` or a checkpoint.
        queue_size: class weights in the queue of ``head = "dcq"``, which replaces recipe and pool rate.
        gallery_images: of how many images a class weight of ``head = "dcq"`` is the mean, at most.
        hard_negatives: h for each probe outside the pool. None derives it from the pool's size. Recipe "paper".
        pool_dtype: "float32", "bfloat16" or "float16", in which the pool keeps its rows.
        shard_pool: whether the ranks share the slots' rows, instead of each holding all of them. With the recipe
            "resident" they always do.
        fused: whether the passes over the slots run as fused kernels where they can: on a GPU, with Triton.
        skip_damaged: whether an image that cannot be decoded is replaced by another of its identity, and
            counted in the log, instead of ending the training. A record so damaged that its identity is
            unknown is left out.
        save_every: steps between two checkpoints of the built-in trainer. None saves only when
            ``save_all_states`` asks for it, after every epoch.
        max_bad_steps: steps in a row with a gradient that is not finite that end a training of the
            built-in trainer; in arcface_torch, with a loss that is not finite.
        export: the net that becomes model.pt: "probe", "gallery" or "best", the one that is more
            accurate on the first of ``val_targets``.
    """

    pool_rate: float = 0.1
    recipe: str = "resident"
    init: str | None = None
    init_classes: bool = False
    margin: str | None = None
    kept_weights: str = "memory"
    momentum: float = 0.99
    symmetric: bool = True
    identity_rate: float | None = None
    sub_centers: int = 1
    forget_rate: float = 0.0
    low_resolution: float = 0.0
    teacher: str | None = None
    queue_size: int = 8192
    gallery_images: int = 1
    hard_negatives: int | None = None
    pool_dtype: str = "float32"
    shard_pool: bool = False
    fused: bool = True
    skip_damaged: bool = False
    export: str = "probe"
    save_every: int | None = None
    max_bad_steps: int = 50

    @classmethod
    def read(cls, cfg: Config, world_size: int = 1) -> "F2CConfig":
        """Take the ``f2c_`` keys from a config, and check them together with the keys that they depend on.

        Args:
            cfg: the keys of the config.
            world_size: number of ranks.
        Raises:
            ConfigError: lists everything that is wrong.
        """
        cfg = {key: plain(value) for key, value in cfg.items()}
        if found := problems(cfg, world_size):
            raise ConfigError("\n".join(found))
        return cls.of(cfg)

    @classmethod
    def of(cls, cfg: Config) -> "F2CConfig":
        """The settings of a config whose keys are right. Those of ``head = "dcq"`` have the recipe "dcq"."""
        settings: dict[str, Any] = {field.name: cfg[PREFIX + field.name] for field in fields(cls) if PREFIX + field.name in cfg}
        if cfg.get("head") == DCQ:
            settings["recipe"] = DCQ
        return cls(**settings)

    @property
    def share_of_pairs(self) -> float:
        """Share of a batch that the identity-based loader fills, 0 to 1."""
        if self.identity_rate is not None:
            return self.identity_rate
        return {"resident": 0.0, "paper": 2 / 3, DCQ: 1.0}[self.recipe]

    def num_slots(self, num_identities: int) -> int:
        """K for a training set of ``num_identities``."""
        return slots_for(self.pool_rate, num_identities)


def slots_for(pool_rate: float, num_identities: int) -> int:
    """K, the slots of a pool for ``num_identities``."""
    return int(pool_rate * num_identities + 1e-6)  # 0.29 of 100 is 29, whatever 0.29 is in binary


def plain(value: Any) -> Any:
    """The value of a key without NumPy's types."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


class _Values(NamedTuple):
    """The values that a key may have: their types, which values of these types, and a description."""

    types: tuple[type, ...]
    valid: Callable[[Any], bool]
    description: str

    def problem(self, key: str, value: Any) -> str | None:
        """What is wrong with a value, or None. A bool is not a number, although Python takes it for one."""
        is_stray_bool = isinstance(value, bool) and bool not in self.types
        if is_stray_bool or not isinstance(value, self.types) or not self.valid(value):
            return f"{key}={value!r}: must be {self.description}"
        return None


def _one_of(*values: str | None) -> _Values:
    types = tuple({type(value) for value in values})
    return _Values(types, lambda v: v in values, "one of " + ", ".join(map(repr, values)))


def _is_margin_list(values: Any) -> bool:
    return len(values) == 3 and all(_NUMBER.problem("", value) is None for value in values)


_LARGE = 1e38  # float32 holds it
_POSITIVE_INT = _Values((int,), lambda v: v > 0, "a whole number above 0")
_POSITIVE_INT_OR_NONE = _Values((int, type(None)), lambda v: v is None or v > 0, "a whole number above 0, or None")
_SIZE = _Values((int,), lambda v: 0 < v <= 1 << 16, "a whole number from 1 to 65536")
_NON_NEGATIVE_INT = _Values((int,), lambda v: v >= 0, "a whole number from 0")
_NUMBER = _Values((int, float), lambda v: abs(v) < _LARGE, "a number")
_POSITIVE = _Values((int, float), lambda v: 0 < v < _LARGE, "a number above 0, and below 1e38")
_NON_NEGATIVE = _Values((int, float), lambda v: 0 <= v < _LARGE, "a number from 0 to below 1e38")
_UNIT_INTERVAL_OPEN = _Values((int, float), lambda v: 0 <= v < 1, "from 0 to below 1")
_FLAG = _Values((bool,), lambda v: True, "True or False")
_NAME = _Values((str,), lambda v: v and "\0" not in v, "a name")
_NAME_OR_NONE = _Values((str, type(None)), lambda v: v is None or _NAME.valid(v), "a name, or None")

_KEYS = {
    "rec": _NAME, "output": _NAME_OR_NONE, "head": _NAME_OR_NONE, "sampler": _NAME_OR_NONE, "network": _NAME,
    "num_classes": _POSITIVE_INT, "num_image": _POSITIVE_INT, "batch_size": _POSITIVE_INT, "num_epoch": _POSITIVE_INT,
    "gradient_acc": _POSITIVE_INT, "verbose": _POSITIVE_INT, "frequent": _POSITIVE_INT, "embedding_size": _SIZE,
    "num_workers": _Values((int,), lambda v: 0 <= v <= 1024, "a whole number from 0 to 1024"),
    "warmup_epoch": _NON_NEGATIVE_INT,
    "seed": _Values((int,), lambda v: 0 <= v < 1 << 32, "a whole number from 0 to below 2**32"),
    "lr": _POSITIVE, "scale": _POSITIVE, "weight_decay": _NON_NEGATIVE, "momentum": _UNIT_INTERVAL_OPEN,
    "interclass_filtering_threshold": _Values((int, float), lambda v: 0 <= v <= 1, "from 0 to 1"),
    "fp16": _FLAG, "save_all_states": _FLAG, "softmax_ramp": _FLAG, "using_wandb": _FLAG, "using_mlflow": _FLAG,
    **dict.fromkeys(("wandb_project", "wandb_entity", "suffix_run_name", "mlflow_experiment"), _NAME_OR_NONE),
    "resume": _Values((bool, str), lambda v: v in (True, False, "auto"), "True, False or 'auto'"),
    "dali": _Values((bool,), lambda v: not v, "False: this package's loader decodes by itself"),
    "margin_list": _Values((list, tuple), _is_margin_list, "three numbers, (m1, m2, m3)"),
    "val_targets": _Values((list, tuple), lambda v: all(_NAME.problem("", name) is None for name in v), "a list of names"),
    "f2c_pool_rate": _Values((int, float), lambda v: 0 < v <= 1, "above 0, up to 1"),
    "f2c_momentum": _UNIT_INTERVAL_OPEN,
    "f2c_init": _NAME_OR_NONE, "f2c_init_classes": _FLAG,
    "f2c_symmetric": _FLAG, "f2c_skip_damaged": _FLAG, "f2c_shard_pool": _FLAG, "f2c_fused": _FLAG,
    "f2c_save_every": _POSITIVE_INT_OR_NONE, "f2c_max_bad_steps": _POSITIVE_INT, "f2c_hard_negatives": _POSITIVE_INT_OR_NONE,
    "f2c_identity_rate": _Values((int, float, type(None)), lambda v: v is None or 0 <= v <= 1, "from 0 to 1, or None"),
    "f2c_queue_size": _POSITIVE_INT, "f2c_gallery_images": _POSITIVE_INT, "f2c_sub_centers": _POSITIVE_INT,
    "f2c_forget_rate": _UNIT_INTERVAL_OPEN,
    "f2c_margin": _one_of(*MARGINS, None), "f2c_teacher": _NAME_OR_NONE,
    "f2c_low_resolution": _Values((int, float), lambda v: 0 <= v <= 1, "from 0 to 1"),
    "f2c_kept_weights": _one_of(*KEPT_WEIGHTS), "f2c_export": _one_of(*EXPORTS),
    "f2c_pool_dtype": _one_of(*POOL_DTYPES), "f2c_recipe": _one_of(*RECIPES),
}


def problems(cfg: Config, world_size: int = 1) -> list[str]:
    """Everything that is wrong with the keys of a config, each by itself and together. No key is required."""
    bad = bad_keys(cfg)
    found = _unknown_keys(cfg) + list(bad.values())
    good = {key: value for key, value in cfg.items() if key not in bad}
    if good.get("warmup_epoch", 0) > good.get("num_epoch", math.inf):
        found.append(f"warmup_epoch={good['warmup_epoch']}: is more than num_epoch={good['num_epoch']}: lower it")
    if good.get(f"{PREFIX}init_classes") and not cfg.get(f"{PREFIX}init"):
        found.append(f"{PREFIX}init_classes=True: needs a checkpoint that has class weights: set {PREFIX}init, or leave it out")
    if cfg.get("head") == "softmax":
        found += [f"{key}={good[key]!r}: head='softmax' has no gallery net: leave it out"
                  for key, default in ((f"{PREFIX}export", "probe"), (f"{PREFIX}forget_rate", 0))
                  if good.get(key, default) != default]
    else:  # F²C may be installed under another name than f2c_dcp
        found += _problems_together(good, not bad.keys().isdisjoint(_TOGETHER), world_size)
    return found


def bad_keys(cfg: Config) -> dict[str, str]:
    """What is wrong with the value of each key that has a wrong one, {key: problem}."""
    return {key: problem for key in _KEYS if key in cfg and (problem := _KEYS[key].problem(key, cfg[key]))}


def valid_values() -> dict[str, str]:
    """What the value of each key must be, in words."""
    return {key: values.description for key, values in _KEYS.items()}


_TOGETHER = ("f2c_pool_rate", "f2c_recipe", "f2c_identity_rate")  # keys without which the others make no sense together


def _problems_together(good: Config, unclear: bool, world_size: int) -> Iterator[str]:
    """What is wrong with F²C's keys together, given those that are right by themselves."""
    batch, classes = good.get("batch_size"), good.get("num_classes")
    settings = F2CConfig.of({key: good[key] for key in ("head", *_TOGETHER) if key in good})
    is_resident = settings.recipe == "resident"
    for key, default in (("sub_centers", 1), ("forget_rate", 0)):
        if not is_resident and good.get(PREFIX + key, default) != default:
            yield f"{PREFIX}{key}={good[PREFIX + key]}: only the recipe 'resident' has it: leave it out"
    if is_resident and good.get(PREFIX + "export", "probe") != "probe" and not good.get(PREFIX + "forget_rate"):
        yield (f"{PREFIX}export={good[PREFIX + 'export']!r}: the recipe 'resident' has no gallery net: leave it out, or set "
               f"{PREFIX}recipe='paper'")
    if settings.recipe == DCQ and settings.share_of_pairs == 0:
        yield f"{PREFIX}identity_rate={settings.identity_rate}: DCQ learns from pairs of images alone: leave it out"
    if batch and batch % 2 and not (is_resident and not settings.share_of_pairs):
        nearest = "2" if batch < 2 else f"{batch - 1} or {batch + 1}"
        yield f"batch_size={batch}: F²C splits a batch into two halves, gallery and probe: make it even, {nearest}"
    if not batch or not classes or unclear or settings.recipe == DCQ:
        return
    slots = settings.num_slots(classes)
    gathered = min((batch if is_resident else batch // 2) * world_size, classes)
    if slots < gathered:
        needed = math.ceil(gathered / classes * 1e6) / 1e6
        yield (f"{PREFIX}pool_rate={settings.pool_rate} gives {slots} slots for num_classes={classes}, but a gathered batch "
               f"holds up to {gathered} identities: raise it to at least {needed:g}")
    if good.get(PREFIX + "shard_pool") and slots < world_size:
        yield f"{PREFIX}shard_pool=True: {slots} slots cannot be split over {world_size} ranks: set it to False"


def _unknown_keys(cfg: Config) -> list[str]:
    known = [field.name for field in fields(F2CConfig)]
    problems: list[str] = []
    for key in cfg:
        name = key.removeprefix(PREFIX)
        if name != key and name not in known:
            close = difflib.get_close_matches(name, known, 1)
            problems.append(f"{key}: unknown key; " + (f"did you mean {PREFIX}{close[0]}?" if close else
                                                       f"there are {', '.join(PREFIX + name for name in known)}"))
    return problems


# Keys of arcface_torch and of its forks that are not read here, and what there is instead.
REPLACED = {
    "sample_rate": "it is Partial FC's; the share of classes that F²C holds is f2c_pool_rate",
    "pretrained": "f2c_init starts from a pretrained net",
    "dali_aug": "images are flipped at random, and not augmented otherwise",
    "wandb_key": "log in by `wandb login`, or set WANDB_API_KEY",
    "wandb_log_all": "all scalars are logged", "wandb_resume": "a run that resumes goes on in Weights & Biases, too",
    "save_artifacts": "models stay in config.output",
    "base": "config files name theirs, config.base; to start from another file, name it in place of this one",
    "learning_rate": "did you mean lr?",
}
# Keys that are not read here, and the values that arcface_torch's own base.py gives them.
UNUSED_OF_BASE = {"sample_rate": 1, "dali_aug": False, "wandb_key": "X" * 40, "wandb_log_all": True, "save_artifacts": False,
                  "wandb_resume": False}


def known_keys() -> list[str]:
    """All keys that the built-in trainer and F²C read."""
    return [*DEFAULTS, *REQUIRED, *(PREFIX + field.name for field in fields(F2CConfig))]


def unused_keys(cfg: Config) -> list[str]:
    """What to say about each key that nobody reads, but for the ``f2c_`` keys, which are errors."""
    return [f"{key}={cfg[key]!r} is not used: {_remedy(key)}"
            for key in cfg if key not in known_keys() and not key.startswith(PREFIX)]


def _remedy(key: str) -> str:
    if key in REPLACED:
        return REPLACED[key]
    close = difflib.get_close_matches(key.lower(), known_keys(), 1)
    return f"did you mean {close[0]}?" if close else "neither the built-in trainer nor F²C has such a key"


def parsed_override(text: str) -> tuple[str, Any]:
    """Key and value of ``KEY=VALUE`` from a command line.

    The value is written as in a config file, but names need no quotes, lists no brackets, and ``true``, ``false`` and ``none``
    may be in small letters.

    Raises:
        ConfigError: it has not that form, or there is no such key. Values are judged by ``problems``.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise ConfigError(f"{text!r}: must be KEY=VALUE, as lr=0.2")
    if key not in known_keys():
        raise ConfigError(f"{key}: unknown key: {_remedy(key)}")
    types = _KEYS[key].types if key in _KEYS else (str,)
    try:
        literal = ast.literal_eval(_CAPITAL.get(value, value))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        literal = value
    if isinstance(literal, types):
        return key, literal
    if list in types:
        return key, [each.strip() for each in value.split(",") if each.strip()]
    return key, value if str in types else literal


_CAPITAL = {"true": "True", "false": "False", "none": "None"}


# The keys of arcface_torch's configs/base.py that the built-in trainer uses, and its own.
DEFAULTS: dict[str, Any] = dict(
    head=None, sampler=None, output=None, resume=False, save_all_states=False, seed=2048,
    network="r50", embedding_size=512, fp16=False, margin_list=(1.0, 0.5, 0.0), interclass_filtering_threshold=0,
    scale=64.0,  # fixed in arcface_torch's code
    softmax_ramp=False,  # of the head "softmax": the ramp of F²C's recipe
    batch_size=128, gradient_acc=1, num_workers=2, dali=False,
    optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=5e-4, num_epoch=20, warmup_epoch=0,
    val_targets=[], verbose=2000, frequent=10,
    using_wandb=False, wandb_project=None, wandb_entity=None, suffix_run_name=None,
    using_mlflow=False, mlflow_experiment=None,  # not arcface_torch's
)
REQUIRED = ("rec", "num_classes", "num_image")


def with_defaults(cfg: Config) -> dict[str, Any]:
    """The keys of a config, and those that it does not set with their defaults."""
    return DEFAULTS | {PREFIX + field.name: field.default for field in fields(F2CConfig)} | dict(cfg)
