"""Identities that are one person's under several numbers are found, in packs of any order, and merged only when told."""

import json

import numpy as np
import onnx
import pytest
import simplejpeg
from onnx import helper

from f2c_plugin.cli import main as cli
from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.data.writer import RecordWriter, pack_image_record, write_insightface_pack
from f2c_plugin.errors import F2CError, InputError, OverwriteError
from f2c_plugin.tools import duplicates
from f2c_plugin.tools.duplicates import find_duplicates, groups
from f2c_plugin.tools.repack import merge


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Embeds an image as its mean colour, in [-1, 1]³."""
    path = tmp_path_factory.mktemp("model") / "colours.onnx"
    nodes = [helper.make_node("GlobalAveragePool", ["images"], ["means"]), helper.make_node("Flatten", ["means"], ["colours"])]
    shapes = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
              for name, shape in (("images", ["n", 3, 112, 112]), ("colours", ["n", 3]))]
    graph = helper.make_graph(nodes, "colours", shapes[:1], shapes[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def picture(*colour):
    """Of a mean colour in [-1, 1]³."""
    pixels = np.full((112, 112, 3), np.round(127.5 * (1 + np.array(colour))), np.uint8)
    return simplejpeg.encode_jpeg(pixels, 95, "RGB", "444")


RED, GREEN, BLUE, PALE_RED = (0.9, 0, 0), (0, 0.9, 0), (0, 0, 0.9), (0.4, 0.03, 0.03)


def write(folder, identities):
    folder.mkdir()
    images = [(identity, picture(*colour) if isinstance(colour, tuple) else colour)
              for identity, colours in identities.items() for colour in colours]
    with RecordWriter(folder / "train.rec") as pack:
        for key, (identity, image) in enumerate(images):
            pack.write(key, pack_image_record(identity, image, key))
    return folder


@pytest.fixture
def packs(tmp_path):
    """Red is two identities of the first pack and one of the second, blue is in both, and green in one."""
    return (write(tmp_path / "a", {7: [RED, RED], 2: [GREEN], 30: [BLUE], 5: [PALE_RED]}),
            write(tmp_path / "b", {4: [BLUE, BLUE], 0: [RED, PALE_RED, RED]}))


def test_identities_with_one_centre_are_listed_and_merged_with_the_list_only(packs, tmp_path, model, capsys):
    a, b = packs
    cli(["duplicates", str(a), str(b), str(tmp_path / "new/list"), "--model", str(model)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path / 'new/list'}: 5 of 6 identities, in 2 groups that may be one person's"
    assert lines[1:3] == [f"  same-1: {a} 5, {a} 7, {b} 0 (cosine 1.000)", f"  same-2: {a} 30, {b} 4 (cosine 1.000)"]
    assert lines[3].startswith("look at them")
    listed = [line.split("\t") for line in (tmp_path / "new/list").read_text().splitlines()]
    assert [words[:3] for words in listed] == [["1", "5", "same-1"], ["1", "7", "same-1"], ["2", "0", "same-1"],
                                               ["1", "30", "same-2"], ["2", "4", "same-2"]]
    assert sorted(tmp_path.iterdir()) == [a, b, tmp_path / "new"] and [*(tmp_path / "new").iterdir()] == [tmp_path / "new/list"]
    merge(packs, tmp_path / "out", tmp_path / "new/list")
    assert np.diff(RecordDataset(tmp_path / "out").index.starts).tolist() == [1, 6, 3]


def test_the_threshold_and_the_result_as_json(packs, tmp_path, model, capsys):
    cli(["duplicates", *map(str, packs), str(tmp_path / "list"), "--model", str(model), "--least", "0.99999", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [words[:3] for words in found["same"]] == [[1, 30, "same-1"], [2, 4, "same-1"]]
    assert found["identities"] == 6 and found["unreadable"] == 0 and found["folders"] == list(map(str, packs))
    cli(["duplicates", str(packs[1]), str(tmp_path / "none"), "--model", str(model)])
    assert capsys.readouterr().out == f"{tmp_path / 'none'}: 0 of 2 identities, in 0 groups that may be one person's\n"
    assert (tmp_path / "none").read_bytes() == b""


def test_ten_images_spread_over_an_identity_make_its_centre_each_with_the_same_weight(tmp_path, model):
    many = [RED, *[GREEN] * 10, RED, *[GREEN] * 88]  # of which the first and one of every eleventh are taken
    pack = write(tmp_path / "a", {0: many, 1: [(0.1, 0, 0), *[(0, 0.9, 0)] * 4]})
    found, = duplicates._centres(RecordDataset(pack), duplicates.load_model(model))
    for centre, (red, green) in zip(found, [(2, 8), (1, 4)], strict=True):
        assert centre == pytest.approx(np.array([red, green, 0]) / np.hypot(red, green), abs=0.02)


def test_identities_without_a_readable_image_are_like_no_other(tmp_path, model):
    broken = picture(*RED)[:-200]
    folder = write(tmp_path / "a", {0: [broken], 1: [broken, broken], 2: [broken, RED], 3: [RED]})
    found = find_duplicates([folder], model, tmp_path / "list")
    assert [each.identity for each in found.same] == [2, 3] and found.unreadable == 2
    assert "; 2 have no readable image" in found.report()


@pytest.mark.parametrize("block", [1, 3, 7, 64])
def test_blocks_of_any_size_give_the_groups_of_all_pairs(monkeypatch, block):
    monkeypatch.setattr(duplicates, "_BLOCK", block)
    points = np.random.default_rng(0).normal(size=(40, 3))
    points = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)
    cosines = points @ points.T - 2 * np.eye(40)
    alike = np.linalg.matrix_power((cosines >= 0.95) + np.eye(40), 40) > 0  # connected
    group, largest = groups(points, 0.95)
    assert group.tolist() == alike.argmax(1).tolist() and 5 < len({*group.tolist()}) < 39
    assert largest == pytest.approx(np.where(cosines.max(1) >= 0.95, cosines.max(1), 0), abs=1e-6)


def test_what_cannot_be_compared_is_refused_and_nothing_is_written(packs, tmp_path, model):
    for least in 0, 1.5:
        with pytest.raises(InputError, match=f"--least {least}: must be a cosine"):
            find_duplicates(packs, model, tmp_path / "list", least)
    write_insightface_pack(tmp_path / "train.rec", [picture(*RED)], [1])
    with pytest.raises(OverwriteError, match="train.rec exists"):
        find_duplicates(packs, model, tmp_path / "train.rec")
    with pytest.raises(F2CError, match="missing.onnx: no such file"):
        find_duplicates(packs, tmp_path / "missing.onnx", tmp_path / "list")
    infinite = onnx.load(model)
    infinite.graph.node[1].op_type = "Log"  # of negative numbers
    infinite.graph.node.append(helper.make_node("Flatten", ["logs"], ["colours"]))
    infinite.graph.node[1].output[0] = "logs"
    onnx.save(infinite, tmp_path / "log.onnx")
    dark = write(tmp_path / "dark", {0: [(-1, -1, -1)]})
    with pytest.raises(F2CError, match=r"log.onnx: its embeddings of .*dark are not finite"):
        find_duplicates([*packs, dark], tmp_path / "log.onnx", tmp_path / "list")
    assert not (tmp_path / "list").exists()


def test_a_long_group_and_an_odd_name_take_one_line_each(tmp_path, model, capsys):
    pack = write(tmp_path / "a\nb", {number: [RED] for number in range(30)})
    cli(["duplicates", str(pack), str(tmp_path / "list"), "--model", str(model)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith(r"a\nb 9, … (cosine 1.000)") and lines[1].count(r"a\nb") == 10 and len(lines) == 3
    assert len((tmp_path / "list").read_text().splitlines()) == 30
