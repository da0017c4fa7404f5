"""Verification sets from packs and folders: the pairs are what was asked for, and nothing else is written."""

from collections import Counter

import numpy as np
import pytest
import simplejpeg

from f2c_plugin.cli import main as cli
from f2c_plugin.data.dataset import RecordDataset, decode_face
from f2c_plugin.data.writer import write_insightface_pack
from f2c_plugin.errors import InputError, OverwriteError, VerificationSetError
from f2c_plugin.evaluation.verification import VerificationSet, load_bin
from f2c_plugin.tools.pack import pack
from f2c_plugin.tools.pack_sources import Folders
from f2c_plugin.tools.verification_sets import drawn_pairs, drawn_set, listed_set, source_of

PEOPLE = {"Ann_Able": 4, "Bob_Best": 1, "Cid_Cole": 3, "Dan_Dean": 2}


def picture(person, number, size=112):
    """Plain, so that its colour says whose it is, and which."""
    return simplejpeg.encode_jpeg(np.full((size, size, 3), [40 * person, 40 * number, 90], np.uint8), 100, "RGB", "444")


@pytest.fixture
def folder(tmp_path):
    for person, (name, count) in enumerate(PEOPLE.items()):
        (tmp_path / "faces" / name).mkdir(parents=True)
        for number in range(1, count + 1):
            (tmp_path / "faces" / name / f"{name}_{number:04}.jpg").write_bytes(picture(person, number))
    return tmp_path / "faces"


def shown(path):
    """(person, number) of each image of a set, two for each pair; and the answers."""
    verification_set = VerificationSet(path)
    colours = [decode_face(image)[56, 56].tolist() for image in verification_set.images]
    images = [(round(red / 40), round(green / 40)) for red, green, _ in colours]
    return list(zip(images[::2], images[1::2], strict=True)), verification_set.same.tolist()


@pytest.mark.parametrize("kind", ["folder", "pack"])
def test_drawn_pairs_are_what_they_say_no_two_are_alike_and_each_fold_has_both(folder, tmp_path, kind, capsys):
    source = folder
    if kind == "pack":
        source = tmp_path / "pack"
        pack(Folders(folder), source, processes=1)
    for number, seed in enumerate((0, 0, 1)):
        cli(["verification-set", str(source), str(tmp_path / f"{number}.bin"), "--pairs", "20", "--seed", str(seed)])
    assert capsys.readouterr().out.splitlines()[0] == f"{tmp_path / '0.bin'}: 20 pairs, 10 same"
    pairs, same = shown(tmp_path / "0.bin")
    assert same == [True, False] * 10
    assert [first[0] == second[0] for first, second in pairs] == same and all(first != second for first, second in pairs)
    assert len({frozenset(pair) for pair in pairs}) == 20  # and so all ten same pairs that there are
    assert shown(tmp_path / "1.bin") == (pairs, same) != shown(tmp_path / "2.bin")
    load_bin(tmp_path / "0.bin")  # arcface_torch takes it


def test_more_pairs_than_there_are_are_refused(folder):
    images = source_of(folder).identities()
    with pytest.raises(VerificationSetError, match="22 pairs, half of them same: 4 identities have 10 same and 35 different"):
        drawn_pairs(images, 22)
    assert len(drawn_pairs(images, 20)) == 20
    two = [["a1", "a2"], ["b1"]]
    assert {frozenset(pair[:2]) for pair in drawn_pairs([*two, ["c1"]], 2)} > {frozenset(("a1", "a2"))}
    with pytest.raises(VerificationSetError):
        drawn_pairs([["a1"], ["b1"]], 2)


def test_identities_come_equally_often_however_many_images_they_have():
    images = [[f"{identity}/{number}" for number in range(50 if identity else 500)] for identity in range(10)]
    drawn = drawn_pairs(images, 2000)
    found = Counter(pair.first.split("/")[0] for pair in drawn if pair.same)
    assert len(found) == 10 and max(found.values()) < 150


LIST = ("Ann_Able/Ann_Able_0001.jpg\tAnn_Able/Ann_Able_0002.jpg\t1\n\n"
        "Bob_Best/Bob_Best_0001.jpg\tCid_Cole/Cid_Cole_0003.jpg\t0\n")


def test_listed_pairs_are_taken_as_they_are(folder, tmp_path):
    (tmp_path / "list").write_text(LIST * 10)
    cli(["verification-set", str(folder), str(tmp_path / "made.bin"), "--list", str(tmp_path / "list")])
    assert shown(tmp_path / "made.bin") == ([((0, 1), (0, 2)), ((1, 1), (2, 3))] * 10, [True, False] * 10)
    pack(Folders(folder), tmp_path / "pack", processes=1)
    keys = RecordDataset(tmp_path / "pack").index.keys.tolist()
    (tmp_path / "list").write_text(f"{keys[0]}\t{keys[1]}\t1\n{keys[4]}\t{keys[7]}\t0\n" * 10)
    cli(["verification-set", str(tmp_path / "pack"), str(tmp_path / "packed.bin"), "--list", str(tmp_path / "list")])
    assert shown(tmp_path / "packed.bin") == shown(tmp_path / "made.bin")


def test_lfws_list_is_read_fold_by_fold(folder, tmp_path):
    same, different = "Ann_Able\t{}\t{}\n", "Ann_Able\t{}\tCid_Cole\t{}\n"
    lines = [line.format(*numbers) for line in (same, different) for numbers in ((1, 2), (3, 1))]
    (tmp_path / "pairs.txt").write_text("5\t2\n" + "".join(lines) * 5)
    cli(["verification-set", str(folder), str(tmp_path / "lfw.bin"), "--list", str(tmp_path / "pairs.txt")])
    pairs, answers = shown(tmp_path / "lfw.bin")
    assert pairs[:4] == [((0, 1), (0, 2)), ((0, 1), (2, 2)), ((0, 3), (0, 1)), ((0, 3), (2, 1))]
    assert answers == [True, False] * 10


@pytest.mark.parametrize("text, error, message", [
    ("a\tb\n", VerificationSetError, r"list, line 1: 'a\\tb', but must be two images and 1 or 0"),
    ("a\tb\t2\n", VerificationSetError, "list, line 1"), ("\tb\t1\n", VerificationSetError, "list, line 1"),
    ("5 2\na\n", VerificationSetError, "list: must be LFW's pairs.txt: 1 pairs for 5 folds"),
    ("1\t2\n3\t4\n5\t6\n", VerificationSetError, "two numbers, as in LFW's .* must be two images and 1 or 0"),
    ("1\t2\n" * 9, VerificationSetError, "line 2: '1.t2' must be a name and two numbers. Its first line has two numbers"),
    ("", VerificationSetError, "list: lists no pair"),
    (LIST.replace("\t0", "\t1") * 10, VerificationSetError, "list: of its 10 parts, .* part 0 has 2 and 0: mix them"),
    ("".join(sorted(LIST.splitlines(True) * 10)), VerificationSetError, "list: of its 10 parts, .* part 0 has 2 and 0: mix"),
    (LIST * 9, VerificationSetError, "18 pairs: 20 or more are needed"),
    ((LIST * 10).replace("0002", "0009"), VerificationSetError,
     "list: 1 of its 4 images cannot be used. Replace them, .*\n  Ann_Able/Ann_Able_0009.jpg: cannot be read: No such file"),
    ((LIST * 10).replace("Bob_Best/Bob", "../Bob"), VerificationSetError, "Bob_Best_0001.jpg: is outside"),
    ((LIST * 10).replace("0002", "000a"), VerificationSetError, "Ann_Able_000a.jpg: not 112×112 pixels: 64×64")])
def test_a_list_that_does_not_fit_is_refused_by_its_line_or_image(folder, tmp_path, text, error, message):
    (folder / "Ann_Able/Ann_Able_000a.jpg").write_bytes(picture(0, 5, 64))
    (tmp_path / "list").write_text(text)
    with pytest.raises(error, match=message):
        listed_set(source_of(folder), tmp_path / "out.bin", tmp_path / "list")
    assert not (tmp_path / "out.bin").exists()


def test_what_is_there_is_not_overwritten_and_what_is_not_there_is_said(folder, tmp_path):
    (tmp_path / "list").write_text(LIST * 10)
    with pytest.raises(OverwriteError, match="list exists and is not overwritten"):
        listed_set(source_of(folder), tmp_path / "list", tmp_path / "list")
    with pytest.raises(InputError, match="nowhere: no such folder"):
        source_of(tmp_path / "nowhere")
    pack(Folders(folder), tmp_path / "pack", processes=1)
    with pytest.raises(VerificationSetError, match="  Ann_Able/Ann_Able_0001.jpg: .*train.rec has no image with this record"):
        listed_set(source_of(tmp_path / "pack"), tmp_path / "out.bin", tmp_path / "list")
    (folder / "Ann_Able/Ann_Able_0002.jpg").write_bytes(picture(0, 2, 64))
    listed_set(source_of(folder, resize=True), tmp_path / "out.bin", tmp_path / "list")
    assert shown(tmp_path / "out.bin")[0][0] == ((0, 1), (0, 2))


def damage(folder, *paths):
    for path in paths:
        (folder / path).write_bytes((folder / path).read_bytes()[:200])


@pytest.mark.parametrize("kind", ["folder", "pack"])
def test_images_that_cannot_be_used_are_replaced_before_pairs_are_drawn_counted_and_listed(folder, tmp_path, kind, capsys):
    for number in range(5, 9):
        (folder / f"Ann_Able/Ann_Able_{number:04}.jpg").write_bytes(picture(0, number % 4 + 1))
    damage(folder, "Ann_Able/Ann_Able_0003.jpg", "Bob_Best/Bob_Best_0001.jpg")
    source, damaged = folder, {"Ann_Able/Ann_Able_0003.jpg", "Bob_Best/Bob_Best_0001.jpg"}
    if kind == "pack":
        source = tmp_path / "pack"
        images = [[path.read_bytes() for path in sorted(each.iterdir())] for each in sorted(folder.iterdir())]
        source.mkdir()
        write_insightface_pack(source / "train.rec", (image for each in images for image in each), [*map(len, images)])
        damaged = {"3", "9"}
    cli(["verification-set", str(source), str(tmp_path / "made.bin"), "--pairs", "40"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == [f"{tmp_path}/made.bin: 40 pairs, 20 same", f"left out, see {tmp_path}/made.left_out.tsv:"]
    assert "  2 × " in printed[2] and len(printed) == 3
    listed = [line.split("\t") for line in (tmp_path / "made.left_out.tsv").read_text().splitlines()]
    assert {name for name, _ in listed} == damaged
    pairs, same = shown(tmp_path / "made.bin")
    assert same == [True, False] * 20 and [first[0] == second[0] for first, second in pairs] == same
    again = drawn_set(source_of(source), tmp_path / "again.bin", 40)
    assert shown(tmp_path / "again.bin") == (pairs, same) and sum(again.left_out.values()) == 2
    with pytest.raises(VerificationSetError, match=r"60 pairs.* 3 identities have 25 same and 41 different pairs, without 2 "
                                                   "images that cannot be used .*: ask for fewer"):
        drawn_set(source_of(source), tmp_path / "more.bin", 60)


def test_pairs_of_a_source_without_damage_are_those_that_are_drawn_without_a_look_at_the_images(folder):
    source = source_of(folder)
    for seed in range(3):
        assert drawn_pairs(source.identities(), 20, seed, source) == drawn_pairs(source.identities(), 20, seed)
    assert [pair[:2] for pair in drawn_pairs([["a1", "a2", "a3"], ["b1", "b2"], ["c1"]], 4, 5)] == [
        ("b1", "b2"), ("b2", "c1"), ("a1", "a3"), ("a2", "b1")]  # as ever


def test_of_many_images_of_a_list_that_cannot_be_used_the_first_are_named(folder, tmp_path):
    lines = [f"Ann_Able/{number}.jpg\tCid_Cole/{number}.jpg\t{number % 2}\n" for number in range(20)]
    (tmp_path / "list").write_text("".join(lines))
    with pytest.raises(VerificationSetError) as error:
        listed_set(source_of(folder), tmp_path / "out.bin", tmp_path / "list")
    head, *named, last = str(error.value).splitlines()
    assert "list: 40 of its 40 images cannot be used" in head and len(named) == 20 and last == "  and 20 more"
    assert named[1] == "  Cid_Cole/0.jpg: cannot be read: No such file or directory"


@pytest.mark.parametrize("options, message", [
    (["--list", "list", "--pairs", "10"], "--pairs 10: is for drawn pairs, but --list list names them all"),
    (["--list", "list", "--seed", "0"], "--seed 0: is for drawn pairs"),
    (["--pairs", "-4"], "--pairs -4: must be 20 or more"), (["--pairs", "19"], "--pairs 19: must be 20 or more")])
def test_options_that_do_not_fit_are_refused(folder, tmp_path, options, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list").write_text(LIST * 10)
    with pytest.raises(SystemExit, match=message):
        cli(["verification-set", str(folder), "out.bin", *options])


def test_a_folder_without_folders_of_images_is_said_to_be_one_and_a_pack_is_not_resized(folder, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(VerificationSetError, match="none: has no folder with images: it must hold train.rec, or a folder"):
        drawn_set(source_of(tmp_path / "none"), tmp_path / "out.bin", 20)
    pack(Folders(folder), tmp_path / "pack", processes=1)
    with pytest.raises(InputError, match="--resize: is for folders of images, and .*pack is a pack"):
        source_of(tmp_path / "pack", resize=True)
