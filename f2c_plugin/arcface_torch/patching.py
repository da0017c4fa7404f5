"""Opening an arcface_torch checkout for the plugin, and closing it again."""

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from f2c_plugin.errors import CheckoutError
from f2c_plugin.utils.paths import cache_folder, data_folder

HOST_URL = "https://github.com/deepinsight/insightface"
HOST_FOLDER = Path("recognition/arcface_torch")
# The revision that the patches were made for and the tests run with. The code of arcface_torch has
# not changed since 2023-06-10.
HOST_REVISION = "7fadd420c2351d0ffa8cac403421c1a3ed733365"
BUILT_IN_ONLY = "f2c_demo.py"  # a config that names what the host does not have


@dataclass
class Change:
    """What is to be done to one file of the checkout.

    Attributes:
        path: relative to the checkout.
        content: new content, or None to remove the file.
        reason: the patch or config that wants it.
    """

    path: Path
    content: bytes | None
    reason: str


def patches() -> list[Path]:
    """The patches, in the order in which they apply."""
    return sorted(data_folder("patches").glob("*.patch"))


def host_configs() -> list[Path]:
    """The configs for the host."""
    return sorted(file for file in data_folder("configs").glob("*.py") if file.name not in ("__init__.py", BUILT_IN_ONLY))


def find_host(folder) -> Path:
    """The arcface_torch folder in ``folder``, which may also be a checkout of all of insightface.

    Raises:
        CheckoutError: there is none.
    """
    for candidate in (Path(folder), Path(folder) / HOST_FOLDER):
        if (candidate / "train_v2.py").is_file() and (candidate / "partial_fc_v2.py").is_file():
            return candidate.resolve()
    raise CheckoutError(f"{folder}: no arcface_torch here (no train_v2.py); give the folder {HOST_FOLDER} of an insightface checkout")


def plan_install(host: Path) -> list[Change]:
    """What installing changes: the patches and configs that are not in yet. Empty if all is there.

    Configs of the same name stay as they are: they are there to be edited.

    Raises:
        CheckoutError: a patch does not fit.
    """
    changes = _patched(host, applied_patches(host), len(patches()))
    for config in host_configs():
        target = host / "configs" / config.name
        if not target.exists():
            changes.append(Change(target.relative_to(host), config.read_bytes(), "config"))
    return changes


def edited_configs(host: Path) -> list[Path]:
    """Configs in the checkout that have the name of one that comes along, and other content."""
    targets = [(host / "configs" / config.name, config) for config in host_configs()]
    return [target for target, config in targets if target.is_file() and target.read_bytes() != config.read_bytes()]


def plan_reverse(host: Path) -> list[Change]:
    """What undoing an installation changes. Configs that were edited since stay."""
    changes = _patched(host, applied_patches(host), 0)
    for config in host_configs():
        target = host / "configs" / config.name
        if target.is_file() and target.read_bytes() == config.read_bytes():
            changes.append(Change(target.relative_to(host), None, "config"))
    return changes


def apply(host: Path, changes: list[Change]) -> None:
    """Make the changes, all or none: new content is first written beside its place, old content kept until the end.

    Raises:
        CheckoutError: a link in the checkout leads out of it; nothing was changed.
    """
    places = [(change, (host / change.path).resolve()) for change in changes]
    for change, place in places:
        if not place.is_relative_to(host.resolve()):
            raise CheckoutError(f"{host / change.path} is, or lies behind, a link to {place}, outside the checkout. Nothing was "
                            "changed; put a copy in the place of the link")
    old = {place: place.read_bytes() if place.is_file() else None for _, place in places}
    partials = {place: place.with_name(place.name + ".f2c-partial") for _, place in places}
    try:
        for change, place in places:
            if change.content is not None:
                partials[place].write_bytes(change.content)
                if place.exists():
                    shutil.copymode(place, partials[place])
        for change, place in places:
            if change.content is None:
                place.unlink()
            else:
                os.replace(partials[place], place)
    except BaseException:
        for place, content in old.items():
            partials[place].unlink(missing_ok=True)
            if content is None:
                place.unlink(missing_ok=True)
            elif not place.is_file() or place.read_bytes() != content:
                place.write_bytes(content)
        raise


def applied_patches(host: Path) -> int:
    """How many of the patches are in; they stack, so these are the first ones.

    Raises:
        CheckoutError: the checkout is neither with nor without them; names the file and line that
            stands in the way.
    """
    misfits = []
    for count in range(len(patches()), -1, -1):
        with tempfile.TemporaryDirectory() as folder:
            _copy_touched(host, Path(folder))
            steps = [(patch, ["--reverse"]) for patch in reversed(patches()[:count])] + [(patch, []) for patch in patches()]
            for patch, options in steps:
                if places := _git_apply(Path(folder), patch, *options):
                    misfits.append((patch, places))
                    break
            else:
                return count
    patch, places = min(misfits, key=lambda misfit: len(misfit[1]))  # the state that it is nearest to
    raise CheckoutError(f"{patch.name} does not fit {host}: {', '.join(places)}. Nothing was changed. The patches are made "
                    f"for revision {HOST_REVISION[:12]} of {HOST_URL}; restore that file, or apply the patch by hand; patches of "
                    "another version of this plugin are taken out by that version's install --reverse")


def _patched(host, present, wanted) -> list[Change]:
    """Changes from ``present`` patches to ``wanted``, worked out in a copy. That they fit is known by now."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        touched = _copy_touched(host, copy)
        for patch in reversed(patches()[wanted:present]):
            _git_apply(copy, patch, "--reverse")
        for patch in patches()[present:wanted]:
            _git_apply(copy, patch)
        changes = []
        for path, reason in touched.items():
            before, after = (file.read_bytes() if (file := root / path).is_file() else None for root in (host, copy))
            if before != after:
                changes.append(Change(path, after, reason))
        return changes


def _copy_touched(host, folder) -> dict[Path, str]:
    """Copy the files that patches touch; returns which patches touch them."""
    touched: dict[Path, str] = {}
    for patch in patches():
        for name in re.findall(r"^\+\+\+ b/(.+)$", patch.read_text(), re.MULTILINE):
            path = Path(name)
            touched[path] = f"{touched[path]}, {patch.stem}" if path in touched else patch.stem
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            if (host / path).is_file():
                shutil.copy(host / path, folder / path)
    return touched


def _git_apply(folder, patch, *options) -> list[str]:
    """Empty if the patch fits, else the places where it does not. Nothing is changed then."""
    # Below the ceiling git takes the folder for no repository, and paths for relative to it; line
    # ends stay as they are whatever the user's settings.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.resolve().parent), "LC_ALL": "C"}
    command = ["git", "-c", "core.autocrlf=false", "-c", "apply.whitespace=nowarn", "apply", *options, str(patch)]
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    except FileNotFoundError:
        raise CheckoutError("git is needed to apply the patches, and there is none on the PATH") from None
    if done.returncode == 0:
        return []
    lines = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.startswith("error: ")]
    return [line for line in lines if not line.endswith("patch does not apply")] or [done.stderr.strip()]


def clone_folder() -> Path:
    """Where ``fetch_host`` clones to."""
    return cache_folder() / f"insightface-{HOST_REVISION[:12]}"


def known_host() -> Path:
    """The checkout that the environment variable ``ARCFACE_TORCH`` names, or else what ``fetch_host`` has cloned.

    Raises:
        CheckoutError: there is neither.
    """
    return find_host(os.environ.get("ARCFACE_TORCH") or clone_folder())


def fetch_host(source: str = HOST_URL) -> Path:
    """Clone the tested revision of the host, arcface_torch alone, into the cache; returns its folder.

    Raises:
        CheckoutError: the source cannot be cloned, or does not have the revision.
    """
    clone = clone_folder()
    if clone.is_dir():
        return find_host(clone)
    clone.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=clone.parent) as folder:
        work = Path(folder) / "clone"
        _git("clone", "--quiet", "--no-checkout", "--filter=blob:none", source, str(work))
        _git("-C", str(work), "sparse-checkout", "set", "--no-cone", f"/{HOST_FOLDER}/")
        _git("-C", str(work), "checkout", "--quiet", HOST_REVISION)
        find_host(work)
        os.replace(work, clone)
    return find_host(clone)


def _git(*arguments):
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        raise CheckoutError("git is needed to fetch the host, and there is none on the PATH") from None
    if done.returncode:
        raise CheckoutError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
