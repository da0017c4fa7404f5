"""Coverage-guided fuzzing of the pack reader with atheris, by hand:

    pip install atheris
    python tests/fuzz_records.py -max_total_time=1800 -max_len=20000 CORPUS_FOLDER

Starts from the packs in tests/fixtures. An input is a .idx and a .rec, one after the other; whatever
it is, reading it ends in faces or in a RecordError, soon, and within the file.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["f2c_plugin"]):
    from f2c_plugin.data import RecordError
    from f2c_plugin.data.dataset import decode_face
    from f2c_plugin.data.identities import index_identities
    from f2c_plugin.data.recordio import RecordFile, read_idx, unpack_image_record

SEPARATOR = b"\n--rec--\n"


def read_everything(folder):
    """Read all that a pack holds, image by image."""
    records = RecordFile(folder / "train.rec")
    index = index_identities(records, *read_idx(folder / "train.idx"))
    for offset in index.offsets.tolist():
        try:
            decode_face(unpack_image_record(records.read(offset)).image)
        except ValueError:
            continue


def one_input(folder, data):
    idx, _, rec = data.partition(SEPARATOR)
    (folder / "train.idx").write_bytes(idx)
    (folder / "train.rec").write_bytes(rec)
    try:
        read_everything(folder)
    except RecordError:
        pass


def main():
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    corpora = [Path(argument) for argument in sys.argv[1:] if not argument.startswith("-")]
    for corpus in corpora[:1]:
        corpus.mkdir(exist_ok=True)
        for pack in Path(__file__).parent.glob("fixtures/*/train.rec"):
            (corpus / pack.parent.name).write_bytes(pack.with_suffix(".idx").read_bytes() + SEPARATOR + pack.read_bytes())
    try:
        atheris.Setup(sys.argv, lambda data: one_input(folder, data))
        atheris.Fuzz()
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
