"""Installs the plugin into an arcface_torch checkout, and removes it again."""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from f2c_plugin.errors import CheckoutError
from f2c_plugin.utils.atomic import partials_of, written_whole
from f2c_plugin.utils.paths import cache_folder, data_folder, require_no_file

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
    reasons: list[str]  # the patches that require the change, or "config"


def patches() -> list[Path]:
    """The patches, in the order in which they apply."""
    return sorted(data_folder("patches").glob("*.patch"))


def arcface_torch_configs() -> list[Path]:
    """The configs that are copied into the checkout."""
    return sorted(file for file in data_folder("configs").glob("*.py") if file.name not in ("__init__.py", BUILT_IN_ONLY))


def find_checkout(folder: str | Path) -> Path:
    """Find arcface_torch in ``folder``, which is arcface_torch itself or a checkout of insightface, or raise CheckoutError."""
    require_no_file(folder, "the folder of arcface_torch", "train_v2.py", CheckoutError)
    for candidate in (Path(folder), Path(folder) / ARCFACE_TORCH_FOLDER):
        if (candidate / "train_v2.py").is_file() and (candidate / "partial_fc_v2.py").is_file():
            return candidate.resolve()
    raise CheckoutError(f"{folder}: no arcface_torch here (no train_v2.py): give the folder {ARCFACE_TORCH_FOLDER} of an "
                        "insightface checkout")


def plan_install(checkout: Path) -> list[Change]:
    """The patches and configs that are still to be installed. Configs that exist are kept, because users edit them."""
    return _patched(checkout, True) + [Change(path, config.read_bytes(), ["config"]) for path, config in _configs().items()
                                       if not (checkout / path).exists()]


def edited_configs(checkout: Path) -> list[Path]:
    """Configs in the checkout that have the name of one of this package's configs but different content."""
    return [checkout / path for path, config in _configs().items()
            if _content(checkout / path) not in (None, config.read_bytes())]


def plan_reverse(checkout: Path) -> list[Change]:
    """The changes that undo an installation. Edited configs are kept."""
    return _patched(checkout, False) + [Change(path, None, ["config"]) for path, config in _configs().items()
                                        if _content(checkout / path) == config.read_bytes()]


def _configs() -> dict[Path, Path]:
    """{path in the checkout: our file} of each config."""
    return {Path("configs") / config.name: config for config in arcface_torch_configs()}


def _touched() -> dict[Path, list[Path]]:
    """{path in the checkout: its patches, in order} of each file that is patched."""
    touched: dict[Path, list[Path]] = {}
    for patch in patches():
        for name in re.findall(r"^\+\+\+ b/(.+)$", patch.read_text(encoding="utf-8"), re.MULTILINE):
            touched.setdefault(Path(name), []).append(patch)
    return touched


def apply(checkout: Path, changes: list[Change]) -> None:
    """Make all changes, or restore the old content if one fails. Removes what a killed installation has left.

    Raises CheckoutError if a link leads out of the checkout.
    """
    targets = {path: (checkout / path).resolve() for path in [*_touched(), *_configs()]}
    for path, target in targets.items():
        if not target.is_relative_to(checkout.resolve()):
            raise CheckoutError(f"{checkout / path} is, or is behind, a link to {target}, outside the checkout. Nothing "
                                "was changed: replace the link with a copy")
    for target in targets.values():
        for partial in partials_of(target):
            partial.unlink()
    old = {targets[change.path]: _content(targets[change.path]) for change in changes}
    try:
        with ExitStack() as files:  # all are on disk before the first takes its place
            for change in changes:
                if change.content is not None:
                    files.enter_context(_replaced(targets[change.path], change.content))
        for change in changes:
            if change.content is None:
                targets[change.path].unlink()
    except BaseException:
        for target, content in old.items():
            if content is None:
                target.unlink(missing_ok=True)
            elif _content(target) != content:
                with _replaced(target, content):
                    pass
        raise


@contextmanager
def _replaced(target: Path, content: bytes) -> Iterator[None]:
    """Write new content, which takes the file's place, with its permissions, when this ends."""
    with written_whole(target) as file:
        if target.exists():
            shutil.copymode(target, file.name)
        file.write(content)
        file.flush()
        yield


def _patched(checkout: Path, wanted: bool) -> list[Change]:
    """Changes that apply all patches, or none of them.

    Each file is judged by itself, so an installation that was killed half-way can be completed and undone. Raises
    CheckoutError if a patch does not fit.
    """
    changes: list[Change] = []
    misfits: list[_Misfit] = []
    num_applied = num_missing = 0
    for path, of_file in _touched().items():
        content = _content(checkout / path)
        try:
            count, without, with_all = _fit(path, content, of_file)
        except _Misfit as misfit:
            misfits.append(misfit)
            continue
        num_applied, num_missing = num_applied + count, num_missing + len(of_file) - count
        after = with_all if wanted else without
        if after != content:
            changes.append(Change(path, after, [patch.stem for patch in (of_file[count:] if wanted else of_file[:count])]))
    if misfits:
        places = "; ".join(misfit.if_applied if num_applied > num_missing else misfit.if_missing for misfit in misfits)
        raise CheckoutError(f"{checkout}: {places}. Nothing was changed. The patches are for revision "
                            f"{ARCFACE_TORCH_REVISION[:12]} of {ARCFACE_TORCH_URL}: restore the file or apply the patch by "
                            "hand. To remove the patches of another version of this plugin, use that version's "
                            "install --reverse")
    return changes


class _Misfit(Exception):
    """Where patches to a file do not fit, depending on what it is meant to be: patched, or not."""

    def __init__(self, if_applied: str, if_missing: str):
        self.if_applied, self.if_missing = if_applied, if_missing


def _fit(path: Path, content: bytes | None, of_file: list[Path]) -> tuple[int, bytes | None, bytes | None]:
    """How many of its patches a file has, and its content without and with all. They stack: it has the first ones.

    Raises _Misfit if there is no such number.
    """
    problems: list[str] = []
    for count in range(len(of_file), -1, -1):
        try:
            without = _git_apply(path, content, of_file[:count][::-1], "--reverse")
            return count, without, _git_apply(path, without, of_file)
        except _DoesNotApply as error:
            problems.append(str(error))
    raise _Misfit(problems[0], problems[-1])


class _DoesNotApply(Exception):
    """A patch does not fit a file. Names both and the line."""


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _git_apply(path: Path, content: bytes | None, of_file: Sequence[Path], *options: str) -> bytes | None:
    """The content of a file after its part of each patch; None is no file. Raises _DoesNotApply."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            copy.write_bytes(content)
        # The ceiling keeps git from finding a repository above the folder, so paths are relative to the folder.
        # Line ends stay as they are whatever the user's settings, which need not be readable.
        environment = {**os.environ, "GIT_CEILING_DIRECTORIES": os.path.dirname(os.path.realpath(folder)), "LC_ALL": "C",
                       "GIT_CONFIG_GLOBAL": os.devnull}
        for patch in of_file:
            done = _run_git("-c", "core.autocrlf=false", "-c", "apply.whitespace=nowarn", "apply", f"--include={path}",
                            *options, str(patch), cwd=folder, env=environment)
            if done.returncode:
                place = re.search(r"patch failed: (.+)", done.stderr)
                raise _DoesNotApply(f"{patch.name} does not fit {place[1] if place else done.stderr.strip()}")
        return _content(copy)


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


def _run_git(*arguments: str, cwd: str | None = None, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["git", *arguments], cwd=cwd, env=env, capture_output=True, encoding="utf-8",
                              errors="replace")
    except FileNotFoundError:
        raise CheckoutError("git is required but was not found on the PATH: install git") from None
