"""Writes the images of a pack into a folder for each identity: what `pack` does, backwards."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.data.writer import refuse_to_overwrite
from f2c_plugin.utils.atomic import naming


@dataclass
class Unpacked:
    """What has been written."""

    folder: Path
    images: int
    identities: int

    def report(self) -> str:
        return f"{self.folder}: {self.images} images of {self.identities} identities"


def unpack(source: str | Path, out: str | Path, skip_damaged: bool = False) -> Unpacked:
    """Write the images of a pack as they are stored, OUT/identity/record.jpg (or .png).

    Both numbers have leading zeros, so that sorted names are in the order of the numbers, and `pack` numbers the identities in
    the same order. Everything appears in ``out``, or nothing.

    Raises:
        OverwriteError: ``out`` exists.
        RecordError: a record is damaged or its image has another size, and shall not be skipped. Images are not decoded.
    """
    out = Path(out)
    refuse_to_overwrite(out.parent, [out.name])
    dataset = RecordDataset(source, skip_damaged)
    index = dataset.index
    width, key_width = len(str(index.numbers[-1])), len(str(index.keys.max()))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=out.parent) as work:
        whole = Path(work, out.name)
        for position in tqdm(range(len(index)), "writing", unit=" images", disable=None):
            encoded = dataset.encoded(position)
            suffix = ".png" if encoded[:4] == b"\x89PNG" else ".jpg"
            file = whole / f"{index.identity[position]:0{width}}" / f"{index.keys[position]:0{key_width}}{suffix}"
            with naming(out / file.relative_to(whole)):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(encoded)
        whole.rename(out)
    return Unpacked(out, len(index), len(index.numbers))
