"""Packages that are optional, and the extra that installs each of them."""

from importlib import import_module
from typing import Any

from f2c_plugin.errors import F2CError


def require(module: str, extra: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: full name of the module.
        extra: the extra of this package that installs it.
    Raises:
        F2CError: the module cannot be imported; gives the command that installs it.
    Example:
        >>> plt = require("matplotlib.pyplot", extra="plot")
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise F2CError(f"{module} cannot be imported ({error}): {installing(extra)}") from error


def installing(extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install 'f2c-plugin[{extra}]'"
