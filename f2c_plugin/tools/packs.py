"""What a pack holds, whether it is whole, what it looks like; and making one from a folder of images."""

import multiprocessing
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import simplejpeg
from tqdm import tqdm

from f2c_plugin.data.dataset import IMAGE_SIZE, RecordDataset, decode_face
from f2c_plugin.data.recordio import RecordFile, read_idx, unpack_image_record
from f2c_plugin.data.writer import refuse_to_overwrite, write_insightface_pack
from f2c_plugin.errors import RecordError

SAMPLE = 1000  # images that are looked at for what the index does not know
_CHUNK = 256  # images that a process verifies at a time
_SUFFIXES = (".jpg", ".jpeg", ".png")


def describe(dataset: RecordDataset) -> list[tuple[str, str]]:
    """What a pack holds, as lines of (what, finding). Sizes are of up to SAMPLE images, spread over the pack.

    """
    index = dataset.index
    per_identity = np.diff(index.starts)
    sample = spread(len(index), SAMPLE)
    encoded = [unpack_image_record(dataset.records.read(offset)).image for offset in index.offsets[sample].tolist()
               if not dataset.records.damage(offset)]
    sizes = Counter(_size(image) for image in encoded)
    sizes["no readable record"] = len(sample) - len(encoded)
    sizes = +sizes
    return [
        ("pack", str(dataset.records.path)),
        ("images", f"{len(index):,}"),
        ("identities", f"{len(per_identity):,}, numbered up to {index.numbers[-1]}"),
        ("images per identity", f"{per_identity.min()} to {per_identity.max()}, median {np.median(per_identity):g}, "
                                f"{(per_identity == 1).mean():.1%} with one image"),
        ("bytes per image", f"{np.mean([len(image) for image in encoded] or np.nan):,.0f} on average (of {len(encoded)} images)"),
        ("image sizes", ", ".join(f"{size} ({count})" for size, count in sizes.most_common(5)) + f" (of {len(sample)} images)"),
        ("config", f'config.rec = "{dataset.root_dir}"; config.num_classes = {index.numbers[-1] + 1}; '
                   f"config.num_image = {len(index) + len(index.unreadable)}"),
    ]


def spread(length: int, count: int) -> np.ndarray:
    """Up to ``count`` positions, spread evenly over ``length``."""
    return np.linspace(0, length - 1, min(count, length)).astype(int)


def _size(encoded):
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(encoded)
        return f"{width}×{height} {colorspace}"
    except ValueError:
        return "not a JPEG"


def draw_histogram(dataset: RecordDataset, path) -> None:
    """Draw how many identities have how many images. Needs matplotlib."""
    from f2c_plugin.tools.plotting import pyplot

    per_identity = np.diff(dataset.index.starts)
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    axis.hist(per_identity, np.arange(1, np.percentile(per_identity, 99.5) + 2) - 0.5)
    axis.set(title=f"{len(dataset):,} images of {len(per_identity):,} identities", xlabel="images of an identity",
             ylabel="identities")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def verify(root_dir, processes: int | None = None) -> tuple[int, dict[int, str]]:
    """Read every record of a pack and decode its image. Takes no index: the pack may be beyond indexing.

    Args:
        processes: that decode; None takes one per CPU.
    Returns:
        the number of records, and what is wrong with each that cannot be used, by record number.
    Raises:
        RecordError: the ``.rec`` or the ``.idx`` is missing or empty, or the ``.idx`` is no index.
    """
    records = RecordFile(Path(root_dir) / "train.rec")
    keys, offsets = read_idx(records.path.with_suffix(".idx"), progress=True)
    damaged = {}
    starts = range(0, len(keys), _CHUNK)
    with multiprocessing.Pool(processes, _open, (records.path, keys, offsets)) as pool:
        with tqdm(total=len(keys), desc="decoding", unit=" records", disable=None) as bar:
            for start, found in zip(starts, pool.imap(_damaged, starts)):
                damaged |= found
                bar.update(min(_CHUNK, len(keys) - start))
    return len(keys), damaged


def _open(path, keys, offsets):
    global _records, _keys, _offsets  # of each process of the pool
    _records, _keys, _offsets = RecordFile(path), keys, offsets


def _damaged(start):
    found = {}
    for key, offset in zip(_keys[start:start + _CHUNK].tolist(), _offsets[start:start + _CHUNK].tolist()):
        try:
            record = unpack_image_record(_records.read(offset))
            if len(record.image) or len(record.labels) != 2:  # not bookkeeping
                decode_face(record.image)
        except ValueError as error:
            found[key] = f"record {key}: {error}"
    return found


def draw_sheet(dataset: RecordDataset, path, identity: int | None = None, image: int | None = None, columns: int = 10,
               rows: int = 8) -> None:
    """Draw a contact sheet: images of one identity, the image of one record, or random identities, one a row.

    Images that cannot be decoded are left grey. Needs Pillow.

    Raises:
        RecordError: there is no such identity or record.
    """
    from PIL import Image

    index = dataset.index
    if image is not None:
        positions = np.flatnonzero(index.keys == image)
        if not len(positions):
            raise RecordError(f"{dataset.records.path}: there is no image with record number {image}")
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
            try:
                sheet[row, :, column] = dataset.face(position)
            except RecordError:
                continue
    Image.fromarray(sheet.reshape(len(grid) * IMAGE_SIZE, -1, 3)).save(path)


def pack_folder(source, out) -> tuple[int, int]:
    """Write a pack from a folder with a folder of images for each identity, in InsightFace's layout.

    Identities are numbered in the order of their folders' names. Images are stored as they are.

    Returns:
        numbers of identities and images.
    Raises:
        RecordError: there is nothing to pack, or a link leads out of ``source``.
        FileExistsError: there is a pack in ``out`` already.
    """
    source, out = Path(source), Path(out)
    if not source.is_dir():
        raise RecordError(f"{source}: no such folder")
    refuse_to_overwrite(out)
    people = [sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
              for folder in sorted(source.iterdir()) if folder.is_dir()]
    people = [images for images in people if images]
    if not people:
        raise RecordError(f"{source}: found no folders with {', '.join(_SUFFIXES)} files; it takes one folder an identity")
    for path in chain.from_iterable(people):  # a folder from elsewhere must not pack this machine's other files
        if not path.resolve().is_relative_to(source.resolve()):
            raise RecordError(f"{path}: is, or lies behind, a link to {path.resolve()}, outside {source}: put a copy in the "
                              "place of the link")
    out.mkdir(parents=True, exist_ok=True)
    files = (path.read_bytes() for path in tqdm(list(chain.from_iterable(people)), "packing", unit=" images",
                                                disable=None))
    write_insightface_pack(out / "train.rec", files, [len(images) for images in people])
    (out / "property").write_text(f"{len(people)},{IMAGE_SIZE},{IMAGE_SIZE}\n")
    return len(people), sum(map(len, people))
