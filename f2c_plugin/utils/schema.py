"""What checkpoints of the built-in trainer and of arcface_torch must look like, whoever wrote the file."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

FORMAT = "f2c-plugin checkpoint 1"
_PLAIN_DEPTH = 3  # of lists in settings

# A predicate; {key: rule} for the keys that a dict must have; (rule, …) by position; [rule] for every element.
Rule = Callable[[Any], bool] | dict[str, Any] | tuple[Any, ...] | list[Any]


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 53  # a bool is none


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1 << 63


def _is_tensor_of(dtype: torch.dtype, length: int | None = None) -> Callable[[Any], bool]:
    return lambda value: (isinstance(value, torch.Tensor) and value.dtype == dtype and value.dim() == 1
                          and length in (None, len(value)))


def _mapping(of_keys: type, rule: Rule) -> Callable[[Any], bool]:
    return lambda value: (isinstance(value, dict) and all(type(key) is of_keys for key in value)
                          and not any(violations(each, rule) for each in value.values()))


def is_plain(value: Any, depth: int = _PLAIN_DEPTH) -> bool:
    """Whether a checkpoint keeps a setting of this value."""
    if isinstance(value, (list, tuple)):
        return depth > 0 and all(is_plain(each, depth - 1) for each in value)
    return value is None or isinstance(value, (str, bool)) or type(value) is float or _is_number(value)


def _is_scaler(value: Any) -> bool:
    return (isinstance(value, dict) and not value) or not violations(value, {
        "scale": _is_positive, "growth_factor": _is_positive, "backoff_factor": _is_positive,
        "growth_interval": lambda interval: _is_count(interval) and interval > 0, "_growth_tracker": _is_count})


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_uint32s(length: int) -> Callable[[Any], bool]:
    is_int64s = _is_tensor_of(torch.int64, length)
    return lambda value: is_int64s(value) and bool(((value >= 0) & (value < 1 << 32)).all())


_RANDOM: Rule = {
    "torch": _is_tensor_of(torch.uint8),
    "python": (_is_count, [_is_count], lambda gauss: gauss is None or _is_number(gauss)),
    # NumPy reads at any position it is told to.
    "numpy": (_is_uint32s(624), lambda position: _is_count(position) and position <= 624, _is_count, _is_number)}
_CHECKPOINT: Rule = {
    "settings": _mapping(str, is_plain),
    "step": _is_count, "images": _is_count, "seconds": lambda value: _is_number(value) and value >= 0,
    "layout": (_is_count,) * 4, "origin": (_is_count,) * 3, "position": (_is_count,) * 3,
    "random": [_RANDOM],
    "backbone": _mapping(str, lambda value: isinstance(value, torch.Tensor)),
    "head": _mapping(str, lambda value: True),  # whatever extra state a head has
    "optimizer": {"param_groups": [{"params": [_is_count]}],
                  "state": _mapping(int, _mapping(str, lambda value: value is None or isinstance(value, torch.Tensor)))},
    "scaler": _is_scaler,
}


def violations(value: Any, rule: Rule, name: str = "") -> list[str]:
    """Names, joined by dots, of what breaks a rule."""
    return [each.lstrip(".") for each in _violations(value, rule, name)]


def _violations(value: Any, rule: Rule, name: str) -> Iterator[str]:
    if isinstance(rule, dict):
        if not isinstance(value, dict):
            yield name
        else:
            for key, inner in rule.items():
                yield from _violations(value[key], inner, f"{name}.{key}") if key in value else [f"{name}.{key}"]
    elif isinstance(rule, (list, tuple)):
        if not isinstance(value, (list, tuple)) or (isinstance(rule, tuple) and len(value) != len(rule)):
            yield name
        else:
            for i, each in enumerate(value):
                yield from _violations(each, rule[i if isinstance(rule, tuple) else 0], f"{name}.{i}")
    elif not rule(value):
        yield name


def problems(saved: dict[str, Any]) -> list[str]:
    """What is wrong with the form of a checkpoint, by name; [] if nothing is. Does not look for NaN."""
    if found := violations(saved, _CHECKPOINT):
        return found
    step, (ranks, batch_size, *_), origin, position = saved["step"], saved["layout"], saved["origin"], saved["position"]
    taken = position[2] - origin[2] + 2 * (position[1] - origin[1])
    fits = {
        "layout": ranks > 0 and batch_size > 0, "images": saved["images"] == step * ranks * batch_size,
        "origin": all(a <= b for a, b in zip(origin, position, strict=True)),
        "position": position[0] == step and taken == (step - origin[0]) * ranks * batch_size,
        "random": len(saved["random"]) == ranks}
    return [name for name, true in fits.items() if not true]


_ARCFACE_TORCH: Rule = {
    "epoch": _is_count, "global_step": _is_count,
    "state_dict_backbone": _mapping(str, lambda value: isinstance(value, torch.Tensor)),
    "state_dict_softmax_fc": _mapping(str, lambda value: True),
    "state_optimizer": {
        "param_groups": [{"params": [_is_count]}],
        "state": _mapping(int, _mapping(str, lambda value: is_plain(value) or isinstance(value, torch.Tensor)))},
    "state_lr_scheduler": _mapping(str, lambda value: True)}
COUNTERS = frozenset({"last_epoch", "total_iters", "warmup_iters", "_step_count"})  # in "state_lr_scheduler", in steps


def problems_of_arcface_torch(saved: dict[str, Any]) -> list[str]:
    """As ``problems``, for a checkpoint of arcface_torch."""
    if found := violations(saved, _ARCFACE_TORCH):
        return found
    schedule = saved["state_lr_scheduler"]
    fits = {"global_step": saved["global_step"] >= saved["epoch"],
            "state_lr_scheduler": all(_is_count(schedule[name]) for name in COUNTERS & schedule.keys())}
    return [name for name, true in fits.items() if not true]
