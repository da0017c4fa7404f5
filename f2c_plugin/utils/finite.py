"""Finds numbers that are NaN or infinite."""

import math
from typing import Any

import torch


def not_finite(states: Any) -> list[str]:
    """Names, joined by dots, of the tensors and numbers in nested dicts, lists and tuples that are not finite."""
    found: list[str] = []
    seen: set[int] = set()
    stack: list[tuple[str, Any]] = [("", states)]
    while stack:
        name, each = stack.pop()
        if isinstance(each, torch.Tensor):
            if (each.is_floating_point() or each.is_complex()) and not each.isfinite().all():
                found.append(name)
        elif isinstance(each, float):
            if not math.isfinite(each):
                found.append(name)
        elif isinstance(each, (dict, list, tuple)) and id(each) not in seen:  # a list may hold itself
            seen.add(id(each))
            inner = each.items() if isinstance(each, dict) else enumerate(each)
            stack += [(f"{name}.{key}".lstrip("."), value) for key, value in inner]
    return sorted(found)


def some(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
