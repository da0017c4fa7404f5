"""Whose face an image shows: the image's own label, read as arcface_torch reads it, whoever wrote the pack."""

import logging
from itertools import pairwise

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings, strategies as st

from f2c_plugin.cli import main as cli
from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.data.from_config import open_pack
from f2c_plugin.data.identities import index_identities
from f2c_plugin.data.recordio import IMAGE_HEADER, MAGIC_BYTES, RecordFile, id2_of, read_idx, unpack_image_record
from f2c_plugin.data.writer import RecordWriter, pack_image_record
from f2c_plugin.errors import ConfigError, RecordError

JPEG = simplejpeg.encode_jpeg(np.zeros((112, 112, 3), np.uint8))


def read_as_arcface_torch(folder):
    """{record number: label} of all images, by the lines of MXFaceDataset."""
    records = RecordFile(folder / "train.rec")
    keys, offsets = read_idx(folder / "train.idx")
    at = dict(zip(keys.tolist(), offsets.tolist(), strict=True))
    header = unpack_image_record(records.read(at[0])).labels if 0 in at else np.zeros(1)
    announced = len(header) > 1  # mxnet's flag > 0
    return {key: int(unpack_image_record(records.read(at[key])).labels[0])
            for key in (range(1, int(header[0])) if announced else keys.tolist())}


def write(folder, labels, records_of=None, header=None, header_image=b"", header_last=False, images=None):
    """A pack of images 1, 2, … with ``labels``.

    records_of: the runs of images that get an identity record each, [(first, one past the last), …].
    header: the labels of record 0; by default InsightFace's.
    """
    end = len(labels) + 1
    runs = records_of or []
    header = header or [end, end + len(runs)]
    with RecordWriter(folder / "train.rec") as writer:
        if not header_last:
            writer.write(0, pack_image_record(header, header_image, 0))
        for key, (label, image) in enumerate(zip(labels, images or [JPEG] * len(labels), strict=True), 1):
            writer.write(key, pack_image_record(label, image, key))
        for key, run in enumerate(runs, end):
            writer.write(key, pack_image_record(run, b"", key))
        if header_last:
            writer.write(0, pack_image_record(header, header_image, 0))


def runs_of(labels):
    """An identity record at every change of label, as face2rec2 writes them."""
    cuts = [0, *(i for i in range(1, len(labels)) if labels[i] != labels[i - 1]), len(labels)]
    return [(start + 1, stop + 1) for start, stop in pairwise(cuts)]


def test_an_unsorted_list_of_face2rec2_gives_an_identity_for_each_label_not_for_each_record(tmp_path, caplog, capsys):
    labels = [2, 0, 2, 1, 1, 0]
    write(tmp_path, labels, runs_of(labels))
    index = RecordDataset(tmp_path).index
    assert index.identity.tolist() == labels and index.numbers.tolist() == [0, 1, 2]
    assert index.conflict.tolist() == [5, 5]
    message = "5 identity records, but the labels of the images are of 3 identities (5 images differ): the labels count"
    with caplog.at_level(logging.WARNING):
        open_pack({"rec": str(tmp_path), "num_classes": 3, "num_image": 6})
    assert message in caplog.text
    with pytest.raises(ConfigError, match="set num_classes=3"):
        open_pack({"rec": str(tmp_path), "num_classes": 5, "num_image": 6})
    cli(["index", str(tmp_path)])
    printed = capsys.readouterr().out
    assert message in printed and "config.num_classes = 3" in printed


def test_labels_and_identity_records_that_agree_are_not_reported(tmp_path, caplog):
    labels = [0, 0, 1, 2, 2]
    write(tmp_path, labels, runs_of(labels))
    with caplog.at_level(logging.WARNING):
        dataset = open_pack({"rec": str(tmp_path), "num_classes": 3, "num_image": 5})
    assert dataset.index.identity.tolist() == labels and not dataset.index.conflict.any() and not caplog.text


@pytest.mark.parametrize("header_last", [False, True])
@pytest.mark.parametrize("header_image", [b"", JPEG], ids=["no picture", "picture"])
@pytest.mark.parametrize("more", [[], [0.0]], ids=["two labels", "three labels"])
def test_record_0_may_announce_images_without_identity_records(tmp_path, header_last, header_image, more):
    labels = [3, 3, 0, 1, 1, 1, 2]
    write(tmp_path, labels, header=[8, 4, *more], header_image=header_image, header_last=header_last)
    index = RecordDataset(tmp_path).index
    assert index.identity.tolist() == labels and index.keys.tolist() == list(range(1, 8))
    assert open_pack({"rec": str(tmp_path), "num_classes": 4, "num_image": 7})
    with pytest.raises(SystemExit):
        cli(["index", str(tmp_path / "nowhere"), "--verify"])
    cli(["index", str(tmp_path), "--verify"])  # record 0 is not damaged


def test_record_0_that_announces_more_images_than_there_are_is_refused(tmp_path):
    write(tmp_path, [0, 1], header=[9, 2])
    with pytest.raises(RecordError, match="record 0 announces images 1 to 8, but there are 3 records, without record 3: "):
        RecordDataset(tmp_path)


@pytest.mark.parametrize("lost", ["record 0", "true count"])
def test_bookkeeping_is_never_counted_as_an_image(tmp_path, lost):
    write(tmp_path, [0, 0, 1], runs_of([0, 0, 1]), header=[5, 6] if lost == "true count" else None)
    if lost == "record 0":
        lines = (tmp_path / "train.idx").read_text().splitlines(keepends=True)
        (tmp_path / "train.idx").write_text("".join(lines[1:]))
    with pytest.raises(RecordError, match=r"record 4 is bookkeeping \(several labels, no image\), but .*f2c-plugin reindex"):
        RecordDataset(tmp_path)


def test_images_that_face2rec2_counted_but_could_not_read_are_named(tmp_path):
    write(tmp_path, [0, 0, 1], runs_of([0, 0, 1]))
    lines = (tmp_path / "train.idx").read_text().splitlines(keepends=True)
    (tmp_path / "train.idx").write_text("".join(lines[:2] + lines[3:]))
    with pytest.raises(RecordError, match=r"train.idx: lacks record 2 \(1 such records\).* Make the pack again"):
        RecordDataset(tmp_path)


@pytest.mark.parametrize("header", [[5, 100], [5, 5], [5, 1000, 0], [5, 0]], ids=str)
@pytest.mark.parametrize("header_last", [False, True])
@pytest.mark.parametrize("header_image", [b"", JPEG], ids=["no picture", "picture"])
def test_record_0_may_name_the_identities_of_the_pack_that_this_one_is_a_part_of(tmp_path, header, header_last, header_image):
    write(tmp_path, [0, 3, 3, 7], header=header, header_image=header_image, header_last=header_last)
    index = RecordDataset(tmp_path).index
    assert index.keys.tolist() == [1, 2, 3, 4] and index.identity.tolist() == [0, 3, 3, 7] and not index.conflict.any()


@pytest.mark.parametrize("header_last", [False, True])
def test_record_0_with_a_picture_is_known_by_another_number_of_labels(tmp_path, header_last):
    write(tmp_path, [0, 1, 1, 2], header=[4, 3], header_image=JPEG, header_last=header_last)  # announces one image less
    assert RecordDataset(tmp_path).index.identity.tolist() == [0, 1, 1]


def test_a_damaged_image_takes_the_label_of_its_identity_record(tmp_path):
    labels = [7, 7, 7, 4, 4]
    write(tmp_path, labels, runs_of(labels))
    _, offsets = read_idx(tmp_path / "train.idx")
    content = bytearray((tmp_path / "train.rec").read_bytes())
    for key in 1, 3:
        content[offsets[key]:offsets[key] + 4] = b"oops"
    (tmp_path / "train.rec").write_bytes(content)
    assert RecordDataset(tmp_path).index.identity.tolist() == labels


@pytest.mark.parametrize("bad", [-1.0, 2.5], ids=str)
def test_labels_that_are_no_identities_are_refused_also_where_there_are_identity_records(tmp_path, bad):
    labels = [2, 0, bad, 1, 0]  # as from an unsorted list: by the records there would be five people
    write(tmp_path, labels, runs_of(labels))
    with pytest.raises(RecordError, match=rf"the record at offset \d+ has the label {bad} .1 such records.*convert"):
        RecordDataset(tmp_path)


def test_where_float32_has_rounded_the_labels_the_identity_records_decide(tmp_path):
    labels = [2**25, 2**25 + 1, 2**25 + 1]
    write(tmp_path, np.float32(labels), runs_of(labels))
    content = (tmp_path / "train.rec").read_bytes()  # as mxnet writes it, without the identity in id2
    (tmp_path / "train.rec").write_bytes(content.replace(id2_of(2**25).to_bytes(8, "little"), bytes(8)))
    assert RecordDataset(tmp_path).index.identity.tolist() == [0, 1, 1]


def in_parts(shift):
    """The JPEG with a comment that holds dmlc's magic number, at one of four places aligned to 4 bytes."""
    return JPEG[:2] + b"\xff\xfe" + (18 - shift % 4).to_bytes(2, "big") + bytes(4 - shift % 4) + MAGIC_BYTES * 3 + JPEG[2:]


def write_as(writer, folder, labels, draw):
    """A pack of ``labels`` as one of the public tools writes it."""
    count, images = len(labels), [draw(st.sampled_from([JPEG, *map(in_parts, range(4))])) for _ in labels]
    keys = list(range(count))
    match writer:
        case "face2rec2":  # from any list: sorted, unsorted, appended
            return write(folder, labels, runs_of(labels), images=images, header_last=draw(st.booleans()))
        case "announced":  # federated splits and converters
            more = draw(st.lists(st.floats(0, 9, width=32), max_size=2))
            return write(folder, labels, header=[count + 1, len(set(labels)), *more], images=images,
                         header_image=draw(st.sampled_from([b"", JPEG])), header_last=draw(st.booleans()))
        case "im2rec":  # keys of a .lst, in any order
            keys = draw(st.lists(st.integers(0, 1 << 40), min_size=count, max_size=count, unique=True))
        case "boxes":  # the identity comes first in an array
            keys = list(range(1, count + 1))
            labels = [[label, *draw(st.lists(st.floats(-9, 200, width=32), min_size=1, max_size=4))] for label in labels]
        case "wide":  # this package's
            labels = [label and draw(st.sampled_from([label, 2**24 + label, 2**31 + label])) for label in labels]
        case "rec_builder":
            pass
    with RecordWriter(folder / "train.rec") as pack:
        for key, label, image in zip(keys, labels, images, strict=True):
            pack.write(key, pack_image_record(label, image, key))


@settings(max_examples=200, deadline=None)
@given(data=st.data(), labels=st.lists(st.integers(0, 5), min_size=1, max_size=12),
       writer=st.sampled_from(["face2rec2", "announced", "im2rec", "rec_builder", "boxes", "wide"]))
def test_images_and_labels_are_those_that_arcface_torch_reads(tmp_path_factory, data, labels, writer):
    folder = tmp_path_factory.mktemp("pack")
    write_as(writer, folder, labels, data.draw)
    index = index_identities(RecordFile(folder / "train.rec"), *read_idx(folder / "train.idx"))
    found = dict(zip(index.keys.tolist(), index.identity.tolist(), strict=True))
    expected = read_as_arcface_torch(folder)
    assert found.keys() == expected.keys()
    assert [np.float32(found[key]) for key in expected] == [np.float32(label) for label in expected.values()]
    assert all(found[key] % (1 << 24) == label % (1 << 24) for key, label in zip(index.keys.tolist(), labels, strict=True)
               ) or writer != "wide"


@pytest.mark.parametrize("change", [
    lambda text: b"\xef\xbb\xbf" + text, lambda text: text.replace(b"\n", b"\r\n"), lambda text: b"\n" + text + b"\n\n",
    lambda text: text.replace(b"\t", b".0\t"), lambda text: text.replace(b"\t", b"   ")],
    ids=["byte-order mark", "CRLF", "blank lines", "float keys", "spaces"])
def test_an_idx_in_an_unusual_form_is_read(tmp_path, change):
    write(tmp_path, [0, 1, 1], runs_of([0, 1, 1]))
    path = tmp_path / "train.idx"
    usual = read_idx(path)
    path.write_bytes(change(path.read_bytes()))
    assert all(map(np.array_equal, read_idx(path), usual))


@pytest.mark.parametrize("line", [b"1\t2\t3", b"7", b"1\tx", b"1.5\t8", b"1\tinf", b"1\t1e400", b"1\t" + 30 * b"9",
                                  "1\té".encode()])
def test_an_idx_with_a_bad_line_is_refused_with_its_number(tmp_path, line):
    (tmp_path / "train.idx").write_bytes(b"\xef\xbb\xbf0\t0\n\n" + line + b"\n")
    with pytest.raises(RecordError, match=r"train.idx: not an index: line 3 is b'"):
        read_idx(tmp_path / "train.idx")


WIDE = [5, 2**24 - 1, 2**24, 2**24 + 1, 2**24 + 2, 2**31 - 1, 2**31, 2**31 + 1, 0xCED7230A, 2**33 | 0xCED7230A, 2**40 - 1]


@pytest.mark.parametrize("more", [[], [12.5, 7.0]], ids=["label", "array"])
def test_identities_are_exact_up_to_2_to_the_40(tmp_path, more):
    with RecordWriter(tmp_path / "train.rec") as writer:
        for key, identity in enumerate(WIDE):
            writer.write(key, pack_image_record([identity, *more] if more else identity, JPEG, key))
    index = RecordDataset(tmp_path).index
    assert index.identity.tolist() == WIDE and index.numbers.tolist() == sorted(WIDE)
    records = RecordFile(tmp_path / "train.rec")  # for mxnet, the label is the identity as float32
    assert records.labels(index.offsets)[:, 0].tolist() == np.float32(WIDE).tolist()


def test_a_writer_refuses_identities_beyond_2_to_the_40():
    with pytest.raises(RecordError, match=f"identity {2**40}: must be below 2.{{2}}40"):
        pack_image_record(2**40, JPEG, 0)


def test_labels_that_float32_has_rounded_are_refused_unless_the_header_has_the_identity(tmp_path):
    with RecordWriter(tmp_path / "train.rec") as writer:
        writer.write(0, pack_image_record(2**24 + 2, JPEG, 0))
        for key, id2 in enumerate([0, 2**24 + 2, id2_of(2**30)], 1):  # none; without the mark; another identity's
            writer.write(key, IMAGE_HEADER.pack(0, 2**24 + 2, key, id2) + JPEG)
    with pytest.raises(RecordError, match="labels go up to 16777218, but float32 cannot keep .* 3 images lack .*convert"):
        RecordDataset(tmp_path)


def test_a_record_that_is_damaged_has_no_wide_identity(tmp_path):
    with RecordWriter(tmp_path / "train.rec") as writer:
        writer.write(0, pack_image_record(2**30, JPEG, 0))
    records = RecordFile(tmp_path / "train.rec")
    assert records.wide_identities(np.array([0, 4, -4, 1 << 40])).tolist() == [2**30, -1, -1, -1]


@pytest.mark.parametrize("labels_of", [
    lambda number: [2, 5, *[number, .1, .2, .3, .4] * (number % 3 + 1)],  # mxnet's, of ImageDetIter
    lambda number: [4, 6, 112, 112, number, .1, .2, .3, .4, 0],
    lambda number: [2, 5, *[number, .1, .2, .3, .4] * (number % 3)],
    lambda number: [number % 3 + 1, *[.1, .2, .3, .4, number] * (number % 3 + 1)],
    lambda number: [number % 3, *[.1, .2, .3, .4, number] * (number % 3)]],
    ids=["mxnet", "mxnet with a longer header", "mxnet, some without objects", "number of objects",
         "number of objects, some without"])
def test_a_detection_pack_is_refused_because_its_labels_begin_with_a_count(tmp_path, labels_of):
    with RecordWriter(tmp_path / "train.rec") as writer:
        for key in range(9):
            writer.write(key, pack_image_record(labels_of(key), JPEG, key))
    with pytest.raises(RecordError, match="train.rec: the labels are those of object detection: they begin with a count"):
        RecordDataset(tmp_path)


@pytest.mark.parametrize("identities", [[0, 0, 1, 1, 2], [2, 2, 3, 5, 7], [1, 1, 1, 2, 2], [1, 1, 1]], ids=str)
def test_an_identity_with_box_and_landmarks_is_not_taken_for_a_detection(tmp_path, identities):
    with RecordWriter(tmp_path / "train.rec") as writer:  # as face2rec2 writes faces that are to be aligned
        for key, identity in enumerate(identities, 1):
            writer.write(key, pack_image_record([identity, *np.linspace(5 + key, 90, 14)], JPEG, key))
    assert RecordDataset(tmp_path).index.identity.tolist() == identities
