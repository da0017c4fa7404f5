"""Packs: summaries, damage found and skipped, contact sheets, and indexes made anew."""

import json
import logging
import resource
import sys
from io import BytesIO

import numpy as np
import pytest
import torch
from easydict import EasyDict as edict
from PIL import Image

from f2c_plugin.cli import main as cli
from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.data.loader import DualLoader
from f2c_plugin.data.recordio import RecordFile, read_idx
from f2c_plugin.data.sampler import DualSampler
from f2c_plugin.data.writer import RecordWriter, pack_image_record
from f2c_plugin.errors import RecordError
from f2c_plugin.tools.packs import describe, reindex, verify
from tests.conftest import FIXTURES, PACKS


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
    "PNG cut short": lambda jpeg: encoded(1, "PNG")[:-40],
    "GIF": lambda jpeg: encoded(1, "GIF"),
}
OTHER_SIZE = {"JPEG": lambda jpeg: encoded(1, size=224), "PNG": lambda jpeg: encoded(1, "PNG", size=224)}


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


@pytest.mark.parametrize("other", OTHER_SIZE.values(), ids=OTHER_SIZE)
def test_an_image_of_another_size_is_found_named_counted_and_on_request_left_out(tmp_path, other, capsys):
    folder = damaged_pack(tmp_path, other)
    assert verify(folder, processes=1) == (9, {4: "record 4: it has 224×224 pixels, but aligned faces have 112×112"})
    with pytest.raises(RecordError, match="record 4 .*224×224"):
        RecordDataset(folder)
    assert RecordDataset(folder, skip_damaged=True).index.keys.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    cli(["index", str(folder)])
    assert "unusable records     1, damaged or not 112×112: --verify lists them. Training refuses" in capsys.readouterr().out


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
    with pytest.raises(RecordError, match=r"train.rec.*record 4 cannot be used.*\(1 such records\)"):
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
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(RecordError, match=r"pip install 'f2c-plugin\[images\]'"):
        RecordDataset(FIXTURES / "formats").face(1)


def test_the_index_command_summarizes_and_draws_a_pack_and_lists_damage(tmp_path, capsys):
    cli(["index", str(FIXTURES / "insightface"), "--plot", str(tmp_path / "histogram.png"), "--verify"])
    text = capsys.readouterr().out
    assert "1 to 4, median 2.5, 25.0% with one image" in text and "112×112" in text and "0 of 15 records" in text
    assert (tmp_path / "histogram.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        cli(["index", str(damaged_pack(tmp_path, DAMAGE["cut short"])), "--verify"])
    assert "1 of 9 records cannot be used: 4" in capsys.readouterr().out


def test_the_summary_as_json_is_one_object_of_numbers(tmp_path, capsys):
    cli(["index", str(FIXTURES / "insightface"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert "damaged" not in found and len(found.pop("warnings")) == 1
    assert found == {"pack": str(FIXTURES / "insightface" / "train.rec"), "images": 10, "identities": 4, "last_identity": 3,
                     "labels_disagree": None, "unusable": 0, "num_classes": 4,
                     "images_per_identity": {"least": 1, "median": 2.5, "most": 4, "identities_with_one": 1}}
    with pytest.raises(SystemExit) as ended:
        cli(["index", str(damaged_pack(tmp_path, DAMAGE["cut short"])), "--verify", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert ended.value.code == 1 and list(found["damaged"]) == ["4"] and found["damaged"]["4"].startswith("record 4: ")


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


def reindexed(pack, name):
    folder = pack(name)
    written = (folder / "train.idx").read_bytes()
    (folder / "train.idx").unlink()
    cli(["reindex", str(folder)])
    return folder, written


@pytest.mark.parametrize("name", sorted(set(PACKS) - {"im2rec"}))
def test_a_pack_without_idx_gets_the_one_that_it_was_written_with(pack, name, capsys):
    folder, written = reindexed(pack, name)
    assert (folder / "train.idx").read_bytes() == written
    assert capsys.readouterr().out == f"{folder / 'train.idx'}: {written.count(10)} records\n"


def test_reindexing_gives_its_result_as_json(pack, capsys):
    folder = pack("insightface")
    (folder / "train.idx").unlink()
    cli(["reindex", str(folder), "--json"])
    assert json.loads(capsys.readouterr().out) == {"out": str(folder / "train.idx"), "records": 15}


def test_reindexing_on_a_full_disk_names_the_file_and_leaves_nothing(pack):
    folder = pack("insightface")
    (folder / "train.idx").unlink()
    before = sorted(folder.iterdir())
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limit[1]))  # of each file
    try:
        with pytest.raises(OSError, match="train.idx"):
            reindex(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert sorted(folder.iterdir()) == before


def test_records_with_keys_in_any_order_are_numbered_as_rec2idx_does_and_keep_their_labels(pack):
    by_offset = dict(zip(*map(np.ndarray.tolist, reversed(read_idx(FIXTURES / "im2rec" / "train.idx"))), strict=True))
    labels = {offset: RecordFile(FIXTURES / "im2rec" / "train.rec").image_record(offset).labels[0] for offset in by_offset}
    index = RecordDataset(reindexed(pack, "im2rec")[0]).index
    assert index.keys.tolist() == list(range(6)) and index.offsets.tolist() == sorted(by_offset)
    assert index.identity.tolist() == [labels[offset] for offset in sorted(by_offset)]


def shuffled_pack(folder, header_at, header=(7.0, 9.0), picture=b"", identity_records=True):
    """Identities 0 and 1 with three images each, shuffled, as face2rec2 writes them, but record 0 stands anywhere."""
    records = [(key, pack_image_record(key % 2, encoded(key), 0)) for key in range(1, 7)]
    if identity_records:
        records += [(6 + i, pack_image_record([i, i + 1], b"", 0)) for i in range(1, 3)]
    records.insert(header_at, (0, pack_image_record(list(header), picture, 0)))
    with RecordWriter(folder / "train.rec") as writer:
        for key, record in records:
            writer.write(key, record)


@pytest.mark.parametrize("header_at", [0, 3, 6, 8])
@pytest.mark.parametrize("rest", [{}, {"header": (7.0, 2.0, 0.0), "identity_records": False},
                                  {"header": (7.0, 2.0), "identity_records": False, "picture": encoded(9)}],
                         ids=["identity records", "three labels", "picture"])
def test_the_record_that_announces_the_images_gets_key_0_wherever_it_stands(tmp_path, header_at, rest):
    shuffled_pack(tmp_path, header_at, **rest)
    written = (tmp_path / "train.idx").read_bytes()
    (tmp_path / "train.idx").unlink()
    assert reindex(tmp_path) == written.count(10)
    assert (tmp_path / "train.idx").read_bytes() == written


@pytest.mark.parametrize("header_at", [0, 4])
def test_an_empty_last_identity_is_not_taken_for_the_record_that_announces_the_images(tmp_path, header_at):
    records = [(1, 0, encoded(1)), (2, 0, encoded(2)), (3, [1, 3], b""), (4, [3, 3], b"")]
    records.insert(header_at, (0, [3, 5], b""))
    with RecordWriter(tmp_path / "train.rec") as writer:
        for key, label, image in records:
            writer.write(key, pack_image_record(label, image, 0))
    written = (tmp_path / "train.idx").read_bytes()
    (tmp_path / "train.idx").unlink()
    reindex(tmp_path)
    assert (tmp_path / "train.idx").read_bytes() == written


def test_reindexing_keeps_an_idx_that_exists_even_a_link_to_nothing(pack, tmp_path):
    folder = pack("insightface")
    before = (folder / "train.idx").read_bytes()
    with pytest.raises(SystemExit, match="train.idx exists and is not overwritten: move it away"):
        cli(["reindex", str(folder)])
    assert (folder / "train.idx").read_bytes() == before
    (folder / "train.idx").unlink()
    (folder / "train.idx").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SystemExit, match="is not overwritten"):
        cli(["reindex", str(folder)])
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("damage", ["cut short", "overwritten"])
def test_reindexing_a_damaged_rec_names_the_place_and_writes_nothing(pack, damage):
    folder = pack("insightface")
    offset = int(read_idx(folder / "train.idx")[1][4])
    content = (folder / "train.rec").read_bytes()
    rest = {"cut short": content[offset:offset + 100], "overwritten": bytes(8) + content[offset + 8:]}[damage]
    (folder / "train.rec").write_bytes(content[:offset] + rest)
    (folder / "train.idx").unlink()
    with pytest.raises(SystemExit, match=rf"offset {offset}\b[^$]*The 4 records before it are whole; train.idx is not written"):
        cli(["reindex", str(folder)])
    assert [path.name for path in folder.iterdir() if path.suffix != ".json"] == ["train.rec"]


def test_a_missing_idx_is_answered_with_the_command_that_makes_one(pack):
    folder = pack("insightface")
    (folder / "train.idx").unlink()
    with pytest.raises(RecordError, match="f2c-plugin reindex"):
        RecordDataset(folder)


@pytest.mark.parametrize("name, form", [("sheet.png", "PNG"), ("sheet.JPG", "JPEG"), ("sheet.webp", "WEBP")])
def test_a_sheet_is_written_in_the_format_of_its_name(tmp_path, name, form):
    cli(["inspect", str(FIXTURES / "insightface"), "--out", str(tmp_path / name)])
    with Image.open(tmp_path / name) as sheet:
        assert sheet.format == form


@pytest.mark.parametrize("name", ["sheet", "sheet.txt", "sheet.psd"])  # Pillow reads .psd, but does not write it
def test_a_sheet_of_unknown_format_is_refused(tmp_path, name):
    with pytest.raises(SystemExit, match=rf"{name}: unknown image format: name a file that ends with .png"):
        cli(["inspect", str(FIXTURES / "insightface"), "--out", str(tmp_path / name)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command, missing, extra", [("inspect", "PIL.Image", "plot"), ("index", "matplotlib", "plot")])
def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch, command, missing, extra):
    monkeypatch.setitem(sys.modules, missing, None)
    option = {"inspect": "--out", "index": "--plot"}[command]
    with pytest.raises(SystemExit, match=rf"{missing}.* cannot be imported .*: pip install 'f2c-plugin\[{extra}\]'"):
        cli([command, str(FIXTURES / "insightface"), option, str(tmp_path / "out.png")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command, option", [("inspect", "--out"), ("index", "--plot")])
def test_a_drawing_replaces_a_link_and_does_not_follow_it(tmp_path, command, option):
    (tmp_path / "precious").write_text("years of work")
    (tmp_path / "out.png").symlink_to("precious")
    cli([command, str(FIXTURES / "insightface"), option, str(tmp_path / "out.png")])
    assert (tmp_path / "precious").read_text() == "years of work" and not (tmp_path / "out.png").is_symlink()


def test_the_index_command_warns_of_what_the_numbers_of_images_mean_for_training(tmp_path, capsys):
    with RecordWriter(tmp_path / "train.rec") as writer:
        for i, identity in enumerate([*range(30), *[30] * 70]):
            writer.write(i, pack_image_record(identity, encoded(i), i))
    cli(["index", str(tmp_path)])
    text = capsys.readouterr().out
    assert "images per identity  1 to 70, median 1, 96.8% with one image (30, 30.0% of the images)\n" in text
    assert "warning              96.8% of the identities have one image: " in text
    assert "warning              identity 30 has 70 images, 70.0% of all: " in text
    (tmp_path / "even").mkdir()
    cli(["index", str(damaged_pack(tmp_path / "even", lambda jpeg: jpeg))])
    assert "warning" not in capsys.readouterr().out


def test_the_summary_names_formats(capsys):
    cli(["index", str(FIXTURES / "formats")])
    text = capsys.readouterr().out
    assert "unusable" not in text and "PNG (2)" in text and "112×112 Gray (1)" in text


def test_the_config_of_a_pack_with_an_odd_name_is_python(tmp_path):
    folder = tmp_path / "ü\n'\""
    folder.mkdir()
    config = edict()
    exec(dict(describe(RecordDataset(damaged_pack(folder, lambda jpeg: jpeg))))["config"], {"config": config})
    assert config == {"rec": str(folder), "num_classes": 3, "num_image": 9}
