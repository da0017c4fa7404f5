"""Writes the images of a pack into a folder for each identity: what `pack` does, backwards."""

from pathlib import Path

from tqdm import tqdm

from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.data.writer import refuse_to_overwrite
from f2c_plugin.errors import RecordError
from f2c_plugin.tools.repack import UNUSABLE, Repacked
from f2c_plugin.utils.atomic import naming
from f2c_plugin.utils.locks import temporary_folder


def unpack(source: str | Path, out: str | Path, skip_damaged: bool = False) -> Repacked:
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
    unpacked = Repacked(out, left_out={UNUSABLE: len(index.unusable)})
    width, key_width = len(str(index.numbers[-1])), len(str(index.keys.max()))
    out.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(out.parent, f".{out.name}.unpacking-") as work:
        whole = work / out.name
        whole.mkdir()
        for position in tqdm(range(len(index)), "writing", unit=" images", disable=None):
            try:
                encoded = dataset.encoded(position)
            except RecordError:  # the index has seen its beginning alone
                if not skip_damaged:
                    raise
                unpacked.left_out[UNUSABLE] += 1
                continue
            suffix = ".png" if encoded[:4] == b"\x89PNG" else ".jpg"
            file = whole / f"{index.identity[position]:0{width}}" / f"{index.keys[position]:0{key_width}}{suffix}"
            with naming(out / file.relative_to(whole)):
                if not file.parent.exists():
                    file.parent.mkdir()
                    unpacked.identities += 1
                file.write_bytes(encoded)
            unpacked.images += 1
        whole.rename(out)
    return unpacked
