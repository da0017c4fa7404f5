"""Coverage-guided fuzzing, with atheris, of everything that is read from other people's files.

    python tests/fuzz.py TARGET -max_total_time=1800 -max_len=20000 CORPUS_FOLDER

TARGET is "pack", "verification", "checkpoint", "states", the pickle in a checkpoint that is whole otherwise, or
"archive", checkpoints of several archives and directories whose headers may lie.
Starts from real files. Whatever the input, reading it soon ends in its content or in the error for such files, and does
nothing else. Archives that we read hold what torch reads in them. test_fuzz.py runs each for a minute.
"""

import pickle
import random
import shutil
import sys
import tempfile
import zipfile
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["f2c_plugin"]):
    from f2c_plugin.data.dataset import decode_face
    from f2c_plugin.data.identities import index_identities
    from f2c_plugin.data.recordio import RecordFile, read_idx, unpack_image_record
    from f2c_plugin.errors import CheckpointError, RecordError, VerificationSetError
    from f2c_plugin.evaluation.verification import VerificationSet
    from f2c_plugin.tools.checkpoints import describe
    from f2c_plugin.trainer.checkpoint import _check
    from f2c_plugin.utils.safe_load import load_states

import archives
import torch

FIXTURES = Path(__file__).parent / "fixtures"
SEPARATOR = b"\n--rec--\n"


def pack(folder, data):
    """A .idx and a .rec, one after the other."""
    idx, _, rec = data.partition(SEPARATOR)
    (folder / "train.idx").write_bytes(idx)
    (folder / "train.rec").write_bytes(rec)
    try:
        records = RecordFile(folder / "train.rec")
        index = index_identities(records, *read_idx(folder / "train.idx"))
    except RecordError:
        return
    for offset in index.offsets.tolist():
        try:
            decode_face(unpack_image_record(records.read(offset)).image)
        except ValueError:
            continue


def packs():
    for path in FIXTURES.glob("*/train.rec"):
        yield path.with_suffix(".idx").read_bytes() + SEPARATOR + path.read_bytes()


def verification(folder, data):
    (folder / "set.bin").write_bytes(data)
    with suppress(VerificationSetError):
        VerificationSet(folder / "set.bin").faces()


def verification_sets():
    records = RecordFile(FIXTURES / "im2rec" / "train.rec")
    _, offsets = read_idx(FIXTURES / "im2rec" / "train.idx")
    image = bytes(unpack_image_record(records.read(int(offsets[0]))).image)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        yield pickle.dumps(([image, image], [True]), protocol)
        yield pickle.dumps(([b"", b""] * 2, torch.tensor([True, False]).numpy()), protocol)


def checkpoint(folder, data):
    path = folder / "checkpoint.pt"
    path.write_bytes(data)
    with suppress(CheckpointError):
        describe(path)
    with suppress(CheckpointError):
        _check(load_states(path), "checkpoint.pt")


def archive(folder, data):
    """Instructions for an archive: what is before, between and behind its parts, and what its headers say."""
    given = atheris.FuzzedDataProvider(data)
    other, at = archives.OTHER, archives.DIRECTORY
    parts = [b"", other, other[:-22], other[:at], other[at:], given.ConsumeBytes(30)]
    before, between, comment, behind = (given.PickValueInList(parts) for _ in range(4))
    sizes = "local_size", "size", "packed", "offset"
    lies = {field: given.ConsumeIntInRange(0, 1000) for field in sizes if given.ConsumeBool()}
    lies |= {field: given.ConsumeIntInRange(0, 9) for field in ("method", "flags") if given.ConsumeProbability() < 0.1}
    lies |= {field: f"data/{given.ConsumeIntInRange(0, 1)}" for field in ("local", "central") if given.ConsumeBool()}
    entries = {name: archives.ENTRIES[name] for name in archives.ENTRIES if not given.ConsumeProbability() < 0.05}
    shift = given.PickValueInList([0, min(len(before), given.ConsumeIntInRange(0, 1000))])
    path = folder / "checkpoint.pt"
    path.write_bytes(archives.archive(entries, shift, before, between, comment, **lies) + behind)
    try:
        ours = load_states(path)
    except CheckpointError:
        return
    assert archives.contents(ours) == archives.contents(torch.load(path, weights_only=True))


def instructions():
    yield bytes(100)
    generator = random.Random(0)
    for _ in range(50):
        yield generator.randbytes(100)


def checkpoints():
    with tempfile.TemporaryDirectory() as folder:
        ours = {"format": "f2c-plugin checkpoint 1", "settings": {}, "images": 1, "step": 1, "seconds": 1.0, "layout": [1] * 4,
                "origin": [0, 0, 0], "position": [0, 0, 0], "random": [], "backbone": {"a": torch.ones(3)},
                "head": {"b": torch.zeros(2, dtype=torch.int64)}, "optimizer": {}}
        for states in ours, {"epoch": 1}:
            torch.save(states, Path(folder) / "checkpoint.pt")
            yield (Path(folder) / "checkpoint.pt").read_bytes()


def states(folder, data):
    whole = BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for name, content in {**REST, "archive/data.pkl": data}.items():
            archive.writestr(name, content)
    checkpoint(folder, whole.getvalue())


def pickles():
    for content in checkpoints():
        with zipfile.ZipFile(BytesIO(content)) as archive:
            yield archive.read("checkpoint/data.pkl")


# The other entries of a file of torch.save: two storages, and how they are written.
REST = {"archive/data/0": bytes(12), "archive/data/1": bytes(16), "archive/version": b"3\n", "archive/byteorder": b"little"}
TARGETS = {"pack": (pack, packs), "verification": (verification, verification_sets), "checkpoint": (checkpoint, checkpoints),
           "states": (states, pickles), "archive": (archive, instructions)}


def main():
    read, seeds = TARGETS[sys.argv.pop(1)]
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    for corpus in [Path(argument) for argument in sys.argv[1:] if not argument.startswith("-")][:1]:
        corpus.mkdir(exist_ok=True)
        for number, seed in enumerate(seeds()):
            (corpus / f"seed_{number}").write_bytes(seed)
    try:
        atheris.Setup(sys.argv, lambda data: read(folder, data))
        atheris.Fuzz()
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
