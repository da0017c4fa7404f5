"""Where the images of a new pack come from: folders, a list, tar files in WebDataset's layout, a Hugging Face dataset."""

import json
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from f2c_plugin.data.dataset import IMAGE_SIZE
from f2c_plugin.errors import InputError, RecordError
from f2c_plugin.tools.image_files import IMAGE_SUFFIXES, too_large
from f2c_plugin.tools.left_out import LEFT_OUT
from f2c_plugin.utils.extras import require

_OF_THE_SYSTEM = ("Thumbs.db", "desktop.ini", "__MACOSX")
_HIDDEN = "hidden, or a file of the system"
NO_IDENTITY = "not in the folder of an identity"
_TAR = re.compile(r"\.(tar|tar\.(gz|bz2|xz)|tgz)$", re.IGNORECASE)
_SAMPLE = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)  # key, which ends at the first dot as in WebDataset; extension
_LABELS = ("cls", "txt", "json")
_NUMBER = re.compile(r"^(\d+)(?:\.0+)?$")
_SPLIT = re.compile(r"(.+)-\d{5}-of-\d{5}\.parquet")  # as Hugging Face names its files
_ROWS = 32  # of a dataset that are read at a time
_FACES = f"images of {IMAGE_SIZE}×{IMAGE_SIZE} pixels"
Folder = tuple[str, tuple[str, ...]]  # path below the source; its real path behind those of the folders around it
File = tuple[str, str]  # path below the source, and why it is left out; "" if only decoding it can show


class Item(NamedTuple):
    """An image of an identity.

    Attributes:
        identity: its name; empty if it is unknown, and then the image is left out.
        name: of the image, for people.
        image: its file, its content, or why it is left out: "kind of reason" or "kind of reason: detail".
    """

    identity: str
    name: str
    image: Path | bytes | str


class Source(Protocol):
    """Images of identities, in any order. ``needs`` is what a source must hold, for people."""

    needs: str

    def count(self, out: Path) -> int | None:
        """How many items there are; None if only reading them all shows it.

        Raises F2CError if the source cannot be read, or packed into ``out``.
        """
        ...

    def items(self) -> Iterator[Item]:
        """All images, and whatever else is left out. May be called several times. Raises RecordError for what is damaged."""
        ...


def source_of(paths: Sequence[str | Path], root: str | Path | None = None, image_key: str | None = None,
              label_key: str | None = None) -> Source:
    """What is at ``paths``: several only of tar files, or of parquet files.

    Args:
        root: the folder of a list's paths, if it is not the list's.
        image_key, label_key: columns of a dataset; or ``label_key``, a field of the ``.json`` in tar files.
    Raises:
        RecordError: there is nothing.
        InputError: several that are not of one kind, or an option that the source has not.
    """
    files = [Path(path) for path in paths]
    beside: list[Path] = []
    if len(files) == 1 and files[0].is_dir() and not _is_saved_dataset(files[0]):
        files, beside = _shards(files[0])
    options = {"root": root, "image-key": image_key, "label-key": label_key}
    if all(_TAR.search(file.name) for file in files):
        source, takes = Tars(files, label_key, beside), {"label-key"}
    elif all(file.suffix == ".parquet" for file in files):
        source, takes = HuggingFace(files, image_key, label_key, beside), {"image-key", "label-key"}
    elif len(files) > 1:
        raise InputError(f"{files[0]}, {files[1]}: several sources must all be .tar files, or all .parquet files")
    elif _is_saved_dataset(files[0]):
        source, takes = HuggingFace(files, image_key, label_key), {"image-key", "label-key"}
    elif files[0].is_dir():
        source, takes = Folders(files[0]), set[str]()
    else:
        source, takes = Listed(files[0], root), {"root"}
    for option, value in options.items():
        if value is not None and option not in takes:
            raise InputError(f"--{option} {value}: {source} has none, since it is {source.kind}")
    return source


def _shards(folder: Path) -> tuple[list[Path], list[Path]]:
    """The tar files in a folder, or else the parquet files, and the other files; the folder itself if it has folders.

    In a repository of Hugging Face, as it is downloaded, the parquet files are in the folder ``data``.
    """
    visible = sorted(path for path in folder.iterdir() if not _is_hidden(path.name))
    folders = [path for path in visible if path.is_dir()]
    if [path.name for path in folders] == ["data"] and any(path.suffix == ".parquet" for path in folders[0].iterdir()):
        shards, others = _shards(folders[0])
        return shards, [path for path in visible if path.is_file()] + others
    shards = [path for path in visible if _TAR.search(path.name)] or [path for path in visible if path.suffix == ".parquet"]
    if folders or not shards:
        return [folder], []
    if len(splits := sorted({match[1] for path in shards if (match := _SPLIT.fullmatch(path.name))})) > 1:
        raise InputError(f"{folder}: has the splits {', '.join(splits)}: name the files of one, as "
                         f"{folder / splits[-1]}-*.parquet")
    return shards, [path for path in visible if path not in shards]


def _beside(files: Sequence[Path]) -> Iterator[Item]:
    """Files that lie beside those of a source."""
    for file in files:
        if file.name != LEFT_OUT:
            yield Item("", file.name, "not one of the files that are packed")


def _is_saved_dataset(path: Path) -> bool:
    return any(all((path / name).is_file() for name in names)
               for names in (["dataset_dict.json"], ["dataset_info.json", "state.json"]))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _OF_THE_SYSTEM


def _name_of(label: object) -> str:
    """The name of an identity; empty if the label is neither text nor a whole number."""
    if isinstance(label, bytes):
        label = label.decode(errors="surrogateescape")
    return str(label).strip() if isinstance(label, str | int) and not isinstance(label, bool) else ""


class Folders:
    """A folder that has one folder of images per identity, whose images may also lie in folders inside these."""

    kind = "a folder of folders"
    needs = f"a folder of {_FACES} for each identity"

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def __str__(self) -> str:
        return str(self.folder)

    def count(self, out: Path) -> int:
        if not self.folder.is_dir():
            raise RecordError(f"{self.folder}: no such folder")
        if out.resolve().is_relative_to(self.folder.resolve()):
            raise InputError(f"{out} is inside {self.folder}: choose a folder outside, or the pack would be part of what is "
                             "packed")
        return sum(1 for _ in walk(self.folder))  # also finds links that lead out, before the work begins

    def items(self) -> Iterator[Item]:
        for path, reason in walk(self.folder):
            top = path.partition(os.sep)[0]
            is_identity = not _is_hidden(top) and (top != path or (self.folder / top).is_dir())
            yield Item(top if is_identity else "", path, reason or self.folder / path)


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
        if folder and not entries:
            yield folder, "empty folder"
        inside: list[Folder] = []
        for entry in entries:
            path = os.path.join(folder, entry.name)
            target = Path(os.path.realpath(entry)) if entry.is_symlink() else entry
            if path == LEFT_OUT:
                pass  # f2c-plugin align has written it
            elif _is_hidden(entry.name):
                yield path, _HIDDEN
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


class Listed:
    """A list of images: in each line a path and an identity; or an index, a label and a path, as in im2rec's lists; or a
    flag, a path, a label and perhaps a box and points, as in face2rec2's. Images of labels such as −1 and nan are left out."""

    kind = "a list"
    needs = f"the paths and identities of {_FACES}"

    def __init__(self, path: Path, root: str | Path | None = None):
        self.path, self.root = path, Path(root) if root is not None else path.parent

    def __str__(self) -> str:
        return str(self.path)

    def count(self, out: Path) -> int:
        if not self.path.is_file():
            raise RecordError(f"{self.path}: no such file or folder")
        if not self.root.is_dir():
            raise InputError(f"--root {self.root}: no such folder")
        return sum(1 for _ in self._lines())

    def items(self) -> Iterator[Item]:
        around = os.path.join(os.path.realpath(self.root), "")
        for identity, path in self._lines():
            # A list from elsewhere must not pack other files of this machine.
            outside = not os.path.realpath(self.root / path).startswith(around)
            image = "not in the list's folder, or that of --root" if outside else self.root / path
            yield Item(identity, path, image if identity else "an image, no label")

    def _lines(self) -> Iterator[tuple[str, str]]:
        """Identity and path of each line that is not empty."""
        with open(self.path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                match [word.strip() for word in line.split("\t")]:
                    case [path, identity] if path and identity:
                        yield identity, path
                    case [flag, path, label, *box] if (flag.isdecimal() and not _is_number(path) and _is_number(label)
                                                       and all(map(_is_number, box))):
                        yield _identity_of(label), path
                    case [index, label, *_, path] if index.isdecimal() and label and path and not _is_number(path):
                        yield _identity_of(label), path
                    case _:
                        raise RecordError(f"{self.path}: line {number} is {line[:60]!r}, but must be a path and an identity, "
                                          "or as in im2rec's lists an index, a label and a path, separated by tabs")


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _identity_of(label: str) -> str:
    """The name of the identity of a label in a list; empty if it is a number, and not a whole one from 0."""
    match = _NUMBER.fullmatch(label)  # im2rec writes its labels as floats
    return match[1] if match else "" if _is_number(label) else label


class _Header(tarfile.TarInfo):
    """Raises ReadError for a damaged header, which tarfile takes for the end of the file."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_Header":
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # pyright: ignore[reportAttributeAccessIssue]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


class Tars:
    """Tar files in WebDataset's layout: the files of an image follow each other and have one name up to the first dot.

    The identity is the content of ``.cls`` or of ``.txt``, or a field of ``.json``: ``label_key``, or else "label".
    """

    kind = "of tar files"
    needs = f"{_FACES}, each with a .cls, .txt or .json of the same name beside it"

    def __init__(self, paths: Sequence[Path], label_key: str | None = None, beside: Sequence[Path] = ()):
        self.paths, self.label_key, self.beside = paths, label_key, beside

    def __str__(self) -> str:
        return f"{self.paths[0]}{', …' if len(self.paths) > 1 else ''}"

    def count(self, out: Path) -> None:
        for path in self.paths:
            if not path.is_file():
                raise RecordError(f"{path}: no such file")

    def items(self) -> Iterator[Item]:
        yield from _beside(self.beside)
        for path in self.paths:
            key, parts = "", dict[str, bytes | str]()  # content by extension; as text, why there is none
            for name, content in self._files(path):
                match = _SAMPLE.fullmatch(name)
                if isinstance(content, str) or not match:
                    yield Item("", f"{path.name}/{name}", content if isinstance(content, str) else "no name like key.extension")
                    continue
                extension = match[2].lower()
                if parts and (match[1] != key or extension in parts):
                    yield self._item(path, key, parts)
                    parts = {}
                key, parts[extension] = match[1], content
            if parts:
                yield self._item(path, key, parts)

    def _item(self, path: Path, key: str, parts: dict[str, bytes | str]) -> Item:
        images = [each for each in parts if f".{each}" in IMAGE_SUFFIXES]
        name = f"{path.name}/{key}.{next(iter(images or parts))}"
        identity = self._identity(parts)
        if len(images) != 1:
            return Item(identity, name, f"several images of one name: {', '.join(images)}" if images else "a label, no image")
        fields = "neither .cls nor .txt nor .json with label" if self.label_key is None else f".json with {self.label_key}"
        return Item(identity, name, parts[images[0]] if identity else f"an image, no label: {fields}")

    def _identity(self, parts: dict[str, bytes | str]) -> str:
        for each in _LABELS if self.label_key is None else ("json",):
            if each in parts:
                try:
                    found = json.loads(parts[each]) if each == "json" else parts[each]
                except (ValueError, RecursionError):
                    return ""
                return _name_of(found.get(self.label_key or "label") if isinstance(found, dict) else found)
        return ""

    def _files(self, path: Path) -> Iterator[tuple[str, bytes | str]]:
        """Names and contents, one after the other; empty of those that are not looked at. As text, why a file is left out."""
        try:
            with tarfile.open(name=path, mode="r|*", tarinfo=_Header) as tar:
                while member := tar.next():
                    setattr(tar, "members", [])  # noqa: B010  # or it would keep all that it has seen; typeshed lacks it
                    name = member.name
                    extension = name.rpartition(".")[2].lower()
                    if member.isdir():
                        continue
                    if _is_hidden(os.path.basename(name)):
                        yield name, _HIDDEN
                    elif not member.isfile():
                        yield name, "neither a file nor a folder"
                    elif reason := too_large(member.size):
                        yield name, reason
                    elif f".{extension}" in IMAGE_SUFFIXES or extension in _LABELS:
                        yield name, tar.extractfile(member).read()  # pyright: ignore[reportOptionalMemberAccess]
                    else:
                        yield name, b""
        except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            raise RecordError(f"{path}: not a whole tar file: {error}: get it again, or leave it out") from error


class HuggingFace:
    """A dataset of the datasets package on the disk: a folder of ``save_to_disk``, or parquet files."""

    kind = "a dataset"
    needs = f"{_FACES} with labels"

    def __init__(self, paths: Sequence[Path], image_key: str | None = None, label_key: str | None = None,
                 beside: Sequence[Path] = ()):
        self.paths, self._image_key, self._label_key, self.beside = paths, image_key, label_key, beside

    def __str__(self) -> str:
        return f"{self.paths[0]}{', …' if len(self.paths) > 1 else ''}"

    @cached_property
    def _features(self) -> dict[str, Any]:
        """What is in each column."""
        return self._features_of(self._parquet(self.paths[0])) if self._saved is None else self._saved.features

    def _features_of(self, parquet: Any) -> dict[str, Any]:
        return require("datasets", extra="huggingface").Features.from_arrow_schema(parquet.schema_arrow)

    @cached_property
    def _saved(self) -> Any:
        """The dataset in a folder; None if it is in parquet files."""
        datasets = require("datasets", extra="huggingface")
        if self.paths[0].is_file():
            return None
        try:
            found = datasets.load_from_disk(str(self.paths[0]))
        except Exception as error:  # it raises almost anything
            raise RecordError(f"{self.paths[0]}: cannot be read as a dataset: {error}") from error
        if isinstance(found, dict):
            raise InputError(f"{self.paths[0]}: has the splits {', '.join(found)}: name one, as "
                             f"{self.paths[0] / next(iter(found))}")
        return found

    def _parquet(self, path: Path) -> Any:
        try:
            return require("pyarrow.parquet", extra="huggingface").ParquetFile(path)
        except (OSError, ValueError) as error:
            raise RecordError(f"{path}: cannot be read as parquet: {error}") from error

    def _columns(self) -> list[str]:
        """The columns of images and labels."""
        datasets = require("datasets", extra="huggingface")
        return [self._column("--image-key", self._image_key, datasets.Image),
                self._column("--label-key", self._label_key, datasets.ClassLabel)]

    def _column(self, option: str, key: str | None, kind: type) -> str:
        if key is not None and key not in self._features:
            raise InputError(f"{option} {key}: {self} has only the columns {', '.join(self._features)}")
        found = [name for name, feature in self._features.items() if isinstance(feature, kind)]
        if key is None and len(found) != 1:
            raise InputError(f"{self}: {len(found)} of its columns are of the kind {kind.__name__}: name one of "
                             f"{', '.join(found or self._features)} with {option}")
        return key if key is not None else found[0]

    def count(self, out: Path) -> int:
        for path in self.paths:
            if not path.exists():
                raise RecordError(f"{path}: no such file")
        columns = self._columns()  # raises before the work begins
        if self._saved is not None:
            return len(self._saved)
        rows = 0
        for path in self.paths:
            parquet = self._parquet(path)
            rows += parquet.metadata.num_rows
            here = self._features_of(parquet)
            for column in columns:
                kinds = [type(features.get(column)).__name__ for features in (self._features, here)]
                if kinds[0] != kinds[1]:
                    raise InputError(f"{path}: its column {column} is of the kind {kinds[1]}, and that of {self.paths[0]} "
                                     f"{kinds[0]}: pack them apart, and merge the packs")
        return len(self.beside) + rows

    def items(self) -> Iterator[Item]:
        image_column, label_column = self._columns()
        yield from _beside(self.beside)
        for number, (row, names) in enumerate(self._rows(label_column)):
            label, image = row.get(label_column), row.get(image_column)
            if names is not None:
                label = names[label] if label is not None and 0 <= label < len(names) else None  # -1: not known
            if isinstance(image, dict):
                image = image.get("bytes")
            identity = _name_of(label)
            if not isinstance(image, bytes):
                image = "no bytes of an image"
            yield Item(identity, f"row {number}", image if identity else f"an image, no label: {label_column}")

    def _rows(self, label_column: str) -> Iterator[tuple[dict[str, Any], list[str] | None]]:
        """Images as they are stored, not decoded; and the names of labels, of which each file has its own."""
        columns = self._columns()
        parts: Iterable[tuple[Any, dict[str, Any]]]
        if self._saved is not None:
            parts = [(self._saved.select_columns(columns).with_format("arrow").iter(_ROWS), self._features)]
        else:
            parts = ((parquet.iter_batches(_ROWS, columns=columns), self._features_of(parquet))
                     for parquet in map(self._parquet, self.paths))
        try:
            for tables, features in parts:
                names = getattr(features[label_column], "names", None)
                for table in tables:
                    yield from ((row, names) for row in table.to_pylist())
        except (OSError, ValueError) as error:
            raise RecordError(f"{self}: cannot be read: {error}") from error
