"""Packs: summaries, damage found and skipped, contact sheets, and packs made from folders."""

import logging
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from f2c_plugin.cli import main as cli
from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.data.loader import DualLoader
from f2c_plugin.data.sampler import DualSampler
from f2c_plugin.data.writer import RecordWriter, pack_image_record
from f2c_plugin.errors import RecordError
from f2c_plugin.tools.packs import pack_folder, verify
from tests.conftest import FIXTURES


def picture(seed, size=112, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), np.uint8).repeat(size // 7, 0).repeat(size // 7, 1)
    return Image.fromarray(pixels).convert(mode)


def encoded(seed, form="JPEG", **keys):
    out = BytesIO()
    picture(seed, **keys).save(out, form)
    return out.getvalue()


DAMAGE = {
    "zeroed": lambda jpeg: bytes(len(jpeg)),
    "zeroed inside": lambda jpeg: jpeg[:300] + bytes(len(jpeg) - 600) + jpeg[-300:],
    "cut short": lambda jpeg: jpeg[:len(jpeg) // 2],
    "empty": lambda jpeg: b"",
    "text": lambda jpeg: b"<html>404</html>",
    "other size": lambda jpeg: encoded(1, size=224),
    "PNG of other size": lambda jpeg: encoded(1, "PNG", size=224),
    "PNG cut short": lambda jpeg: encoded(1, "PNG")[:-40],
    "GIF": lambda jpeg: encoded(1, "GIF"),
}


def damaged_pack(folder, damage):
    """Three identities with three images each; record 4, of identity 1, is damaged."""
    with RecordWriter(folder / "train.rec") as writer:
        for i in range(9):
            jpeg = encoded(i)
            writer.write(i, pack_image_record(i // 3, damage(jpeg) if i == 4 else jpeg, i))
    return folder


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_image_is_found_named_and_on_request_replaced_by_another_of_its_identity(tmp_path, damage):
    folder = damaged_pack(tmp_path, damage)
    number, damaged = verify(folder, processes=1)
    assert number == 9 and list(damaged) == [4] and damaged[4].startswith("record 4: ")

    with pytest.raises(RecordError, match=r"record 4 \(identity 1\)"):
        RecordDataset(folder).faces(np.arange(9))
    dataset = RecordDataset(folder, skip_damaged=True)
    faces, identities = dataset.faces(np.arange(9))
    assert np.array_equal(faces[4], dataset.face(3)) and identities.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


RECORD_DAMAGE = {
    "zeroed": lambda record: bytes(len(record)),
    "wrong magic": lambda record: b"\xff" + record[1:],
    "shorter than its header": lambda record: record[:4] + b"\x10\0\0\0" + record[8:],
    "flag past the end": lambda record: record[:8] + b"\xff\xff\xff\xff" + record[12:],
}


def damage_record(folder, key, damage):
    idx = dict(map(int, line.split()) for line in (folder / "train.idx").read_text().splitlines())
    offsets = [*sorted(idx.values()), (folder / "train.rec").stat().st_size]
    start = idx[key]
    end = offsets[offsets.index(start) + 1]
    content = (folder / "train.rec").read_bytes()
    (folder / "train.rec").write_bytes(content[:start] + damage(content[start:end]) + content[end:])
    return folder


@pytest.mark.parametrize("damage", RECORD_DAMAGE.values(), ids=RECORD_DAMAGE)
def test_a_record_of_unknown_identity_is_found_named_and_on_request_skipped(tmp_path, damage, capsys):
    folder = damage_record(damaged_pack(tmp_path, lambda jpeg: jpeg), 4, damage)
    assert list(verify(folder, processes=1)[1]) == [4]
    with pytest.raises(RecordError, match=r"train.rec.*record 4 cannot be read.*\(1 such records\)"):
        RecordDataset(folder)
    dataset = RecordDataset(folder, skip_damaged=True)
    assert dataset.index.keys.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert dataset.faces(np.arange(8))[1].tolist() == [0, 0, 0, 1, 1, 2, 2, 2] and not dataset.damaged
    with pytest.raises(SystemExit):
        cli(["index", str(folder), "--verify"])
    text = capsys.readouterr().out
    assert "1 of 9 records cannot be used: 4" in text and "config.num_image = 9" in text


@pytest.mark.parametrize("damage", [*RECORD_DAMAGE.values(), lambda record: record[:4] + b"\xff\xff\xff\x1f" + record[8:]],
                         ids=[*RECORD_DAMAGE, "length past the end"])
def test_a_damaged_record_is_replaced_if_identity_records_give_its_identity(pack, damage):
    folder = damage_record(pack("insightface"), 6, damage)
    image = RecordDataset(folder).index.keys.tolist().index(6)
    with pytest.raises(RecordError, match=r"train.rec: record 6 \(identity \d\)"):
        RecordDataset(folder).face(image)
    dataset = RecordDataset(folder, skip_damaged=True)
    dataset.faces(np.arange(len(dataset)))
    assert len(dataset.damaged) == 1


def test_a_damaged_identity_record_is_named(pack):
    folder = damage_record(pack("insightface"), 12, RECORD_DAMAGE["zeroed"])
    assert list(verify(folder, processes=1)[1]) == [12]
    with pytest.raises(RecordError, match="record 12 is an identity record"):
        RecordDataset(folder, skip_damaged=True)


def test_a_truncated_pack_is_listed_record_by_record_even_if_it_cannot_be_indexed(pack, capsys):
    folder = pack("insightface")
    content = (folder / "train.rec").read_bytes()
    (folder / "train.rec").write_bytes(content[:len(content) // 2])
    with pytest.raises(SystemExit, match="cut short"):
        cli(["index", str(folder), "--verify"])
    keys = capsys.readouterr().out.strip().rsplit("cannot be used: ", 1)[1].split(", ")
    assert list(map(int, keys)) == list(range(int(keys[0]), 15)) and 1 < int(keys[0]) < 10


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_loader_counts_and_logs_what_it_replaces(tmp_path, num_workers, caplog):
    dataset = RecordDataset(damaged_pack(tmp_path, DAMAGE["cut short"]), skip_damaged=True)
    sampler = DualSampler(dataset.index, 6, 6, identity_rate=0.0)  # four passes over nine images
    loader = DualLoader(dataset, sampler, torch.device("cpu"), num_workers)
    with caplog.at_level(logging.WARNING):
        assert len(list(loader)) == 6
    assert loader.num_damaged == 4 == caplog.text.count("record 4 (identity 1)")


def test_an_identity_without_a_readable_image_ends_the_training(tmp_path):
    with RecordWriter(tmp_path / "train.rec") as writer:
        for i in range(3):
            writer.write(i, pack_image_record(7, b"", i))
    with pytest.raises(RecordError, match=r"record 1 \(identity 7\).*nor can any other image of the identity"):
        RecordDataset(tmp_path, skip_damaged=True).faces(np.array([1]))


def test_cmyk_jpegs_are_read(tmp_path):
    with RecordWriter(tmp_path / "train.rec") as writer:
        writer.write(0, pack_image_record(0, encoded(3, mode="CMYK"), 0))
    assert np.abs(RecordDataset(tmp_path).face(0).astype(int) - np.asarray(picture(3))).mean() < 8


def test_without_pillow_the_rare_formats_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(RecordError, match=r"pip install f2c-plugin\[images\]"):
        RecordDataset(FIXTURES / "formats").face(1)


def test_the_index_command_summarizes_and_draws_a_pack_and_lists_damage(tmp_path, capsys):
    cli(["index", str(FIXTURES / "insightface"), "--plot", str(tmp_path / "histogram.png"), "--verify"])
    text = capsys.readouterr().out
    assert "1 to 4, median 2.5, 25.0% with one image" in text and "112×112" in text and "0 of 15 records" in text
    assert (tmp_path / "histogram.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        cli(["index", str(damaged_pack(tmp_path, DAMAGE["cut short"])), "--verify"])
    assert "1 of 9 records cannot be used: 4" in capsys.readouterr().out


@pytest.mark.parametrize("option, height", [((), 4), (("--identity", "2"), 1), (("--image", "3"), 1)])
def test_inspect_draws_a_sheet(tmp_path, option, height):
    cli(["inspect", str(FIXTURES / "insightface"), *option, "--out", str(tmp_path / "sheet.png")])
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape[0] == 112 * height
    dataset = RecordDataset(FIXTURES / "insightface")
    if option:
        first = 4 if "--identity" in option else 2
        assert np.array_equal(sheet[:112, :112], dataset.face(first))


@pytest.mark.parametrize("option", [("--identity", "9"), ("--image", "0"), ("--image", "11")])
def test_inspecting_a_missing_identity_or_image_is_refused(tmp_path, option):
    with pytest.raises(SystemExit, match=option[1]):
        cli(["inspect", str(FIXTURES / "insightface"), *option, "--out", str(tmp_path / "sheet.png")])
    assert not (tmp_path / "sheet.png").exists()


def image_folder(folder):
    for name, count in ("anna", 2), ("bert", 0), ("carl", 3):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            suffix, form = (".png", "PNG") if i == 2 else (".jpg", "JPEG")
            (folder / name / f"{i}{suffix}").write_bytes(encoded(10 * len(name) + i, form))
        (folder / name / "notes.txt").write_text("not an image")
    return folder


def test_a_folder_becomes_a_pack_with_unchanged_files(tmp_path, capsys):
    source = image_folder(tmp_path / "faces")
    cli(["pack", str(source), str(tmp_path / "pack")])
    assert "5 images of 2 identities" in capsys.readouterr().out
    dataset = RecordDataset(tmp_path / "pack")
    assert dataset.index.identity.tolist() == [0, 0, 1, 1, 1] and (tmp_path / "pack" / "property").read_text() == "2,112,112\n"
    files = sorted(path for path in source.rglob("*") if path.suffix in (".jpg", ".png"))
    for i, path in enumerate(files):
        assert np.array_equal(dataset.face(i), np.asarray(Image.open(path)))
        assert path.read_bytes() in (tmp_path / "pack" / "train.rec").read_bytes()


def test_packing_refuses_to_overwrite_and_refuses_folders_without_images(tmp_path):
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "train.rec").write_bytes(b"years of work")
    with pytest.raises(SystemExit, match="is not overwritten"):
        cli(["pack", str(image_folder(tmp_path / "faces")), str(tmp_path / "pack")])
    (tmp_path / "empty").mkdir()
    for source in "empty", "missing":
        with pytest.raises(SystemExit, match=source):
            cli(["pack", str(tmp_path / source), str(tmp_path / "new")])
    assert not (tmp_path / "new").exists() and (tmp_path / "pack" / "train.rec").read_bytes() == b"years of work"


@pytest.mark.parametrize("what", ["file", "folder"])
def test_packing_follows_links_only_inside_the_folder(tmp_path, what):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key.jpg").write_bytes(encoded(1))
    folder = tmp_path / "faces" / "a"
    folder.mkdir(parents=True)
    (folder / "1.jpg").write_bytes(encoded(2))
    (folder / "2.jpg").symlink_to("1.jpg")
    assert pack_folder(tmp_path / "faces", tmp_path / "good") == (1, 2)
    if what == "file":
        (folder / "3.jpg").symlink_to(tmp_path / "secret" / "key.jpg")
    else:
        (tmp_path / "faces" / "b").symlink_to("../secret")
    with pytest.raises(RecordError, match="is, or is behind, a link to .*secret/key.jpg, outside"):
        pack_folder(tmp_path / "faces", tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_an_interrupted_packing_leaves_no_pack(tmp_path, monkeypatch):
    source = image_folder(tmp_path / "faces")
    read = Path.read_bytes

    def interrupted(path):
        if path.name == "2.png":
            raise KeyboardInterrupt
        return read(path)
    monkeypatch.setattr(Path, "read_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cli(["pack", str(source), str(tmp_path / "pack")])
    assert not list((tmp_path / "pack").iterdir())
