"""Packs made of packs: no image and no identity is lost, confused or written twice."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import HealthCheck, given, settings, strategies as st

from f2c_plugin.cli import main as cli
from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.data.recordio import image_of_record
from f2c_plugin.data.writer import RecordWriter, pack_image_record, write_insightface_pack
from f2c_plugin.errors import InputError, OverwriteError, RecordError
from f2c_plugin.tools import repack
from f2c_plugin.tools.repack import filtered, merge, split


def picture(number):
    pixels = np.full((112, 112, 3), number % 256, np.uint8)
    pixels[:8, :8] = number // 256
    return simplejpeg.encode_jpeg(pixels, quality=90)


def write(folder, identities):
    """A pack of {identity: numbers of pictures}; identities may leave gaps, and come in any order."""
    folder.mkdir(parents=True)
    with RecordWriter(folder / "train.rec") as pack:
        key = 0
        for identity, pictures in identities.items():
            for number in pictures:
                pack.write(key, pack_image_record(identity, picture(number), key))
                key += 1
    return folder


def read(folder):
    """{identity: encoded images} of a pack."""
    dataset = RecordDataset(folder)
    index = dataset.index
    def image(position):
        return bytes(image_of_record(dataset.records.read(int(index.offsets[position]))))
    return {identity: [*map(image, index.images_of(identity))] for identity in index.numbers.tolist()}


def pictures(identities):
    return {identity: [picture(number) for number in numbers] for identity, numbers in identities.items()}


def table(path):
    return [line.split("\t") for line in path.read_text().splitlines()]


@pytest.fixture
def packs(tmp_path):
    """Two packs; picture 3 is in both, and picture 1 twice."""
    return write(tmp_path / "a", {7: [0, 1, 1], 2: [2, 3]}), write(tmp_path / "b", {0: [3, 4], 5: [5]})


def test_merged_packs_keep_every_image_and_all_identities_apart(packs, tmp_path, capsys):
    a, b = packs
    cli(["merge", str(a), str(b), str(tmp_path / "out")])
    assert capsys.readouterr().out == (
        f"{tmp_path / 'out'}: 8 images of 4 identities\n"
        f"  2 images have the bytes of another, see {tmp_path / 'out/duplicates.tsv'}\n")
    assert read(tmp_path / "out") == pictures({0: [2, 3], 1: [0, 1, 1], 2: [3, 4], 3: [5]})
    assert table(tmp_path / "out/identities.tsv") == [["0", str(a), "2"], ["1", str(a), "7"], ["2", str(b), "0"],
                                                      ["3", str(b), "5"]]
    assert table(tmp_path / "out/duplicates.tsv") == [[str(a), "2", "7", str(a), "1", "7"],
                                                      [str(b), "0", "0", str(a), "4", "2"]]
    assert (tmp_path / "out/property").read_text() == "4,112,112\n"
    assert not list(tmp_path.glob("out/.packing*"))


def test_identities_with_one_name_become_one_and_duplicates_go_only_if_told(packs, tmp_path, capsys):
    a, b = packs
    (tmp_path / "same.tsv").write_text("1\t2\tanna\n\n2\t0\tanna\textra\n")
    cli(["merge", str(a), str(b), str(tmp_path / "out"), "--same", str(tmp_path / "same.tsv"), "--drop-duplicates", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["identities"], list(found["left_out"].values())) == (6, 3, [0, 2])
    assert read(tmp_path / "out") == pictures({0: [2, 3, 4], 1: [0, 1], 2: [5]})
    assert [line[0] for line in table(tmp_path / "out/identities.tsv")] == ["0", "1", "0", "2"]
    merge([a, b], tmp_path / "apart", drop_duplicates=True)  # picture 3 shows two identities, and stays in both
    assert read(tmp_path / "apart") == pictures({0: [2, 3], 1: [0, 1], 2: [3, 4], 3: [5]})


@pytest.mark.parametrize("text, message", [
    ("1 2 anna\n", "line 1 is '1 2 anna', but must be the number of a pack"), ("1\t2\t\n", "line 1 is"),
    ("3\t2\tanna\n", "line 1 names pack 3, but there are packs 1 to 2"), ("0\t2\tanna\n", "line 1 names pack 0"),
    ("1\t2\tx\n1\t3\tx\n", "line 2: .*a has no identity 3"),
    ("1\t2\tx\n1\t2\ty\n", "line 2: identity 2 of pack 1 is 'y', and 'x' in an earlier line: take one out")])
def test_a_list_that_does_not_fit_is_refused_and_nothing_is_written(packs, tmp_path, text, message):
    (tmp_path / "same.tsv").write_text(text)
    with pytest.raises(InputError, match=message):
        merge(packs, tmp_path / "out", tmp_path / "same.tsv")
    assert not (tmp_path / "out").exists()


def test_what_is_missing_or_there_already_is_refused(packs, tmp_path):
    with pytest.raises(RecordError, match=r"c/train.rec: no such file"):
        merge([packs[0], tmp_path / "c"], tmp_path / "out")
    with pytest.raises(RecordError, match="same.tsv: no such file"):
        merge(packs, tmp_path / "out", tmp_path / "same.tsv")
    with pytest.raises(OverwriteError, match="b/train.idx exists and is not overwritten"):
        merge(packs, packs[1])
    assert not (tmp_path / "out").exists()


def test_equal_hashes_alone_make_no_duplicates(packs, tmp_path, monkeypatch):
    class Same:
        def __init__(self, *_, **__): ...
        def digest(self):
            return b"12345678"
    monkeypatch.setattr(repack.hashlib, "blake2b", Same)
    merge(packs, tmp_path / "out", drop_duplicates=True)
    assert sum(map(len, read(tmp_path / "out").values())) == 8
    assert not (tmp_path / "out/duplicates.tsv").exists()


def test_records_that_cannot_be_used_are_left_out_and_counted(packs, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    small = simplejpeg.encode_jpeg(np.zeros((64, 64, 3), np.uint8))
    write_insightface_pack(broken / "train.rec", [picture(0), small, picture(1)], [2, 1])
    done = merge([packs[1], broken], tmp_path / "out")
    assert (done.images, done.identities) == (5, 4) and "left out: 1 images, damaged, or not 112×112" in done.report()


def test_a_pack_is_split_into_other_identities_by_a_seed(tmp_path, capsys):
    source = write(tmp_path / "source", {identity: range(9 * identity, 9 * identity + identity % 3 + 1)
                                         for identity in range(9)})
    everything = read(source)
    choices = []
    for seed in 0, 0, 1:
        train, unseen = tmp_path / f"train{len(choices)}", tmp_path / f"unseen{len(choices)}"
        cli(["split", str(source), str(train), str(unseen), "--identities", "3", "--seed", str(seed), "--json"])
        first, second = json.loads(capsys.readouterr().out)
        assert (first["identities"], second["identities"]) == (6, 3)
        origin = [{int(new): int(old) for new, _, old in table(folder / "identities.tsv")} for folder in (train, unseen)]
        for folder, names in zip((train, unseen), origin, strict=True):
            found = {names[new]: images for new, images in read(folder).items()}
            assert found == {old: everything[old] for old in names.values()}
        assert {*origin[0].values()} | {*origin[1].values()} == {*everything} and all(old % 3 for old in origin[1].values())
        choices.append({*origin[1].values()})
    assert choices[0] == choices[1] != choices[2]


@pytest.mark.parametrize("keys, message", [
    (dict(identities=3), "--identities 3: .* has 2 identities with 2 images or more"), (dict(identities=0), "--identities 0"),
    (dict(identities=2), "are all that .* has; none would be left")])
def test_a_split_that_cannot_be_is_refused(tmp_path, keys, message):
    source = write(tmp_path / "source", {0: [0, 1], 1: [2, 3]})
    with pytest.raises(InputError, match=message):
        split(source, tmp_path / "train", tmp_path / "unseen", **keys)
    with pytest.raises(InputError, match="are one folder"):
        split(source, tmp_path / "train", tmp_path / "train", 1)
    with pytest.raises(OverwriteError):
        split(source, tmp_path / "train", source, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_identities_are_filtered_by_their_images_and_by_lists(tmp_path, capsys):
    source = write(tmp_path / "source", {identity: range(10 * identity, 10 * identity + identity) for identity in range(1, 6)})
    everything = read(source)
    (tmp_path / "list").write_text("2\n3\tbecause\n4\n")

    def kept(*options):
        out = tmp_path / "-".join(["out", *(Path(option).name.strip("-") for option in options)])
        cli(["filter", str(source), str(out), *options])
        assert [*read(out).values()] == [everything[int(old)] for _, _, old in table(out / "identities.tsv")]
        return [int(old) for _, _, old in table(out / "identities.tsv")]
    assert kept("--min-images", "3") == [3, 4, 5]
    assert "left out: 3 images, of identities that were not asked for" in capsys.readouterr().out
    assert kept("--max-images", "2") == [1, 2]
    assert kept("--only", str(tmp_path / "list"), "--min-images", "3") == [3, 4]
    assert kept("--without", str(tmp_path / "list")) == [1, 5]
    with pytest.raises(InputError, match="no identity is left of 5, which have 1 to 5 images: ask for less"):
        filtered(source, tmp_path / "none", min_images=6)
    (tmp_path / "list").write_text("7\n")
    with pytest.raises(InputError, match="list: the pack has no identity 7"):
        filtered(source, tmp_path / "none", only=tmp_path / "list")
    (tmp_path / "list").write_text("anna\n")
    with pytest.raises(InputError, match="list: line 1 is 'anna', but must be an identity"):
        filtered(source, tmp_path / "none", without=tmp_path / "list")


def test_identities_beyond_what_float32_can_count_are_read(tmp_path):
    source = write(tmp_path / "source", {(1 << 24) + 1: [0, 1], (1 << 24) + 2: [2]})
    filtered(source, tmp_path / "out", min_images=2)
    assert read(tmp_path / "out") == pictures({0: [0, 1]})


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(st.integers(0, 9), st.lists(st.integers(0, 5), min_size=1, max_size=4), min_size=1, max_size=4),
                min_size=1, max_size=3))
def test_whatever_packs_hold_the_merged_one_holds_it(tmp_path_factory, held):
    folder = tmp_path_factory.mktemp("packs")
    packs = [write(folder / str(number), identities) for number, identities in enumerate(held)]
    merge(packs, folder / "out")
    expected = [pictures(identities)[identity] for identities in held for identity in sorted(identities)]
    assert [*read(folder / "out").values()] == expected
    merge(packs, folder / "single", drop_duplicates=True)
    assert [*read(folder / "single").values()] == [[*dict.fromkeys(images)] for images in expected]
    seen = [number for identities in held for identity in sorted(identities) for number in identities[identity]]
    listed = table(folder / "out/duplicates.tsv") if (folder / "out/duplicates.tsv").exists() else []
    assert len(listed) == len(seen) - len({*seen})


def test_a_merge_that_is_interrupted_leaves_nothing(packs, tmp_path):
    code = ("import os, signal, sys; from f2c_plugin.tools import repack; from f2c_plugin.cli import main\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "def write(*_): os.kill(os.getpid(), signal.SIGINT)\n"
            "repack.write_property = write\n"
            f"main(['merge', {str(packs[0])!r}, {str(packs[1])!r}, {str(tmp_path / 'out')!r}])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGINT and done.stderr.endswith("f2c-plugin merge: interrupted\n")
    assert not (tmp_path / "out").exists()


def test_a_folder_whose_name_has_tabs_and_line_ends_takes_one_column_of_the_lists(tmp_path):
    odd = write(tmp_path / "a\tb\nc", {4: [1, 2], 7: [1]})
    merge([odd], tmp_path / "out")
    assert table(tmp_path / "out/identities.tsv") == [["0", rf"{tmp_path}/a\tb\nc", "4"], ["1", rf"{tmp_path}/a\tb\nc", "7"]]
    assert table(tmp_path / "out/duplicates.tsv") == [[rf"{tmp_path}/a\tb\nc", "2", "7", rf"{tmp_path}/a\tb\nc", "0", "4"]]


def test_no_images_at_most_and_an_identity_beyond_all_are_refused(tmp_path):
    pack = write(tmp_path / "pack", {0: [1, 2], 1: [3]})
    with pytest.raises(InputError, match="no identity is left"):
        filtered(pack, tmp_path / "out", max_images=0)
    (tmp_path / "list").write_text(f"0\n{10**30}\n")
    with pytest.raises(InputError, match=r"line 2 is '10+', but must be an identity, a whole number from 0 to below 2\*\*40"):
        filtered(pack, tmp_path / "out", only=tmp_path / "list")


def test_one_pack_is_merged_with_nothing(packs, tmp_path):
    words = ["merge", str(packs[0]), str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="a, .*out: two packs or more are merged into a folder; name another pack, --same or"):
        cli(words)
    assert not (tmp_path / "out").exists()
    cli([*words, "--drop-duplicates"])
    assert sum(map(len, read(tmp_path / "out").values())) == sum(map(len, read(packs[0]).values())) - 1


@pytest.mark.parametrize("tool", ["merge", "split", "filter"])
def test_images_whose_records_are_damaged_are_left_out_and_counted_also_where_the_index_has_not_seen_them(tmp_path, tool):
    """The index of this layout has the identities from records of their own."""
    sizes = [3, 1, 2, 2]
    write_insightface_pack(tmp_path / "train.rec", map(picture, range(8)), sizes)
    dataset = RecordDataset(tmp_path)
    content = bytearray((tmp_path / "train.rec").read_bytes())
    for position in 1, 3:  # the only image of identity 1, too
        offset = int(dataset.index.offsets[position])
        content[offset:offset + 4] = b"\0" * 4
    (tmp_path / "train.rec").write_bytes(content)
    out = tmp_path / "out"
    if tool == "merge":
        done = merge([tmp_path], out, drop_duplicates=True)
    elif tool == "filter":
        done = filtered(tmp_path, out)
    else:
        done, unseen = split(tmp_path, out, tmp_path / "unseen", 1, min_images=2)
        assert (unseen.images, unseen.identities, len(read(tmp_path / "unseen"))) == (2, 1, 1)
    expected = {0: [0, 2], 2: [4, 5], 3: [6, 7]}
    there = {int(old): read(out)[int(new)] for new, _, old in table(out / "identities.tsv")}
    assert there == {old: pictures(expected)[old] for old in there} and len(there) == 3 - (tool == "split")
    assert done.left_out[repack.UNUSABLE] == 2 and done.identities == len(there)
