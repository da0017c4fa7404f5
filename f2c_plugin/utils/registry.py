"""Heads, loaders and backbones by name, from the entry points of installed packages."""

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from f2c_plugin.errors import UnknownPlugin

HEADS = "arcface_torch.heads"
SAMPLERS = "arcface_torch.samplers"
BACKBONES = "arcface_torch.backbones"
_KEYS = {HEADS: "head", SAMPLERS: "sampler", BACKBONES: "network"}  # of a config


def installed(group: str) -> list[str]:
    """The names that installed packages offer in ``group``."""
    return sorted({entry.name for entry in entry_points(group=group)})


def load_plugin(group: str, name: str) -> Callable[..., Any]:
    """The factory that an installed package offers as ``name`` in ``group``.

    Raises:
        UnknownPlugin: there is none; lists those there are.
    """
    found = {entry.name: entry for entry in entry_points(group=group)}
    if name not in found:
        key = _KEYS[group]
        known = ", ".join(sorted(found)) or "none: is the plugin installed in this environment?"
        raise UnknownPlugin(f"config.{key}={name!r} is unknown; installed: {known}")
    return found[name].load()
