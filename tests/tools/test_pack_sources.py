"""Packs made from lists, tar files and datasets: the same as from folders, and nothing is lost without a word."""

import gzip
import io
import json
import os
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
import simplejpeg
import webdataset
from pyarrow import parquet

from f2c_plugin.cli import main as cli
from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.errors import F2CError, InputError, RecordError
from f2c_plugin.tools.image_files import storable
from f2c_plugin.tools.pack import pack
from f2c_plugin.tools.pack_sources import Folders, source_of
from tests.runs import IDENTITIES, IMAGES


def jpeg(number, size=112):
    return simplejpeg.encode_jpeg(np.full((size, size, 3), number * 9, np.uint8))


def left_out(folder):
    return dict(line.split("\t") for line in (folder / "left_out.tsv").read_text().splitlines())


@pytest.fixture(scope="module")
def drawn(faces):
    """Synthetic faces as (identity, number, JPEG). Identities take turns: no source has them together, or in order."""
    dataset = RecordDataset(faces)
    return [(identity, number, dataset.encoded(int(dataset.index.images_of(identity)[number])))
            for number in range(IMAGES) for identity in reversed(range(IDENTITIES))]


def write_folders(drawn, root):
    for identity, number, image in drawn:
        (root / str(identity)).mkdir(parents=True, exist_ok=True)
        (root / str(identity) / f"{number:02}.jpg").write_bytes(image)


def folders(drawn, root):
    write_folders(drawn, root)
    return [root]


def list_of_paths(drawn, root):
    write_folders(drawn, root)
    (root / "list.txt").write_text("\ufeff" + "".join(f"{i}/{n:02}.jpg\t{i}\n" for i, n, _ in drawn), encoding="utf-8")
    return [root / "list.txt"]


def list_of_im2rec(drawn, root):
    write_folders(drawn, root / "images")
    (root / "train.lst").write_text("".join(f"{row}\t{i}.000000\t{i}/{n:02}.jpg\r\n" for row, (i, n, _) in enumerate(drawn)))
    return [root / "train.lst", "--root", root / "images"]


def list_of_face2rec2(drawn, root):
    write_folders(drawn, root)
    (root / "train.lst").write_text("".join(f"1\t{root}/{i}/{n:02}.jpg\t{i}\n" for i, n, _ in drawn))
    return [root / "train.lst"]


def shards(drawn, root, suffix="tar", **label):
    root.mkdir(parents=True, exist_ok=True)
    half = len(drawn) // 2
    paths = [root / f"shard-{number}.{suffix}" for number in range(2)]
    for path, part in zip(paths, (drawn[:half], drawn[half:]), strict=True):
        with webdataset.TarWriter(str(path)) as tar:
            for i, n, image in part:
                tar.write({"__key__": f"part/{i:03}_{n}", "jpg": image, "npy": np.zeros(3)} | {
                    extension: make(i) for extension, make in label.items()})
    return paths


def tars_with_numbers(drawn, root):
    return shards(drawn, root, cls=lambda i: i)


def folder_of_tars(drawn, root):
    shards(drawn, root, "tar.gz", txt=lambda i: f"{i}\n", json=lambda i: {"label": "another"})
    return [root]


def tars_with_json(drawn, root):
    return [*shards(drawn, root, json=lambda i: {"person": i}, cls=lambda i: 0), "--label-key", "person"]


def dataset_of(drawn):
    names = [str(identity) for identity in reversed(range(IDENTITIES))]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names), age=datasets.Value("int32"))
    return datasets.Dataset.from_dict({"image": [{"bytes": image, "path": None} for _, _, image in drawn],
                                       "label": [names.index(str(i)) for i, _, _ in drawn],
                                       "age": [n for _, n, _ in drawn]}, features)


def saved_dataset(drawn, root):
    dataset_of(drawn).save_to_disk(root, num_shards=3)
    return [root]


def folder_of_parquet(drawn, root):
    half = len(drawn) // 2
    for number, part in enumerate((drawn[:half], drawn[half:])):
        dataset_of(part).to_parquet(root / f"train-{number}.parquet")
    return [root]


def plain_parquet(drawn, root):
    root.mkdir()
    columns = {"picture": [image for _, _, image in drawn], "person": [i for i, _, _ in drawn]}
    parquet.write_table(pyarrow.table(columns), root / "faces.parquet", row_group_size=17)
    return [root / "faces.parquet", "--image-key", "picture", "--label-key", "person"]


KINDS = [folders, list_of_paths, list_of_im2rec, list_of_face2rec2, tars_with_numbers, folder_of_tars, tars_with_json,
         saved_dataset, folder_of_parquet, plain_parquet]


@pytest.mark.parametrize("write", KINDS, ids=lambda write: write.__name__)
def test_the_same_images_give_the_same_pack_whatever_they_come_from(drawn, faces, tmp_path, capsys, write):
    words = [str(word) for word in write(drawn, tmp_path / "source")]
    options = next((at for at, word in enumerate(words) if word.startswith("--")), len(words))
    cli(["pack", *words[:options], str(tmp_path / "pack"), *words[options:], "--json"])
    for name in "train.rec", "train.idx", "property":
        assert (tmp_path / "pack" / name).read_bytes() == (faces / name).read_bytes(), name
    identities = [str(identity) for identity in range(IDENTITIES)]
    assert json.loads((tmp_path / "pack" / "identities.json").read_text()) == identities
    found = json.loads(capsys.readouterr().out)
    assert found["sizes"] == dict.fromkeys(identities, IMAGES)
    assert found["left_out"] == {} and found["unused"] == []


def test_numbers_are_sorted_by_size_and_names_as_text(tmp_path):
    for number, name in enumerate(["10", "9", "009", "a"]):
        (tmp_path / "faces" / name).mkdir(parents=True)
        (tmp_path / "faces" / name / "0.jpg").write_bytes(jpeg(number))
    assert [*pack(Folders(tmp_path / "faces"), tmp_path / "names", processes=1).sizes] == ["009", "10", "9", "a"]
    (tmp_path / "faces" / "a" / "0.jpg").unlink()
    (tmp_path / "faces" / "a").rmdir()
    assert [*pack(Folders(tmp_path / "faces"), tmp_path / "numbers", processes=1).sizes] == ["009", "9", "10"]
    dataset = RecordDataset(tmp_path / "numbers")
    assert [dataset.encoded(i) for i in range(3)] == [jpeg(2), jpeg(1), jpeg(0)]


def test_what_a_list_names_in_vain_is_left_out_and_nothing_from_outside_is_packed(tmp_path):
    for path in "faces/0.jpg", "faces/1.jpg", "secret.jpg":
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(jpeg(1))
    (tmp_path / "faces" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (tmp_path / "faces" / "large.jpg").write_bytes(jpeg(1, 224))
    os.mkfifo(tmp_path / "faces" / "pipe")
    rows = ["0.jpg\tanna", f"{tmp_path}/faces/1.jpg\tanna", "gone.jpg\tanna", "../secret.jpg\tbert", "link.jpg\tbert",
            f"{tmp_path}/secret.jpg\tbert", "pipe\tbert", "large.jpg\tbert"]
    (tmp_path / "faces" / "list").write_text("\n".join(rows))
    packed = pack(source_of([tmp_path / "faces" / "list"]), tmp_path / "pack", processes=1)
    assert packed.sizes == {"anna": 2} and packed.unused == ["bert"]
    outside = "not in the list's folder, or that of --root"
    assert left_out(tmp_path / "pack") == {
        "gone.jpg": "cannot be read: No such file or directory", "../secret.jpg": outside, "link.jpg": outside,
        f"{tmp_path}/secret.jpg": outside, "pipe": "neither a file nor a folder", "large.jpg": "not 112×112 pixels: 224×224"}
    pack(source_of([tmp_path / "faces" / "list"]), tmp_path / "resized", resize=True, processes=1)
    assert RecordDataset(tmp_path / "resized").index.identity.tolist() == [0, 0, 1]


@pytest.mark.parametrize("text", ["0.jpg\n", "0.jpg\t\n", "\t1\n", "0.jpg 1\n", "0\t1\t\n", "a\t1\t0.jpg\n", "\x00\xff\n"])
def test_a_line_that_is_none_is_named_before_the_work_begins(tmp_path, text):
    (tmp_path / "list").write_text("0.jpg\tanna\n\n" + text, encoding="latin-1")
    with pytest.raises(RecordError, match="list: line 3 is .*, but must be a path and an identity, or as in im2rec's lists"):
        pack(source_of([tmp_path / "list"]), tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            if content is None:
                member.type = tarfile.DIRTYPE
            elif isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
            else:
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def test_a_sample_without_image_or_label_is_left_out_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("f2c_plugin.tools.image_files._LARGEST_FILE", 5000)
    write_tar(tmp_path / "a.tar", [
        ("in.folder", None), ("in.folder/0.jpg", jpeg(1)), ("in.folder/0.cls", b" anna\n"), ("1.cls", b"anna"),
        ("2.jpg", jpeg(2)), ("3.png", b""), ("3.jpg", jpeg(3)), ("3.cls", b"anna"), ("4.JPG", jpeg(4)),
        ("4.json", b'{"label": 7}'), ("5.jpg", jpeg(5)), ("5.json", b'{"label": true}'), ("6.jpg", jpeg(6)), ("6.json", b"{"),
        ("._7.jpg", b""), ("README", b""), ("8.jpg", "2.jpg"), ("9.jpg", bytes(6000)), ("9.txt", b"bert"), ("a.jpg", b"<html>"),
        ("a.txt", b"bert"), ("b.npy", b""), ("c.jpg", jpeg(1)), ("c.cls", b"\xff"), ("d.jpg", jpeg(2)), ("d.cls", b"anna"),
        ("d.jpg", jpeg(3)), ("d.cls", b"carl")])
    # A sample does not go on in the next file.
    write_tar(tmp_path / "b.tar.xz", [("e.jpg", jpeg(4))], "w:xz")
    write_tar(tmp_path / "c.tgz", [("e.cls", b"anna")], "w:gz")
    packed = pack(source_of([tmp_path]), tmp_path / "pack", processes=1)
    assert packed.sizes == {"7": 1, "anna": 2, "carl": 1, "\udcff": 1} and packed.unused == ["bert"]
    unlabelled, alone = "an image, no label: neither .cls nor .txt nor .json with label", "a label, no image"
    assert left_out(tmp_path / "pack") == {
        "a.tar/1.cls": alone, "a.tar/2.jpg": unlabelled, "a.tar/3.png": "several images of one name: png, jpg",
        "a.tar/5.jpg": unlabelled, "a.tar/6.jpg": unlabelled, "a.tar/._7.jpg": "hidden, or a file of the system",
        "a.tar/README": "no name like key.extension", "a.tar/8.jpg": "neither a file nor a folder",
        "a.tar/9.jpg": "larger than 0 MB: 0 MB", "a.tar/9.txt": alone, "a.tar/a.jpg": "not an image", "a.tar/b.npy": alone,
        "b.tar.xz/e.jpg": unlabelled, "c.tgz/e.cls": alone}
    dataset = RecordDataset(tmp_path / "pack")
    assert [dataset.encoded(i) for i in range(5)] == [jpeg(4), jpeg(1), jpeg(2), jpeg(3), jpeg(1)]


@pytest.mark.parametrize("damage", ["no tar", "cut in an image", "cut between images", "cut gzip", "damaged header", "empty"])
def test_a_damaged_tar_file_is_named_and_no_part_of_it_packed(tmp_path, damage):
    files = [(f"{i}.{extension}", content) for i in range(4) for extension, content in (("jpg", jpeg(i)), ("cls", b"anna"))]
    whole = write_tar(tmp_path / "whole.tar", files).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        second = tar.getmember("1.jpg").offset
    (tmp_path / "bad.tar").write_bytes({
        "no tar": jpeg(1), "cut in an image": whole[:second + 600], "cut between images": whole[:second],
        "cut gzip": gzip.compress(whole)[:-300], "empty": b"",
        "damaged header": whole[:second] + b"x" + whole[second + 1:]}[damage])
    with pytest.raises(RecordError, match="bad.tar: not a whole tar file: "):
        pack(source_of([tmp_path / "whole.tar", tmp_path / "bad.tar"]), tmp_path / "pack", processes=1)
    assert not (tmp_path / "pack").exists()


def test_a_stream_of_a_tar_file_keeps_nothing_of_what_it_has_read(tmp_path, monkeypatch):
    opened = []
    source = source_of([write_tar(tmp_path / "a.tar", [(f"{i}.jpg", jpeg(1)) for i in range(9)])])
    monkeypatch.setattr(tarfile, "open", lambda of=tarfile.open, **keys: opened.append(of(**keys)) or opened[-1])
    assert [len(opened[0].members) <= 1 for _ in source.items()] == [True] * 9


def test_rows_of_a_dataset_without_image_or_label_are_left_out(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(jpeg(1))
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["bert", "anna"]))
    images = [{"bytes": jpeg(1), "path": "0.jpg"}, {"bytes": None, "path": str(tmp_path / "secret.jpg")}, None,
              {"bytes": jpeg(2), "path": None}, {"bytes": jpeg(3), "path": None}, {"bytes": b"<html>", "path": None}]
    found = datasets.Dataset.from_dict({"image": images, "label": [1, 1, 1, -1, None, 0]}, features)
    found.to_parquet(tmp_path / "faces.parquet")  # save_to_disk reads the file at the path
    packed = pack(source_of([tmp_path / "faces.parquet"]), tmp_path / "pack", processes=1)
    assert packed.sizes == {"anna": 1} and packed.unused == ["bert"]
    assert left_out(tmp_path / "pack") == {"row 1": "no bytes of an image", "row 2": "no bytes of an image",
                                           "row 3": "an image, no label: label", "row 4": "an image, no label: label",
                                           "row 5": "not an image"}


def test_which_column_is_meant_is_asked_where_it_is_not_plain(tmp_path):
    folder, words = str(tmp_path / "faces"), {"bytes": jpeg(1), "path": None}
    two = datasets.Features(image=datasets.Image(), mask=datasets.Image(), person=datasets.Value("string"))
    found = datasets.Dataset.from_dict({"image": [words], "mask": [words], "person": ["anna"]}, two)
    datasets.DatasetDict(train=found, test=found).save_to_disk(folder)
    for source, keys, message in [
            (folder, {}, f"faces: has the splits train, test: name one, as {folder}/train"),
            (f"{folder}/train", {}, "2 of its columns are of the kind Image: name one of image, mask with --image-key"),
            (f"{folder}/train", dict(image_key="image"),
             "0 of its columns are of the kind ClassLabel: name one of image, mask, person with --label-key"),
            (f"{folder}/train", dict(image_key="face"), "--image-key face: .*train has only the columns image, mask, person")]:
        with pytest.raises(InputError, match=message):
            pack(source_of([source], **keys), tmp_path / "pack")
    packed = pack(source_of([f"{folder}/train"], image_key="image", label_key="person"), tmp_path / "pack", processes=1)
    assert packed.sizes == {"anna": 1}


@pytest.mark.parametrize("words, message", [
    (["missing"], "missing: no such file or folder"), (["missing.tar"], "missing.tar: no such file"),
    (["missing.parquet"], "missing.parquet: no such file"), (["a.parquet"], "a.parquet: cannot be read as parquet"),
    (["list", "a.tar"], "list, a.tar: several sources must all be .tar files, or all .parquet files"),
    (["list", "list"], "several sources must all be"),
    (["folder", "--root", "."], "--root .: folder has none, since it is a folder"),
    (["list", "--label-key", "x"], "--label-key x: list has none, since it is a list"),
    (["a.tar", "--image-key", "x"], "--image-key x: a.tar has none, since it is of tar files"),
    (["list", "--root", "missing"], "--root missing: no such folder"),
    (["saved"], "saved: cannot be read as a dataset"),
    (["a.tar"], "a.tar: no image to pack; it must hold images of 112×112 pixels, each with a .cls")])
def test_sources_that_cannot_be_packed_are_refused(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    for name in "folder/a", "saved":
        Path(name).mkdir(parents=True)
    for name in "dataset_info.json", "state.json":
        Path("saved", name).write_text("{}")
    Path("list").write_text("0.jpg\tanna\n")
    Path("a.parquet").write_bytes(b"PAR1")
    write_tar("a.tar", [])
    with pytest.raises(SystemExit, match=message):
        cli(["pack", *words, "pack"])
    assert not Path("pack").exists()


def test_the_extra_that_reads_datasets_is_named_where_it_is_missing(drawn, tmp_path, monkeypatch):
    saved_dataset(drawn[:6], tmp_path / "saved")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(F2CError, match=r"pip install 'f2c-plugin\[huggingface\]'"):
        pack(source_of([tmp_path / "saved"]), tmp_path / "pack")


def test_an_image_that_needs_pillow_is_named_without_its_content(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(F2CError, match=r"^an image is not a JPEG of 112×112 in RGB or gray: PIL.*\[images\]"):
        storable(b"BM", False, None)


def test_each_parquet_file_has_its_own_names_of_identities(tmp_path):
    def write(name, names):
        of = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
        rows = dict(image=[dict(bytes=jpeg(len(names[0]) + i), path=None) for i in range(2)], label=[0, 1])
        datasets.Dataset.from_dict(rows, of).to_parquet(tmp_path / name)

    write("0.parquet", ["anna", "bob"])
    write("1.parquet", ["caroline", "anna"])
    packed = pack(source_of([tmp_path / "0.parquet", tmp_path / "1.parquet"]), tmp_path / "pack", processes=1)
    names = json.loads((tmp_path / "pack/identities.json").read_text())
    assert packed.sizes == {name: 2 if name == "anna" else 1 for name in names} and len(names) == 3
    dataset = RecordDataset(tmp_path / "pack")
    of_anna = [dataset.encoded(int(i)) for i in dataset.index.images_of(names.index("anna"))]
    assert sorted(of_anna) == sorted([jpeg(4), jpeg(9)])
    parquet.write_table(pyarrow.table(dict(image=[b""], label=[3])), tmp_path / "2.parquet")
    with pytest.raises(InputError, match="2.parquet: its column image is of the kind Value, and that of .* Image: pack"):
        pack(source_of([tmp_path / "0.parquet", tmp_path / "2.parquet"]), tmp_path / "other", processes=1)


def test_files_beside_those_that_are_packed_are_listed(drawn, tmp_path):
    folder_of_tars(drawn, tmp_path / "tars")
    for name in "loose.jpg", "x.parquet":
        (tmp_path / "tars" / name).write_bytes(jpeg(1))
    pack(source_of([tmp_path / "tars"]), tmp_path / "a", processes=1)
    assert left_out(tmp_path / "a") == dict.fromkeys(["loose.jpg", "x.parquet"], "not one of the files that are packed")


def test_a_repository_of_hugging_face_is_packed_as_it_is_downloaded_but_not_its_splits_together(drawn, tmp_path):
    (tmp_path / "hub/data").mkdir(parents=True)
    (tmp_path / "hub/README.md").write_text("faces")
    dataset_of(drawn).to_parquet(tmp_path / "hub/data/train-00000-of-00001.parquet")
    packed = pack(source_of([tmp_path / "hub"]), tmp_path / "a", processes=1)
    assert packed.sizes == dict.fromkeys(map(str, range(IDENTITIES)), IMAGES)
    assert left_out(tmp_path / "a") == {"README.md": "not one of the files that are packed"}
    dataset_of(drawn[:3]).to_parquet(tmp_path / "hub/data/test-00000-of-00001.parquet")
    for folder in "hub", "hub/data":
        with pytest.raises(InputError, match=r"has the splits test, train: name the files of one, as .*train-\*.parquet"):
            source_of([tmp_path / folder])


def test_boxes_in_face2rec2s_lists_are_passed_over_and_labels_that_are_none_are_left_out(tmp_path):
    lines = ["1\ta.jpg\t7\t1\t2\t3\t4", "1\tb.jpg\t7.0\t1\t2\t3\t4" + "\t5.5" * 10, "0\t-1\tc.jpg", "1\t2.5\td.jpg",
             "2\tnan\te.jpg", "3\t8.000000\tf.jpg", "1\tg.jpg\tnan"]
    for name in "abcdefg":
        (tmp_path / f"{name}.jpg").write_bytes(jpeg(ord(name) - ord("a")))
    (tmp_path / "list.lst").write_text("\n".join(lines))
    packed = pack(source_of([tmp_path / "list.lst"]), tmp_path / "pack", processes=1)
    assert packed.sizes == {"7": 2, "8": 1}
    assert left_out(tmp_path / "pack") == dict.fromkeys(["c.jpg", "d.jpg", "e.jpg", "g.jpg"], "an image, no label")
