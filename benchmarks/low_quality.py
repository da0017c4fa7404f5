"""A pack with images of low quality, as cameras far away take them.

    python benchmarks/low_quality.py PACK --share 0.5      # prints the folder of the new pack, beside PACK

A share of the images, chosen at random, is blurred, scaled down to a face of 16 to 56 pixels, stored as JPEG of quality 20 to
70, and scaled up again. Labels, verification sets and all other images stay as they are.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image, ImageFilter
from worlds import unseen

from f2c_plugin.data.dataset import Pixels, RecordDataset, decode_face
from f2c_plugin.data.image_sizes import IMAGE_SIZE
from f2c_plugin.data.recordio import image_of_record
from f2c_plugin.data.writer import write_insightface_pack, write_property
from f2c_plugin.errors import F2CError
from f2c_plugin.trainer.checkpoint import pack_digest

SIDE = 16, 56  # pixels
BLUR = 2.0  # largest standard deviation of the Gaussian, pixels
QUALITY = 20, 70
STORED = 90  # quality of the JPEGs that go into the pack


def degraded(face: Pixels, rng: np.random.Generator) -> Pixels:
    """A face uint8 (112, 112, 3), seen worse."""
    side = round(float(np.exp(rng.uniform(*np.log(SIDE)))))  # half of them below 30
    blurred = Image.fromarray(face).filter(ImageFilter.GaussianBlur(rng.uniform(0, BLUR)))
    stored = BytesIO()
    blurred.resize((side, side), Image.Resampling.BOX).save(stored, "JPEG", quality=int(rng.integers(*QUALITY, endpoint=True)))
    return np.asarray(Image.open(stored).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))


def low_quality_pack(data: Path, share: float, seed: int = 0) -> Path:
    """A copy of the pack in ``data``, beside it, with a share of its images degraded; made unless it is there.

    An unseen pack beside ``data`` gets a copy of its own, which ``worlds.unseen`` finds. Raises RecordError if a pack cannot
    be read.
    """
    folder = data.with_name(f"{data.name}_low-quality-{share:g}_seed-{seed}_{pack_digest(RecordDataset(data).index)[:8]}")
    if (unseen(data) / "train.rec").is_file():
        _copy(unseen(data), unseen(folder), share, seed + 1)
    _copy(data, folder, share, seed)
    return folder


def _copy(data: Path, folder: Path, share: float, seed: int) -> None:
    if folder.is_dir():
        return
    dataset, rng = RecordDataset(data), np.random.default_rng(seed)
    index = dataset.index
    order = np.argsort(index.identity, kind="stable")
    is_degraded = np.zeros(len(order), bool)
    is_degraded[rng.permutation(len(order))[:round(share * len(order))]] = True

    def images() -> Iterator[bytes]:
        for offset, degrade in zip(index.offsets[order].tolist(), is_degraded.tolist(), strict=True):
            image = bytes(image_of_record(dataset.records.read(offset)))
            if degrade:
                image = simplejpeg.encode_jpeg(np.ascontiguousarray(degraded(decode_face(image), rng)), STORED, "RGB", "420")
            yield image

    sizes = np.bincount(np.searchsorted(index.numbers, index.identity), minlength=len(index.numbers)).tolist()
    with tempfile.TemporaryDirectory(prefix=".low-quality-", dir=folder.parent) as work:
        made = Path(work, "pack")
        made.mkdir()
        write_property(made, len(sizes))
        write_insightface_pack(made / "train.rec", images(), sizes)
        for file in data.glob("*.bin"):
            shutil.copyfile(file, made / file.name)
        made.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--share", type=float, default=0.5, help="of the images to degrade, 0 to 1")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not 0 <= arguments.share <= 1:
        parser.error(f"--share={arguments.share}: must be from 0 to 1")
    try:
        print(low_quality_pack(arguments.pack, arguments.share, arguments.seed))
    except F2CError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
