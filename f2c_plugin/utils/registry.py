"""Heads, loaders and backbones by name, from the entry points of installed packages."""

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from f2c_plugin.errors import BrokenPlugin, UnknownPlugin

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
        BrokenPlugin: its package cannot be imported, or does not have it.
    """
    try:
        return _entry(group, name).load()
    except UnknownPlugin:
        raise
    except Exception as error:  # whatever that package raises
        raise broken(group, name, error) from error


def broken(group: str, name: str, problem: Exception | str) -> BrokenPlugin:
    """The error of a factory of an installed package that cannot be used, with its entry point and package."""
    key, cause = _KEYS[group], problem if isinstance(problem, str) else f"{type(problem).__name__}: {problem}"
    return BrokenPlugin(f"{key}={name!r}: {origin(group, name)} cannot be used: {cause}: upgrade or uninstall that package, or "
                        f"set another {key}")


def origin(group: str, name: str) -> str:
    """Where a factory is, and the package that offers it, if that is known."""
    entry = _entry(group, name)
    return entry.value + (f" of the package {entry.dist.name} {entry.dist.version}" if entry.dist else "")


def _entry(group: str, name: str) -> EntryPoint:
    found = {entry.name: entry for entry in entry_points(group=group)}
    if name not in found:
        key = _KEYS[group]
        known = ", ".join(sorted(found)) or "none: is the plugin installed in this environment?"
        raise UnknownPlugin(f"config.{key}={name!r} is unknown; installed: {known}")
    return found[name]
