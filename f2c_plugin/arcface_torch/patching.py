"""Installs the plugin into an arcface_torch checkout, and removes it again."""

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from f2c_plugin.errors import CheckoutError
from f2c_plugin.utils.paths import cache_folder, data_folder

ARCFACE_TORCH_URL = "https://github.com/deepinsight/insightface"
ARCFACE_TORCH_FOLDER = Path("recognition/arcface_torch")
# The revision that the patches were made for and that the tests use. The code of arcface_torch has not
# changed since 2023-06-10.
ARCFACE_TORCH_REVISION = "7fadd420c2351d0ffa8cac403421c1a3ed733365"
BUILT_IN_ONLY = "f2c_demo.py"  # a config for the built-in trainer: arcface_torch lacks its network


@dataclass
class Change:
    """A change to one file of the checkout."""

    path: Path  # relative to the checkout
    content: bytes | None  # None removes the file
    reason: str  # the patch or config that requires the change


def patches() -> list[Path]:
    """The patches, in the order in which they apply."""
    return sorted(data_folder("patches").glob("*.patch"))


def arcface_torch_configs() -> list[Path]:
    """The configs that are copied into the checkout."""
    return sorted(file for file in data_folder("configs").glob("*.py") if file.name not in ("__init__.py", BUILT_IN_ONLY))


def find_checkout(folder: str | Path) -> Path:
    """Find arcface_torch in ``folder``, which is arcface_torch itself or a checkout of insightface, or raise CheckoutError."""
    for candidate in (Path(folder), Path(folder) / ARCFACE_TORCH_FOLDER):
        if (candidate / "train_v2.py").is_file() and (candidate / "partial_fc_v2.py").is_file():
            return candidate.resolve()
    raise CheckoutError(f"{folder}: no arcface_torch here (no train_v2.py): give the folder {ARCFACE_TORCH_FOLDER} of an "
                        "insightface checkout")


def plan_install(checkout: Path) -> list[Change]:
    """The patches and configs that are still to be installed. Configs that exist are kept, because users edit them."""
    return _patched(checkout, len(patches())) + [Change(path, config.read_bytes(), "config") for path, config in _configs()
                                                 if not (checkout / path).exists()]


def edited_configs(checkout: Path) -> list[Path]:
    """Configs in the checkout that have the name of one of this package's configs but different content."""
    return [checkout / path for path, config in _configs() if _content(checkout / path) not in (None, config.read_bytes())]


def plan_reverse(checkout: Path) -> list[Change]:
    """The changes that undo an installation. Edited configs are kept."""
    return _patched(checkout, 0) + [Change(path, None, "config") for path, config in _configs()
                                    if _content(checkout / path) == config.read_bytes()]


def _configs() -> list[tuple[Path, Path]]:
    """(path in the checkout, our file) of each config."""
    return [(Path("configs") / config.name, config) for config in arcface_torch_configs()]


def apply(checkout: Path, changes: list[Change]) -> None:
    """Make all changes, or restore the old content if one fails. Raises CheckoutError if a link leads out of the checkout."""
    targets = [(change, (checkout / change.path).resolve()) for change in changes]
    for change, target in targets:
        if not target.is_relative_to(checkout.resolve()):
            raise CheckoutError(f"{checkout / change.path} is, or is behind, a link to {target}, outside the checkout. Nothing "
                                "was changed: replace the link with a copy")
    old = {target: _content(target) for _, target in targets}
    partials = {target: target.with_name(target.name + ".f2c-partial") for _, target in targets}
    try:
        for change, target in targets:
            if change.content is not None:
                partials[target].write_bytes(change.content)
                if target.exists():
                    shutil.copymode(target, partials[target])
        for change, target in targets:
            if change.content is None:
                target.unlink()
            else:
                os.replace(partials[target], target)
    except BaseException:
        for target, content in old.items():
            partials[target].unlink(missing_ok=True)
            if content is None:
                target.unlink(missing_ok=True)
            elif _content(target) != content:
                target.write_bytes(content)
        raise


def applied_patches(checkout: Path) -> int:
    """How many patches are applied. They stack, so these are the first ones. Raises CheckoutError if a patch does not fit."""
    misfits: list[tuple[Path, list[str]]] = []
    for count in range(len(patches()), -1, -1):
        with tempfile.TemporaryDirectory() as folder:
            _copy_touched(checkout, Path(folder))
            steps = [(patch, ["--reverse"]) for patch in reversed(patches()[:count])] + [(patch, []) for patch in patches()]
            for patch, options in steps:
                if positions := _git_apply(Path(folder), patch, *options):
                    misfits.append((patch, positions))
                    break
            else:
                return count
    patch, positions = min(misfits, key=lambda misfit: len(misfit[1]))  # the closest state
    raise CheckoutError(f"{patch.name} does not fit {checkout}: {', '.join(positions)}. Nothing was changed. The patches are "
                        f"for revision {ARCFACE_TORCH_REVISION[:12]} of {ARCFACE_TORCH_URL}: restore the file or apply the "
                        "patch by hand. To remove the patches of another version of this plugin, use that version's "
                        "install --reverse")


def _patched(checkout: Path, wanted: int) -> list[Change]:
    """Changes that lead to the first ``wanted`` patches, computed in a copy."""
    present = applied_patches(checkout)  # so the patches fit
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        touched = _copy_touched(checkout, copy)
        for patch in reversed(patches()[wanted:present]):
            _git_apply(copy, patch, "--reverse")
        for patch in patches()[present:wanted]:
            _git_apply(copy, patch)
        return [Change(path, after, reason) for path, reason in touched.items()
                if (after := _content(copy / path)) != _content(checkout / path)]


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _copy_touched(checkout: Path, folder: Path) -> dict[Path, str]:
    """Copy the files that the patches touch. Returns {file: names of its patches}."""
    touched: dict[Path, str] = {}
    for patch in patches():
        for name in re.findall(r"^\+\+\+ b/(.+)$", patch.read_text(), re.MULTILINE):
            path = Path(name)
            touched[path] = f"{touched[path]}, {patch.stem}" if path in touched else patch.stem
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            if (checkout / path).is_file():
                shutil.copy(checkout / path, folder / path)
    return touched


def _git_apply(folder: Path, patch: Path, *options: str) -> list[str]:
    """Apply a patch in ``folder``. Returns the positions where it does not fit; if there are any, nothing is changed."""
    # The ceiling keeps git from finding a repository above the folder, so paths are relative to the folder.
    # Line ends stay as they are whatever the user's settings.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.resolve().parent), "LC_ALL": "C"}
    done = _run_git("-c", "core.autocrlf=false", "-c", "apply.whitespace=nowarn", "apply", *options, str(patch), cwd=folder,
                    env=environment)
    if done.returncode == 0:
        return []
    lines = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.startswith("error: ")]
    return [line for line in lines if not line.endswith("patch does not apply")] or [done.stderr.strip()]


def clone_folder() -> Path:
    """The folder that ``fetch_checkout`` clones into."""
    return cache_folder() / f"insightface-{ARCFACE_TORCH_REVISION[:12]}"


def known_checkout() -> Path:
    """The checkout in the environment variable ``ARCFACE_TORCH``, or that of ``fetch_checkout``, or raise CheckoutError."""
    return find_checkout(os.environ.get("ARCFACE_TORCH") or clone_folder())


def fetch_checkout(source: str = ARCFACE_TORCH_URL) -> Path:
    """Clone the tested revision of arcface_torch, without the rest of insightface, into the cache, or raise CheckoutError."""
    clone = clone_folder()
    if not clone.is_dir():
        clone.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=clone.parent) as folder:
            work = Path(folder) / "clone"
            _git("clone", "--quiet", "--no-checkout", "--filter=blob:none", source, str(work))
            _git("-C", str(work), "sparse-checkout", "set", "--no-cone", f"/{ARCFACE_TORCH_FOLDER}/")
            _git("-C", str(work), "checkout", "--quiet", ARCFACE_TORCH_REVISION)
            find_checkout(work)
            os.replace(work, clone)
    return find_checkout(clone)


def _git(*arguments: str) -> None:
    if (done := _run_git(*arguments)).returncode:
        raise CheckoutError(f"git {' '.join(arguments)}: {done.stderr.strip()}")


def _run_git(*arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["git", *arguments], cwd=cwd, env=env, capture_output=True, text=True)
    except FileNotFoundError:
        raise CheckoutError("git is required but was not found on the PATH: install git") from None
