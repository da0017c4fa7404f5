"""A pack converted to identities beyond 2**24, and trained on."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from f2c_plugin.cli import main as cli
from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.data.recordio import RecordFile
from f2c_plugin.errors import OverwriteError, RecordError
from f2c_plugin.tools import convert as module
from f2c_plugin.tools.convert import convert
from tests.conftest import FIXTURES, PACKS
from tests.runs import IDENTITIES, losses, run

# Neighbours that float32 cannot tell from one another.
WIDE = [*range(2**24 - 2, 2**24 + 4), *range(2**31 - 3, 2**31 + 3)]


def write_list(path, dataset, identities, form="{}\t{}\tfolder/name.jpg\n"):
    labels = identities[dataset.index.identity]
    path.write_text("".join(form.format(key, label) for key, label in zip(dataset.index.keys, labels, strict=True)))
    return labels


def test_training_on_identities_around_2_to_the_24_and_2_to_the_31(config, faces, capsys):
    dataset = RecordDataset(faces)
    labels = write_list(Path("wide.lst"), dataset, np.array(WIDE))
    cli(["convert", str(faces), "wide.lst", "wide"])
    assert f"{len(dataset)} images of {IDENTITIES} identities" in capsys.readouterr().out
    converted = RecordDataset("wide")
    assert converted.index.identity.tolist() == labels.tolist() and converted.index.numbers.tolist() == WIDE
    shutil.copy(faces / "synth.bin", "wide")
    keys = dict(num_epoch=1, frequent=1)
    run(config(output="plain", **keys))
    run(config(output="of wide", rec="wide", **keys))
    assert losses("of wide") == losses("plain")  # to the bit: no two identities have become one
    assert converted.num_classes == IDENTITIES and converted[len(labels) - 1][1] == IDENTITIES - 1
    cli(["index", "wide"])
    assert f"12, numbered up to {2**31 + 2}" in (printed := capsys.readouterr().out) and "num_classes = 12;" in printed


@pytest.mark.parametrize("name", PACKS)
def test_every_kind_of_pack_can_be_converted(tmp_path, name):
    shutil.copytree(FIXTURES / name, tmp_path / "pack")
    dataset = RecordDataset(tmp_path / "pack")
    new = np.arange(dataset.index.numbers[-1] + 1)[::-1] + 2**24
    labels = write_list(tmp_path / "list", dataset, new, "{}\t{}.000000\n")
    (tmp_path / "list").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "list").read_bytes())  # a byte-order mark
    done = convert(tmp_path / "pack", tmp_path / "list", tmp_path / "new")
    converted = RecordDataset(tmp_path / "new")
    assert (done.images, done.identities) == (len(dataset), len(dataset.index.numbers))
    assert sorted(converted.index.identity.tolist()) == sorted(labels.tolist())
    old, again = (RecordFile(folder / "train.rec") for folder in (tmp_path / "pack", tmp_path / "new"))
    order = np.argsort(dataset.index.offsets)  # the new pack has the order of the file
    for i, j in zip(order.tolist(), range(done.images), strict=True):
        before, after = (records.image_record(int(index.offsets[at])) for records, index, at in
                         ((old, dataset.index, i), (again, converted.index, j)))
        assert bytes(before.image) == bytes(after.image) and before.id == after.id
        assert before.labels[1:].tolist() == after.labels[1:].tolist() and after.wide_identity == labels[i]


@pytest.mark.parametrize("text, message", [
    ("", "the list is empty"), ("0\t1\nword\n", r"line 2 is b'word\\n'"), ("0 1\n", "line 1"), ("0\t-1\n", "line 1"),
    ("0\t1.5\n", "line 1"), (f"0\t{2**40}\n", "line 1"), ("0\tinf\n", "line 1"), ("1e99\t0\n", "line 1"),
    ("version https://git-lfs.github.com/spec/v1\n", "a Git-LFS pointer"),
    ("0\t1\n0\t2\n", "lists record 0 twice"), ("0\t1\n", "lacks record 1 of .*, which is an image"),
    ("".join(f"{key}\t5\n" for key in range(99)), "lists 99 images, but .* has only 6")],
    ids=["empty", "a word", "a space", "negative", "a fraction", "too large", "infinite", "a huge number", "LFS", "twice",
         "too few", "too many"])
def test_a_list_that_does_not_fit_is_refused_and_nothing_is_left(tmp_path, text, message):
    (tmp_path / "list").write_text(text)
    with pytest.raises(RecordError, match=f"list: .*{message}"):
        convert(FIXTURES / "rec_builder", tmp_path / "list", tmp_path / "new")
    assert not (tmp_path / "new").exists() or not [*(tmp_path / "new").iterdir()]
    with pytest.raises(RecordError, match="no such file"):
        convert(FIXTURES / "rec_builder", tmp_path / "nothing", tmp_path / "new")


def test_the_result_as_json(tmp_path, capsys):
    write_list(tmp_path / "list", RecordDataset(FIXTURES / "rec_builder"), np.arange(99) + 2**24, "{}\t{}\n")
    cli(["convert", str(FIXTURES / "rec_builder"), str(tmp_path / "list"), str(tmp_path / "new"), "--json"])
    identities = len(RecordDataset(tmp_path / "new").index.numbers)
    assert json.loads(capsys.readouterr().out) == {"out": str(tmp_path / "new"), "images": 6, "identities": identities}


@pytest.mark.parametrize("when", ["write_property", "pack_image_record"])
def test_a_conversion_that_is_interrupted_leaves_nothing_and_no_file_is_overwritten(tmp_path, monkeypatch, when):
    write_list(tmp_path / "list", RecordDataset(FIXTURES / "rec_builder"), np.arange(99), "{}\t{}\n")
    monkeypatch.setattr(module, when, lambda *_, **__: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        convert(FIXTURES / "rec_builder", tmp_path / "list", tmp_path / "folder" / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["list"]
    (tmp_path / "property").write_text("of another")
    with pytest.raises(OverwriteError, match="property exists"):
        convert(FIXTURES / "rec_builder", tmp_path / "list", tmp_path)


def test_a_list_may_not_name_bookkeeping(tmp_path):
    dataset = RecordDataset(FIXTURES / "insightface")
    write_list(tmp_path / "list", dataset, np.arange(99), "{}\t{}\n")
    with (tmp_path / "list").open("a") as file:
        file.write("0\t3\n")
    with pytest.raises(RecordError, match="lists record 0 of .*, which is no image"):
        convert(FIXTURES / "insightface", tmp_path / "list", tmp_path / "new")
    (tmp_path / "train.rec").touch()
    with pytest.raises(OverwriteError):
        convert(FIXTURES / "insightface", tmp_path / "list", tmp_path)
