"""Config files: Python that sets ``config``, as in arcface_torch."""

import runpy
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from f2c_plugin.config import DEFAULTS, REPLACED, REQUIRED, TrainConfig, parsed_override, plain
from f2c_plugin.errors import ConfigError
from f2c_plugin.utils.paths import data_folder


def load_config(name: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Load a config file in arcface_torch's form: Python that sets ``config``.

    A ``base.py`` beside the file is loaded first, as arcface_torch does. Then the file that ``config.base`` names, if it does,
    with the bases of that; then the file; then the overrides.

    Args:
        name: path of the file, with or without ``.py``, or the name of a config that comes with
            this package.
        overrides: "KEY=VALUE" each; see ``parsed_override``.
    Raises:
        ConfigError: there is no such file, it cannot be run (gives the line), it does not set ``config``, it is its own base,
            it lacks a key without default, or there is no such key to override. ``check`` looks at the values.
    """
    path = _find_config(name)
    cfg = TrainConfig(DEFAULTS)
    arcface_torchs = path.with_name("base.py")
    if arcface_torchs.is_file() and arcface_torchs != path:
        cfg.update({key: value for key, value in _keys(arcface_torchs).items() if key not in REPLACED})
    for keys in _with_bases(path):
        cfg.update(keys)
    cfg.update(map(parsed_override, overrides))
    if missing := [key for key in REQUIRED if key not in cfg]:
        raise ConfigError("\n".join(f"{path}: lacks {key}" for key in missing))
    if cfg.output is None:
        cfg.output = str(Path("work_dirs") / path.stem)
    return cfg


def _with_bases(path: Path) -> list[dict[str, Any]]:
    """The keys of the bases of a file, the lowest first, and its own."""
    found: list[dict[str, Any]] = []
    files: list[Path] = []
    while True:
        if path.resolve() in files:
            raise ConfigError(f"{path}: is its own base: {' → '.join(file.name for file in [*files, path])}: take one out")
        files.append(path.resolve())
        keys = _keys(path)
        base = keys.pop("base", None)
        found.insert(0, keys)
        if base is None:
            return found
        if not isinstance(base, str):
            raise ConfigError(f"{path}: base={base!r}: must be the path of a config file, or the name of one that comes with "
                              "the package")
        path = _find_config(base, path.parent, f"{path}: base: ")


def _keys(file: Path) -> dict[str, Any]:
    found = _run(file).get("config")
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ConfigError(f"{file}: sets no `config`; a config file ends with one, config = EasyDict()")
    return {key: plain(value) for key, value in found.items()}


def _run(file: Path) -> dict[str, Any]:
    """The names that a config file sets."""
    try:
        return runpy.run_path(str(file))
    except SyntaxError as error:
        raise ConfigError(f"{error.filename or file}, line {error.lineno or 1}: {error.msg}: correct it") from error
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        line = f", line {lines[-1]}" if lines else ""
        raise ConfigError(f"{file}{line}: cannot be run: {type(error).__name__}: {error}") from error


def _find_config(name: str, folder: Path = Path(), context: str = "") -> Path:
    """The file of a config by its path, from ``folder`` on, or by its name. ``context`` begins the error if there is none."""
    given = Path(name if name.endswith(".py") else name + ".py")
    bundled = data_folder("configs") / given.name
    if (folder / given).is_file():
        return folder / given
    if given.name == str(given) and bundled.is_file():
        return bundled
    known = sorted(file.stem for file in bundled.parent.glob("*.py") if file.stem != "__init__")
    raise ConfigError(f"{context}{name}: no such config file, nor one of those that come with the package: {', '.join(known)}")
