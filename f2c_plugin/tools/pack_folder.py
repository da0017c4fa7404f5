"""Makes a pack of a folder that has one folder of images per identity."""

import json
import os
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tqdm import tqdm

from f2c_plugin.data.dataset import IMAGE_SIZE
from f2c_plugin.data.writer import new_pack, refuse_to_overwrite, write_insightface_pack, write_property
from f2c_plugin.errors import InputError, RecordError
from f2c_plugin.tools.image_files import storable
from f2c_plugin.utils.atomic import naming, written_whole
from f2c_plugin.utils.workers import worker_pool

LEFT_OUT, IDENTITIES = "left_out.tsv", "identities.json"
NO_IDENTITY = "not in the folder of an identity"
_NAMES = ("property", IDENTITIES, LEFT_OUT, "train.idx", "train.rec")  # in the order in which they appear
_OF_THE_SYSTEM = ("Thumbs.db", "desktop.ini", "__MACOSX")
_CHUNK = 64  # files that a process decodes at a time
_EXAMPLES = 3  # of each kind that are named in the report
Folder = tuple[str, tuple[str, ...]]  # path below the source; its real path behind those of the folders around it
File = tuple[str, str]  # path below the source, and why it is left out; "" if only decoding it can show


class LeftOut:
    """What a tool has left out of a folder.

    Attributes:
        out: folder that it has written.
        left_out: {kind of reason: number of files or folders}.
    """

    def __init__(self, out: Path):
        self.out = out
        self.left_out: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}

    def leave_out(self, path: str, reason: str) -> bytes:
        """Count it. Returns its line for ``out/left_out.tsv``."""
        kind, _, detail = reason.partition(": ")
        self.left_out[kind] += 1
        examples = self._examples.setdefault(kind, [])
        if len(examples) < _EXAMPLES:
            examples.append(f"{path} ({detail})" if detail else path)
        return f"{_on_one_line(path)}\t{_on_one_line(reason)}\n".encode()

    def lines(self) -> list[str]:
        """What was left out, in lines for people."""
        heading = [f"left out, see {self.out / LEFT_OUT}:"] if self.left_out else []
        return heading + [f"  {line}" for line in self.reasons()]

    def reasons(self) -> list[str]:
        """A line for each kind of reason to leave files out."""
        return [_examples_of(count, kind, self._examples[kind]) for kind, count in self.left_out.most_common()]


class Packed(LeftOut):
    """What ``pack_folder`` has packed and left out.

    Attributes:
        sizes: {folder name: number of images} of each identity, in the order of their numbers.
        unused: names of the folders without a usable image, which get no number.
    """

    def __init__(self, out: Path):
        super().__init__(out)
        self.sizes: Counter[str] = Counter()
        self.unused: list[str] = []

    def report(self) -> str:
        """What was packed and left out, in lines for people."""
        return "\n".join([f"{self.out}: {sum(self.sizes.values())} images of {len(self.sizes)} identities", *self.lines()])

    def reasons(self) -> list[str]:
        """Also one for folders without images."""
        unused = "folder without a usable image, which gets no number"
        return super().reasons() + ([_examples_of(len(self.unused), unused, self.unused[:_EXAMPLES])] if self.unused else [])


def _examples_of(count: int, kind: str, examples: list[str]) -> str:
    return f"{count} × {kind}: {_on_one_line(', '.join(examples))}{', …' if count > len(examples) else ''}"


def pack_folder(source: str | Path, out: str | Path, resize: bool = False, quality: int | None = None,
                processes: int | None = None) -> Packed:
    """Write a pack in InsightFace's layout from a folder that has one folder of images per identity.

    Every file below an identity's folder is decoded, and stored as ``image_files.storable`` says. Identities are numbered
    in the order of their folder names, of which ``out/identities.json`` is the list; folders without a usable image get no
    number. If anything is left out, ``out/left_out.tsv`` names it and says why. All files appear in ``out``, or none.

    Args:
        resize: scale and crop images of other sizes, which else are left out.
        quality: store all images that are not JPEGs as JPEGs of this quality, 1 to 100, instead of PNGs.
        processes: None means one per CPU.
    Raises:
        RecordError: there is nothing to pack, or a link leads out of ``source``.
        InputError: ``out`` is inside ``source``, or there is no such quality.
        OverwriteError: ``out`` already holds a file of such a name.
        F2CError: Pillow is needed and missing.
    """
    source, out = Path(source), Path(out)
    if quality is not None and not 1 <= quality <= 100:
        raise InputError(f"--quality {quality}: must be from 1 to 100")
    if not source.is_dir():
        raise RecordError(f"{source}: no such folder")
    if out.resolve().is_relative_to(source.resolve()):
        raise InputError(f"{out} is inside {source}: choose a folder outside, or the pack would be part of what is packed")
    refuse_to_overwrite(out, _NAMES)
    packed = Packed(out)
    count = sum(1 for _ in walk(source))  # also finds links that lead out, before the work begins
    with (new_pack(out, _NAMES) as folder, tempfile.TemporaryFile(dir=folder) as images,
          worker_pool(processes) as pool):
        # A pack begins with its number of images, which is known only when all are decoded. Until then they wait here.
        lengths = array("Q")
        with (written_whole(folder / LEFT_OUT) as left_out, naming(out / "train.rec"),
              tqdm(total=count, desc="decoding", unit=" files", disable=None) as bar):
            for path, image in pool.imap(partial(_image_or_reason, source, resize, quality), walk(source), _CHUNK):
                if isinstance(image, bytes):
                    images.write(image)
                    lengths.append(len(image))
                    packed.sizes[path.partition(os.sep)[0]] += 1
                else:
                    left_out.write(packed.leave_out(path, image))
                bar.update()
            images.seek(0)
        packed.unused = [name for name in sorted(os.listdir(source))
                         if name not in packed.sizes and not _is_hidden(name) and (source / name).is_dir()]
        if not lengths:
            raise RecordError("\n  ".join([f"{source}: no image to pack; it must hold a folder of images of "
                                           f"{IMAGE_SIZE}×{IMAGE_SIZE} pixels for each identity", *packed.reasons()]))
        if not packed.left_out:
            (folder / LEFT_OUT).unlink()
        with written_whole(folder / IDENTITIES) as file:  # a name that is not UTF-8 has surrogates, which JSON escapes
            names = json.dumps(list(packed.sizes), ensure_ascii=False, indent=0) + "\n"
            file.write(names.encode("utf-8", "backslashreplace"))
        write_property(folder, len(packed.sizes))
        stored = (images.read(length) for length in tqdm(lengths, "writing", unit=" images", disable=None))
        write_insightface_pack(folder / "train.rec", stored, list(packed.sizes.values()))
    return packed


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _OF_THE_SYSTEM


def walk(source: Path) -> Iterator[File]:
    """What is below ``source``, identity by identity, sorted by name. Raises RecordError if a link leads out."""
    root = os.path.realpath(source)
    folders: list[Folder] = [("", (root,))]
    while folders:
        folder, around = folders.pop()
        try:
            entries = sorted(os.scandir(source / folder), key=lambda entry: entry.name)
        except OSError as error:
            yield folder, f"cannot be read: {error.strerror}"
            continue
        inside: list[Folder] = []
        for entry in entries:
            path = os.path.join(folder, entry.name)
            target = Path(os.path.realpath(entry)) if entry.is_symlink() else entry
            if path == LEFT_OUT:
                pass  # f2c-plugin align has written it
            elif _is_hidden(entry.name):
                yield path, "hidden, or a file of the system"
            elif isinstance(target, Path) and not target.is_relative_to(root):
                # A folder from elsewhere must not pack other files of this machine.
                raise RecordError(f"{source / path} is a link to {target}, outside {source}: replace the link with a copy")
            elif target.is_dir():
                real = os.path.realpath(entry)
                if real in around:
                    yield path, "link to a folder around it"
                else:
                    inside.append((path, (*around, real)))
            elif not target.is_file():
                yield path, "neither a file nor a folder"
            else:
                yield path, "" if folder else NO_IDENTITY
        folders += inside[::-1]


def _image_or_reason(source: Path, resize: bool, quality: int | None, file: File) -> tuple[str, bytes | str]:
    """The path of a file, and what is stored of it or why nothing is."""
    path, reason = file
    return path, reason or storable(source / path, resize, quality)


def _on_one_line(text: str) -> str:
    r"""Text for a table and a terminal: control characters and what is not UTF-8 as \\ escapes."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
