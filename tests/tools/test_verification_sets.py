"""Verification sets from packs and folders: the pairs are what was asked for, and nothing else is written."""

from collections import Counter

import numpy as np
import pytest
import simplejpeg

from f2c_plugin.cli import main as cli
from f2c_plugin.data.dataset import RecordDataset, decode_face
from f2c_plugin.errors import InputError, OverwriteError, RecordError, VerificationSetError
from f2c_plugin.evaluation.verification import VerificationSet, load_bin
from f2c_plugin.tools.pack import pack
from f2c_plugin.tools.pack_sources import Folders
from f2c_plugin.tools.verification_sets import drawn_pairs, listed_pairs, source_of, write_verification_set

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
    ("5 2\na\n", RecordError, "list: must be LFW's pairs.txt: 1 pairs for 5 folds"),
    ("", VerificationSetError, "list: lists no pair"),
    (LIST.replace("\t0", "\t1") * 10, VerificationSetError, "20 pairs, all same: both kinds are needed"),
    (LIST * 9, VerificationSetError, "18 pairs: 20 or more are needed"),
    ((LIST * 10).replace("0002", "0009"), VerificationSetError, "Ann_Able_0009.jpg: cannot be read: No such file"),
    ((LIST * 10).replace("Bob_Best/Bob", "../Bob"), VerificationSetError, "is outside"),
    ((LIST * 10).replace("0002", "000a"), VerificationSetError, "Ann_Able_000a.jpg: not 112×112 pixels: 64×64")])
def test_a_list_that_does_not_fit_is_refused_by_its_line_or_image(folder, tmp_path, text, error, message):
    (folder / "Ann_Able/Ann_Able_000a.jpg").write_bytes(picture(0, 5, 64))
    (tmp_path / "list").write_text(text)
    with pytest.raises(error, match=message):
        write_verification_set(source_of(folder), listed_pairs(tmp_path / "list"), tmp_path / "out.bin")
    assert not (tmp_path / "out.bin").exists()


def test_what_is_there_is_not_overwritten_and_what_is_not_there_is_said(folder, tmp_path):
    (tmp_path / "list").write_text(LIST * 10)
    pairs = listed_pairs(tmp_path / "list")
    with pytest.raises(OverwriteError, match="list exists and is not overwritten"):
        write_verification_set(source_of(folder), pairs, tmp_path / "list")
    with pytest.raises(InputError, match="nowhere: no such folder"):
        source_of(tmp_path / "nowhere")
    pack(Folders(folder), tmp_path / "pack", processes=1)
    with pytest.raises(VerificationSetError, match="has no image with record number 'Ann"):
        write_verification_set(source_of(tmp_path / "pack"), pairs, tmp_path / "out.bin")
    (folder / "Ann_Able/Ann_Able_0002.jpg").write_bytes(picture(0, 2, 64))
    write_verification_set(source_of(folder, resize=True), pairs, tmp_path / "out.bin")
    assert shown(tmp_path / "out.bin")[0][0] == ((0, 1), (0, 2))
