"""Summarizes, verifies and draws packs, and makes packs from folders of images."""

import multiprocessing
from collections import Counter
from contextlib import suppress
from itertools import chain
from pathlib import Path

import numpy as np
import simplejpeg
from tqdm import tqdm

from f2c_plugin.data.dataset import IMAGE_SIZE, RecordDataset, decode_face
from f2c_plugin.data.recordio import Buffer, RecordFile, read_idx, unpack_image_record
from f2c_plugin.data.writer import refuse_to_overwrite, write_insightface_pack
from f2c_plugin.errors import InputError, RecordError
from f2c_plugin.tools.plotting import pyplot, save_figure
from f2c_plugin.utils.extras import require

SAMPLE = 1000  # images to read for facts that are not in the index
_CHUNK = 256  # records that a process verifies at a time
_SUFFIXES = (".jpg", ".jpeg", ".png")


def describe(dataset: RecordDataset) -> list[tuple[str, str]]:
    """Summarize a pack in rows of (name, value). Sizes are those of up to SAMPLE images, spread over the pack."""
    index = dataset.index
    per_identity = np.diff(index.starts)
    sample = spread(len(index), SAMPLE)
    encoded = [unpack_image_record(dataset.records.read(offset)).image for offset in index.offsets[sample].tolist()
               if not dataset.records.damage(offset)]
    sizes = Counter(map(_size, encoded)) + Counter({"no readable record": len(sample) - len(encoded)})
    mean_bytes = np.mean([len(image) for image in encoded]) if encoded else np.nan
    conflict = index.describe_conflict()
    return [
        ("pack", str(dataset.records.path)), ("images", f"{len(index):,}"),
        ("identities", f"{len(per_identity):,}, numbered up to {index.numbers[-1]}"),
        *([("labels disagree", conflict)] if conflict else []),
        ("images per identity", f"{per_identity.min()} to {per_identity.max()}, median {np.median(per_identity):g}, "
                                f"{(per_identity == 1).mean():.1%} with one image"),
        ("bytes per image", f"{mean_bytes:,.0f} on average (of {len(encoded)} images)"),
        ("image sizes", ", ".join(f"{size} ({count})" for size, count in sizes.most_common(5)) + f" (of {len(sample)} images)"),
        ("config", f'config.rec = "{dataset.root_dir}"; config.num_classes = {index.numbers[-1] + 1}; '
                   f"config.num_image = {len(index) + len(index.unreadable)}"),
    ]


def spread(length: int, count: int) -> np.ndarray:
    """Up to ``count`` positions, spread evenly over ``length``."""
    return np.linspace(0, length - 1, min(count, length)).astype(int)


def _size(encoded: Buffer) -> str:
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(encoded)
        return f"{width}×{height} {colorspace}"
    except ValueError:
        return "not a JPEG"


def draw_histogram(dataset: RecordDataset, path: str | Path) -> None:
    """Draw the histogram of images per identity. Needs matplotlib."""
    per_identity = np.diff(dataset.index.starts)
    figure, axis = pyplot().subplots(figsize=(6, 3.6), layout="constrained")
    axis.hist(per_identity, np.arange(1, np.percentile(per_identity, 99.5) + 2) - 0.5)
    axis.set(title=f"{len(dataset):,} images of {len(per_identity):,} identities", xlabel="images per identity",
             ylabel="identities")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    save_figure(figure, path)


def verify(root_dir: str | Path, processes: int | None = None) -> tuple[int, dict[int, str]]:
    """Read every record of a pack and decode its image. Needs no index, so it also works on packs that cannot be indexed.

    Returns the number of records, and {record number: what is wrong with it} for every unusable record. Raises
    RecordError if the ``.rec`` or the ``.idx`` is missing or empty, or the ``.idx`` is not an index.
    """
    records = RecordFile(Path(root_dir) / "train.rec")
    keys, offsets = read_idx(records.path.with_suffix(".idx"), progress=True)
    damaged: dict[int, str] = {}
    starts = range(0, len(keys), _CHUNK)
    with (multiprocessing.Pool(processes, _open, (records.path, keys, offsets)) as pool,
          tqdm(total=len(keys), desc="decoding", unit=" records", disable=None) as bar):
        for start, found in zip(starts, pool.imap(_damaged, starts), strict=True):
            damaged |= found
            bar.update(min(_CHUNK, len(keys) - start))
    return len(keys), damaged


def _open(path: Path, keys: np.ndarray, offsets: np.ndarray) -> None:
    global _records, _keys, _offsets  # one of each per process of the pool
    _records, _keys, _offsets = RecordFile(path), keys, offsets


def _damaged(start: int) -> dict[int, str]:
    found: dict[int, str] = {}
    chunk = slice(start, start + _CHUNK)
    for key, offset in zip(_keys[chunk].tolist(), _offsets[chunk].tolist(), strict=True):
        try:
            record = unpack_image_record(_records.read(offset))
            if len(record.image) or len(record.labels) < 2:  # not a bookkeeping record
                decode_face(record.image)
        except ValueError as error:
            found[key] = f"record {key}: {error}"
    return found


def draw_sheet(dataset: RecordDataset, path: str | Path, identity: int | None = None, image: int | None = None,
               columns: int = 10, rows: int = 8) -> None:
    """Draw a contact sheet: the images of one identity, the image of one record, or random identities, one per row.

    Images that cannot be decoded stay gray. Needs Pillow. Raises RecordError if there is no such identity or record.
    """
    pillow = require("PIL.Image", extra="plot")
    index = dataset.index
    if image is not None:
        positions = np.flatnonzero(index.keys == image)
        if not len(positions):
            raise RecordError(f"{dataset.records.path}: no image has record number {image}")
        grid = [positions]
    elif identity is not None:
        positions = index.images_of(identity)[:columns * rows]
        if not len(positions):
            raise RecordError(f"{dataset.records.path}: identity {identity} has no images")
        grid = [positions[start:start + columns] for start in range(0, len(positions), columns)]
    else:
        chosen = np.random.default_rng().permutation(len(index.numbers))[:rows]
        grid = [index.grouped[index.starts[i]:index.starts[i + 1]][:columns] for i in chosen]
    sheet = np.full((len(grid), IMAGE_SIZE, max(map(len, grid)), IMAGE_SIZE, 3), 128, np.uint8)
    for row, positions in enumerate(grid):
        for column, position in enumerate(positions):
            with suppress(RecordError):
                sheet[row, :, column] = dataset.face(int(position))
    try:
        pillow.fromarray(sheet.reshape(len(grid) * IMAGE_SIZE, -1, 3)).save(path)
    except ValueError as error:  # an unknown suffix
        raise InputError(f"{path}: {error}") from error


def pack_folder(source: str | Path, out: str | Path) -> tuple[int, int]:
    """Write a pack in InsightFace's layout from a folder that has one folder of images per identity.

    Identities are numbered in the order of their folder names. Images are stored unchanged. Returns the numbers of
    identities and images. Raises RecordError if there is nothing to pack or a link leads out of ``source``, and
    OverwriteError if ``out`` already holds a pack.
    """
    source, out = Path(source), Path(out)
    if not source.is_dir():
        raise RecordError(f"{source}: no such folder")
    refuse_to_overwrite(out)
    folders = [sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
               for folder in sorted(source.iterdir()) if folder.is_dir()]
    sizes = [len(images) for images in folders if images]
    paths = list(chain.from_iterable(folders))
    if not paths:
        raise RecordError(f"{source}: no folder holds {', '.join(_SUFFIXES)} files: give a folder with one folder per identity")
    for path in paths:  # a folder from elsewhere must not pack other files of this machine
        if not path.resolve().is_relative_to(source.resolve()):
            raise RecordError(f"{path} is, or is behind, a link to {path.resolve()}, outside {source}: "
                              "replace the link with a copy")
    out.mkdir(parents=True, exist_ok=True)
    files = (path.read_bytes() for path in tqdm(paths, "packing", unit=" images", disable=None))
    write_insightface_pack(out / "train.rec", files, sizes)
    (out / "property").write_text(f"{len(sizes)},{IMAGE_SIZE},{IMAGE_SIZE}\n")
    return len(sizes), len(paths)
