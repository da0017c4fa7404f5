"""Summarizes, verifies, draws and reindexes packs."""

import json
import os
from array import array
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import simplejpeg
from tqdm import tqdm

from f2c_plugin.data.dataset import IMAGE_SIZE, Pixels, RecordDataset, decode_face
from f2c_plugin.data.identities import Ints
from f2c_plugin.data.recordio import Buffer, Int64s, RecordFile, read_idx, rec_in, unpack_image_record
from f2c_plugin.data.tail import images_per_identity, large_identities, many_alone
from f2c_plugin.errors import InputError, OverwriteError, RecordError
from f2c_plugin.tools.plotting import pyplot, save_figure
from f2c_plugin.utils.atomic import require_writable, written_whole
from f2c_plugin.utils.extras import require
from f2c_plugin.utils.workers import worker_pool

SAMPLE = 1000  # images to read for facts that are not in the index
_CHUNK = 256  # records that a process verifies at a time


def describe(dataset: RecordDataset) -> list[tuple[str, str]]:
    """Summarize a pack in rows of (name, value). Sizes are those of up to SAMPLE images, spread over the pack."""
    index = dataset.index
    sample = spread(len(index), SAMPLE)
    encoded = [unpack_image_record(dataset.records.read(offset)).image for offset in index.offsets[sample].tolist()
               if not dataset.records.damage(offset)]
    sizes = Counter(map(_size, encoded)) + Counter({"no readable record": len(sample) - len(encoded)})
    mean_bytes = np.mean([len(image) for image in encoded]) if encoded else np.nan
    conflict, unusable = index.describe_conflict(), len(index.unusable)
    return [
        ("pack", str(dataset.records.path)), ("images", f"{len(index):,}"),
        ("identities", f"{len(index.numbers):,}, numbered up to {index.numbers[-1]}"),
        *([("labels disagree", conflict)] if conflict else []),
        *([("unusable records", f"{unusable:,}, damaged or not {IMAGE_SIZE}×{IMAGE_SIZE}: --verify lists them. Training "
                                "refuses them; f2c_skip_damaged = True leaves them out")] if unusable else []),
        ("images per identity", images_per_identity(index)),
        *(("warning", warning) for warning in (many_alone(index), large_identities(index)) if warning),
        ("bytes per image", f"{mean_bytes:,.0f} on average (of {len(encoded)} images)"),
        ("image sizes", ", ".join(f"{size} ({count})" for size, count in sizes.most_common(5)) + f" (of {len(sample)} images)"),
        ("config", f"config.rec = {json.dumps(str(dataset.root_dir), ensure_ascii=False)}; "
                   f"config.num_classes = {dataset.num_classes}; config.num_image = {len(index) + unusable}"),
    ]


def summary(dataset: RecordDataset) -> dict[str, object]:
    """What ``describe`` finds in the index, as numbers."""
    index = dataset.index
    sizes = np.diff(index.starts)
    return {"pack": str(dataset.records.path), "images": len(index), "identities": len(index.numbers),
            "last_identity": int(index.numbers[-1]), "labels_disagree": index.describe_conflict(),
            "unusable": len(index.unusable), "num_classes": dataset.num_classes,
            "images_per_identity": {"least": int(sizes.min()), "median": float(np.median(sizes)), "most": int(sizes.max()),
                                    "identities_with_one": int(np.count_nonzero(sizes == 1))},
            "warnings": [warning for warning in (many_alone(index), large_identities(index)) if warning]}


def spread(length: int, count: int) -> np.ndarray:
    """Up to ``count`` positions, spread evenly over ``length``."""
    return np.linspace(0, length - 1, min(count, length)).astype(int)


def _size(encoded: Buffer) -> str:
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(encoded)
        return f"{width}×{height} {colorspace}"
    except ValueError:
        return "PNG" if bytes(encoded[:4]) == b"\x89PNG" else "neither JPEG nor PNG"


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
    records = RecordFile(rec_in(root_dir))
    keys, offsets = read_idx(records.path.with_suffix(".idx"), progress=True)
    with worker_pool(processes, _open, (records.path,)) as pool:
        found = tqdm(pool.imap(_damage, offsets.tolist(), _CHUNK), "decoding", len(keys), unit=" records", disable=None)
        return len(keys), {key: f"record {key}: {damage}" for key, damage in zip(keys.tolist(), found, strict=True) if damage}


def _open(path: Path) -> None:
    global _records  # one in each worker process
    _records = RecordFile(path)


def _damage(offset: int) -> str | None:
    try:
        record = unpack_image_record(_records.read(offset))
        if len(record.image) or len(record.labels) < 2:  # not a bookkeeping record
            decode_face(record.image)
    except ValueError as error:
        return str(error)
    return None


def reindex(root_dir: str | Path) -> int:
    """Make ``train.idx`` of ``train.rec``. Returns the number of records.

    Records are numbered from 0 in the order of the file, as mxnet's rec2idx does. But a record that announces the images
    gets number 0 and the images follow from 1, wherever it stands: face2rec2 writes it behind the images. Raises
    OverwriteError if there is a ``train.idx``, RecordError if ``train.rec`` is damaged; then nothing is written.
    """
    records = RecordFile(rec_in(root_dir))
    path = records.path.with_suffix(".idx")
    if os.path.lexists(path):
        raise OverwriteError(f"{path} exists and is not overwritten: move it away to have another one made")
    found = array("q")
    with tqdm(total=records.size, desc="scanning", unit="B", unit_scale=True, disable=None) as bar:
        try:
            for offset, end in records.scan():
                found.append(offset)
                bar.update(end - offset)
        except RecordError as error:
            raise RecordError(f"{error}. The {len(found)} records before it are whole; {path.name} is not written, because "
                              "those behind it cannot be found: get the .rec again") from error
    offsets = np.array(found)
    with written_whole(path) as file:
        file.writelines(b"%d\t%d\n" % line for line in zip(_keys(records, offsets).tolist(), found, strict=True))
    return len(offsets)


def _keys(records: RecordFile, offsets: Int64s) -> Int64s:
    """The numbers of all records of a file, from their offsets (n,) in ascending order."""
    labels = records.labels(offsets, count=2)
    several = np.flatnonzero(~np.isnan(labels[:, 1])).tolist()
    # Bookkeeping records have several labels and no image; but the one that announces the images may have one.
    if len(several) > 1:
        several = [i for i in several if not len(records.image_record(int(offsets[i])).image)]
    images = np.delete(np.arange(len(offsets)), several)
    first = np.float32(len(images) + 1)  # behind the images
    header = [i for i in several if labels[i, 0] == first != labels[i, 1]]  # equal: an identity without images
    keys = np.arange(len(offsets))
    if header:
        order = [header[0], *images, *(i for i in several if i != header[0])]
        keys[order] = np.arange(len(offsets))
    return keys


def draw_sheet(dataset: RecordDataset, path: str | Path, identity: int | None = None, image: int | None = None,
               columns: int = 10, rows: int = 8) -> None:
    """Draw a contact sheet: the images of one identity, the image of one record, or random identities, one per row.

    Images that cannot be decoded stay gray. Needs Pillow. Raises RecordError if there is no such identity or record.
    """
    pillow = require("PIL.Image", extra="plot")
    form = pillow.registered_extensions().get(Path(path).suffix.lower())
    if form not in pillow.SAVE:
        raise InputError(f"{path}: unknown image format: name a file that ends with .png or .jpg")
    require_writable(path)
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
    with written_whole(path) as file:
        pillow.fromarray(contact_sheet(dataset, grid)).save(file, form)


def contact_sheet(dataset: RecordDataset, grid: Sequence[Ints]) -> Pixels:
    """The images at rows of positions, uint8 (H, W, 3). Images that cannot be decoded stay gray."""
    sheet = np.full((len(grid), IMAGE_SIZE, max(map(len, grid)), IMAGE_SIZE, 3), 128, np.uint8)
    for row, positions in enumerate(grid):
        for column, position in enumerate(positions):
            with suppress(RecordError):
                sheet[row, :, column] = dataset.face(int(position))
    return sheet.reshape(len(grid) * IMAGE_SIZE, -1, 3)
