"""Config files: Python that sets ``config``, as in arcface_torch."""

import runpy
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from f2c_plugin.config import DEFAULTS, REQUIRED, UNUSED_OF_BASE, TrainConfig, parsed_override, plain
from f2c_plugin.errors import ConfigError
from f2c_plugin.utils.paths import data_folder


def load_config(name: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Load a config file in arcface_torch's form: Python that sets ``config``.

    A ``base.py`` beside the file is loaded first, as arcface_torch does. Then the file that ``config.base`` names, if it does,
    in the same way; then the file; then the overrides.

    Args:
        name: path of the file, with or without ``.py``, or the name of a config that comes with
            this package.
        overrides: "KEY=VALUE" each; see ``parsed_override``.
    Raises:
        ConfigError: there is no such file, it cannot be run (gives the line), it does not set ``config``, or it is its own
            base; or all keys without default that it lacks, and all overrides of no key. ``check`` looks at the values.
    """
    path = _find_config(name)
    cfg = TrainConfig(DEFAULTS)
    for keys in _with_bases(path):
        cfg.update(keys)
    wrong: list[str] = []
    for override in overrides:
        try:
            cfg.update([parsed_override(override)])
        except ConfigError as error:
            wrong.append(str(error))
    wrong += [f"{path}: lacks {key}" for key in REQUIRED if key not in cfg]
    if wrong:
        raise ConfigError("\n".join(wrong))
    if cfg.output is None:
        cfg.output = str(Path("work_dirs") / path.stem)
    return cfg


def _with_bases(path: Path, above: Sequence[Path] = ()) -> list[dict[str, Any]]:
    """The keys of the bases of a file, the lowest first, and its own. ``above`` are the files that it is a base of."""
    if path.resolve() in above:
        raise ConfigError(f"{path}: is its own base: {' → '.join(file.name for file in [*above, path])}: take one out")
    above = [*above, path.resolve()]
    keys, beside = _keys(path), path.with_name("base.py")
    found: list[dict[str, Any]] = []
    if beside.is_file() and beside.resolve() not in above:
        found += _with_bases(beside, above)
    base = keys.pop("base", None)
    if base is not None:
        if not isinstance(base, str):
            raise ConfigError(f"{path}: base={base!r}: must be the path of a config file, or the name of one that comes with "
                              "the package")
        found += _with_bases(_find_config(base, path.parent, f"{path}: base: "), above)
    if path.name == "base.py":  # most often arcface_torch's, which sets these whatever the training
        keys = {key: value for key, value in keys.items() if key not in UNUSED_OF_BASE or UNUSED_OF_BASE[key] != value}
    return [*found, keys]


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
