"""Models on verification sets: a trained one and its export, in the insightface package's way of calling it, too."""

import json
import shutil
from pathlib import Path

import insightface
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn
from torch.nn.functional import normalize

from f2c_plugin.cli import main as cli
from f2c_plugin.data.dataset import normalize_faces
from f2c_plugin.errors import ExportError, F2CError, InputError, VerificationSetError
from f2c_plugin.evaluation.accuracy import tar_at_far
from f2c_plugin.evaluation.onnx_net import OnnxNet
from f2c_plugin.evaluation.recognizability import recognizability
from f2c_plugin.evaluation.verification import VerificationSet, embed, save_bin
from f2c_plugin.tools import plotting
from f2c_plugin.tools.evaluate import evaluate, load_model, table
from f2c_plugin.utils.resolution import at_resolution
from tests.protocol_sets import write_ijb, write_tinyface
from tests.runs import by_torchrun, completed, history, on_ranks, run
from tests.tools.detectors import write_scrfd, write_yunet


@pytest.fixture(scope="module")
def trained(faces, tmp_path_factory):
    """The folder of a training with a checkpoint, by the recipe that has a gallery net."""
    folder = tmp_path_factory.mktemp("trained")
    config = folder / "config.py"
    config.write_text(f"""config = dict(head="f2c_dcp", f2c_recipe="paper", f2c_pool_rate=1.0, network="tiny",
        embedding_size=32, batch_size=12, lr=0.05, margin_list=(1.0, 0.0, 0.2), scale=16.0, rec={str(faces)!r},
        num_classes=12, num_image=120, num_epoch=2, num_workers=0, val_targets=["synth"], verbose=5, f2c_save_every=10,
        output={str(folder / "out")!r})""")
    run(str(config))
    return folder / "out"


def test_a_model_a_checkpoint_and_the_export_are_evaluated_alike(trained, faces, tmp_path, capsys):
    last = [entry for entry in history(trained) if "synth/accuracy" in entry][-1]

    def found(path, *options):
        cli(["evaluate", str(path), str(faces / "synth.bin"), "--json", *options])
        result, = json.loads(capsys.readouterr().out)
        return result
    model, exported = found(trained / "model.pt"), found(trained / "model.onnx")
    gallery = found(max(trained.glob("checkpoint_*.pt")), "--net", "gallery")
    assert model["accuracy"] == last["synth/accuracy"] and model["pairs"] == 60
    assert exported["accuracy"] == pytest.approx(last["synth/accuracy"], abs=0.02)
    assert exported["embedding_norm"] == pytest.approx(model["embedding_norm"], rel=1e-4)
    assert gallery["embedding_norm"] != pytest.approx(model["embedding_norm"], rel=1e-4)
    assert model["tar_at_far"]["1e-01"] is not None and model["tar_at_far"]["1e-02"] is None  # of 30 different pairs


def test_the_table_and_the_curve_show_what_the_pairs_resolve(trained, faces, tmp_path, capsys):
    again, other = Path(shutil.copy(faces / "synth.bin", tmp_path)), Path(shutil.copy(faces / "synth.bin", tmp_path / "b.bin"))
    cli(["evaluate", str(trained / "model.pt"), *map(str, (faces / "synth.bin", again, other)), "--plot",
         str(tmp_path / "roc.png")])
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["set", "pairs", "accuracy", "TAR", "at", "1e-01"]
    assert [row.split()[:2] for row in rows] == [[str(faces / "synth.bin"), "60"], [str(again), "60"], ["b", "60"]]
    assert len({tuple(row.split()[2:]) for row in rows}) == 1 and (tmp_path / "roc.png").read_bytes().startswith(b"\x89PNG")


def test_a_set_at_lower_resolutions_has_rows_for_both_images_so_and_for_one_against_a_sharp_one(trained, faces, capsys):
    command = ["evaluate", str(trained / "model.pt"), str(faces / "synth.bin"), "--resolutions", "7", "112"]
    cli([*command, "--json"])
    sharp, *rows = json.loads(capsys.readouterr().out)
    assert "resolution" not in sharp and [row["resolution"] for row in rows] == [[7, 7], [7, 112], [112, 112], [112, 112]]
    figures = "accuracy", "alignment", "divergence"
    for row in rows[2:]:
        assert [row[name] for name in figures] == pytest.approx([sharp[name] for name in figures], abs=1e-5)
    net, verification_set = load_model(trained / "model.pt"), VerificationSet(faces / "synth.bin")
    images = at_resolution(normalize_faces(verification_set.faces()), 7)
    with torch.no_grad():
        low = normalize(net.eval()(images) + net(images.flip(3))).double()
    whole = normalize(embed(net, verification_set.faces()).sum(1))
    same = verification_set.same
    for row, second in zip(rows, (low, whole), strict=False):
        distances = (low[::2] - second[1::2]).square().sum(1)
        assert row["alignment"] == pytest.approx(float(distances[same].mean()), abs=1e-5)
    assert rows[0]["alignment"] != pytest.approx(sharp["alignment"], abs=1e-3)
    cli(command)
    assert [line.rsplit(" pixels ")[0] for line in capsys.readouterr().out.splitlines()[2:]] == [
        f"synth, {first}/{second}" for first, second in ((7, 7), (7, 112), (112, 112), (112, 112))]


def test_how_recognizable_images_are_is_written_and_the_errors_without_the_least_are_shown(trained, faces, tmp_path, capsys):
    out = tmp_path / "quality.tsv"
    command = ["evaluate", str(trained / "model.pt"), str(faces / "synth.bin"), "--quality", str(out)]
    cli([*command, "--json", "--plot", str(tmp_path / "roc.png")])
    found = json.loads(capsys.readouterr().out)[0]["recognizability"]
    head, *rows = [line.split("\t") for line in out.read_text().splitlines()]
    assert head == ["set", "image", "recognizability"] and [row[:2] for row in rows] == [["synth", str(i)] for i in range(120)]
    net, images = load_model(trained / "model.pt"), VerificationSet(faces / "synth.bin").faces()
    expected = recognizability(embed(net, images).sum(1), embed(net, images, pixels=4).sum(1))
    np.testing.assert_allclose([float(row[2]) for row in rows], expected, atol=1e-6)
    assert found["mean"] == pytest.approx(expected.mean()) and found["far"] == 0.1  # of 30 different pairs
    result, = evaluate(trained / "model.pt", [faces / "synth.bin"])
    assert found["fnmr_at_rejected"]["0"] == pytest.approx(1 - result.result.tar_at_far(0.1))
    assert list(found["fnmr_at_rejected"]) == ["0", "0.01", "0.02", "0.05", "0.1", "0.2", "0.3", "0.5"]
    with pytest.raises(SystemExit, match="quality.tsv exists and is not overwritten"):
        cli(command)
    out.unlink()
    cli(command)
    title, row = capsys.readouterr().out.splitlines()[3:]
    assert title.split()[-9:] == ["FAR", "0%", "1%", "2%", "5%", "10%", "20%", "30%", "50%"]
    assert row.split()[:3] == ["synth", "1e-01", f"{found['fnmr_at_rejected']['0']:.2%}"]


def test_resolutions_and_recognizability_are_refused_where_they_cannot_be_found(trained, faces, tmp_path):
    with pytest.raises(InputError, match="--resolutions 113: must be pixels from 1 to 112"):
        evaluate(trained / "model.pt", [faces / "synth.bin"], resolutions=[7, 113])
    with pytest.raises(InputError, match="--resolutions and --quality: are for .bin sets"):
        evaluate(trained / "model.pt", [write_tinyface(tmp_path / "tinyface")], quality=True)
    images = VerificationSet(faces / "synth.bin").images
    for same, found in ([True] + [False] * 9, "1 same and 9 different"), ([False] * 10, "0 same and 10 different"):
        save_bin(tmp_path / "few.bin", images[:20], same)
        with pytest.raises(VerificationSetError, match=f"few.bin: {found} pairs: the error-reject curve needs one same pair"):
            evaluate(trained / "model.pt", [tmp_path / "few.bin"], quality=True)


def test_a_picture_that_cannot_be_drawn_is_refused_before_the_evaluation(faces, tmp_path, capsys):
    for path, problem in (("given/roc.png", "Its folder cannot be made, because .*given is not a folder: '.*roc.png'"),
                          ("roc.xyz", "roc.xyz: unknown picture format 'xyz': name a file that ends with .png")):
        (tmp_path / "given").touch()
        for command in (["evaluate", "no model", str(faces / "synth.bin")], ["index", "no pack"], ["plan", "no pack"]):
            with pytest.raises(SystemExit, match=problem):
                cli([*command, "--plot", str(tmp_path / path)])


def test_a_set_whose_name_has_a_line_end_takes_one_line(trained, faces, tmp_path, capsys):
    odd = tmp_path / "a\nb.bin"
    odd.write_bytes((faces / "synth.bin").read_bytes())
    cli(["evaluate", str(trained / "model.pt"), str(odd)])
    assert capsys.readouterr().out.splitlines()[1].startswith(r"a\nb ")


def test_an_onnx_net_embeds_as_the_insightface_package_does(trained, faces):
    images = VerificationSet(faces / "synth.bin").faces(6)
    ours = embed(OnnxNet(trained / "model.onnx"), images)[:, 0].numpy()
    model = insightface.model_zoo.get_model(str(trained / "model.onnx"))
    theirs = model.get_feat([image[:, :, ::-1] for image in images.numpy()])  # it takes BGR
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def test_the_drawn_roc_has_the_corners_of_the_whole_one_and_few_points(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plotting, "save_figure", lambda figure, path: drawn.append(figure.axes[0].lines[0].get_xydata()))
    rng = np.random.default_rng(0)
    same = rng.random(5000) < 0.01
    scores = rng.normal(size=5000) + 2 * same
    plotting.draw_roc({"": {"net": (scores, same)}}, tmp_path / "roc.png")
    far, tar = drawn[0].T
    assert len(far) < 4 * same.sum()
    for at in (0.001, 0.01, 0.1, 0.5, 1.0):
        assert tar[np.flatnonzero(far <= at)[-1]] == pytest.approx(tar_at_far(scores, same, at))


def test_the_error_reject_curve_is_drawn_beside_the_roc_up_to_half_of_the_images(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plotting, "save_figure", lambda figure, path: drawn.extend(figure.axes))
    pairs = {name: (np.linspace(1, 0, 4), np.arange(4) < 2) for name in ("a", "b")}
    plotting.draw_roc({"ROC": pairs}, tmp_path / "roc.png", errors={"b": np.linspace(0.7, 0, 8)})
    roc, errors = drawn
    line, = errors.lines
    np.testing.assert_allclose(line.get_xydata(), [(k / 8, 0.7 - k / 10) for k in range(5)])
    assert len(roc.lines) == 2 and line.get_color() == roc.lines[1].get_color() != roc.lines[0].get_color()


def graph(path, *nodes, batch="N", shape=(3, 112, 112), out=("M", "D"), kind=TensorProto.FLOAT):
    """A small model of these nodes, from "x" to "y"."""
    initializers = [helper.make_tensor("half", onnx.TensorProto.FLOAT, [1], [127.5]),
                    helper.make_tensor("scale", onnx.TensorProto.FLOAT, [1], [1 / 127.5])]
    made = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", kind, [batch, *shape])],
                             [helper.make_tensor_value_info("y", kind, list(out))], initializers)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), str(path))
    return path


def test_protocols_on_two_ranks_give_the_figures_of_one_and_rank_0_prints_them(tmp_path, capsys):
    pool = helper.make_node("AveragePool", ["x"], ["a"], kernel_shape=[8, 8], strides=[8, 8])
    model = str(graph(tmp_path / "model.onnx", pool, helper.make_node("Flatten", ["a"], ["y"])))
    sets = [str(write_ijb(tmp_path / "IJBC")), str(write_tinyface(tmp_path / "tinyface"))]
    command = ["evaluate", model, *sets]
    cli([*command, "--json"])
    alone = json.loads(capsys.readouterr().out)
    assert [(each["set"], each["protocol"]) for each in alone] == [("IJBC", "IJB-C 1:1"), ("tinyface", "TinyFace 1:N")]
    launched = completed(*by_torchrun(2), "-m", "f2c_plugin", *command, "--json")
    assert json.loads(launched.stdout) == alone, launched.stderr

    cli([*command, "--plot", str(tmp_path / "roc.png")])
    head, ijb, _, other_head, tinyface = capsys.readouterr().out.splitlines()
    assert head.split()[:5] == ["protocol", "set", "images", "templates", "pairs"] and other_head.endswith("rank-20")
    assert ijb.split()[:3] == ["IJB-C", "1:1", "IJBC"] and ijb.count("not resolved") == 4
    assert tinyface.split()[:5] == ["TinyFace", "1:N", "tinyface", "16", "64"] and (tmp_path / "roc.png").is_file()
    with pytest.raises(SystemExit, match="meta/Probe is missing: TinyFace has .*; IJB-B has meta/ijbb_face_tid_mid.txt"):
        cli(["evaluate", model, str(tmp_path / "IJBC/meta")])
    with pytest.raises(SystemExit, match="--plot: draws the ROC of pairs, and TinyFace has none"):
        cli(["evaluate", str(tmp_path / "no model"), sets[1], "--plot", str(tmp_path / "other.png")])  # before any work


def evaluate_and_tell(rank, *arguments):
    try:
        cli(["evaluate", *arguments])
    except SystemExit as end:
        Path(f"rank_{rank}").write_text(str(end.code))


def test_where_an_image_is_damaged_each_rank_ends_with_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = graph(tmp_path / "model.onnx", helper.make_node("Flatten", ["x"], ["y"]))
    folder = write_tinyface(tmp_path / "tinyface")
    (folder / "Testing_Set/Gallery_Distractor/9.jpg").write_bytes(b"damaged")  # the last: rank 1 has it
    on_ranks(evaluate_and_tell, (str(model), str(folder)), 2)
    assert "9.jpg: cannot be used" in Path("rank_1").read_text()
    assert Path("rank_0").read_text() == ("f2c-plugin evaluate: rank 0 has embedded its images of "
                                          f"{folder}, but another rank has ended: see its error")


def test_a_model_that_normalises_pixels_itself_gets_pixels(tmp_path):
    flatten = helper.make_node("Flatten", ["x"], ["y"])
    own = (helper.make_node("Sub", ["x", "half"], ["a"]), helper.make_node("Mul", ["a", "scale"], ["b"]),
           helper.make_node("Flatten", ["b"], ["y"]))
    images = normalize_faces(torch.randint(0, 256, (3, 112, 112, 3), dtype=torch.uint8))
    plain, normalising = OnnxNet(graph(tmp_path / "a.onnx", flatten)), OnnxNet(graph(tmp_path / "b.onnx", *own))
    torch.testing.assert_close(plain(images), images.flatten(1))
    torch.testing.assert_close(normalising(images), images.flatten(1), rtol=0, atol=1e-5)
    for batch in 1, 2, 3, 4:  # the last one is filled up
        fixed = OnnxNet(graph(tmp_path / "c.onnx", flatten, batch=batch))
        torch.testing.assert_close(fixed(images), images.flatten(1))


def test_what_is_no_face_model_is_refused(trained, faces, tmp_path, capsys):
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ExportError, match="text.onnx: no ONNX model that can be run"):
        OnnxNet(tmp_path / "text.onnx")
    with pytest.raises(ExportError, match=r"takes x \['N', 1, 28, 28\], but a face model takes \(N, 3, 112, 112\)"):
        OnnxNet(graph(tmp_path / "a.onnx", helper.make_node("Flatten", ["x"], ["y"]), shape=(1, 28, 28)))
    with pytest.raises(ExportError, match=r"b.onnx: gives \(1, .* for 2 faces, but a face model gives a row for each"):
        OnnxNet(graph(tmp_path / "b.onnx", helper.make_node("Flatten", ["x"], ["y"], axis=0)))
    with pytest.raises(ExportError, match=r"c.onnx: takes x \['N', 3, 112, 112\] of tensor\(float16\), but .* of float32"):
        OnnxNet(graph(tmp_path / "c.onnx", helper.make_node("Flatten", ["x"], ["y"]), kind=TensorProto.FLOAT16))
    fails = (helper.make_node("AveragePool", ["x"], ["a"], kernel_shape=[200, 200]), helper.make_node("Flatten", ["a"], ["y"]))
    with pytest.raises(ExportError, match=r"d.onnx: fails for \(2, 3, 112, 112\), but a face model takes \(N, 3, 112, 112\): "):
        OnnxNet(graph(tmp_path / "d.onnx", *fails, shape=("C", "H", "W")))
    for write in write_yunet, write_scrfd:
        write(tmp_path / "detector.onnx")
        with pytest.raises(ExportError, match=r"detector.onnx: .* a face model (takes|gives)"):
            OnnxNet(tmp_path / "detector.onnx")
    with pytest.raises(ExportError, match="nowhere.onnx: no such file"):
        evaluate(tmp_path / "nowhere.onnx", [faces / "synth.bin"])
    with pytest.raises(InputError, match="--net gallery: only checkpoints"):
        evaluate(trained / "model.onnx", [faces / "synth.bin"], "gallery")
    with pytest.raises(SystemExit, match="f2c-plugin evaluate: .*none.bin"):
        cli(["evaluate", str(trained / "model.pt"), str(tmp_path / "none.bin")])


def test_embeddings_that_are_not_finite_are_no_result(faces, monkeypatch):
    class Broken(nn.Module):
        def forward(self, images):
            return torch.full((len(images), 4), torch.nan)
    monkeypatch.setattr("f2c_plugin.tools.evaluate.load_model", lambda *_: Broken())
    with pytest.raises(F2CError, match="model.pt: its embeddings of .*synth.bin are not finite"):
        evaluate(Path("model.pt"), [faces / "synth.bin"])
    assert table([])


def test_embeddings_that_are_all_0_or_all_the_same_are_no_result_and_some_that_are_0_are_told(faces, tmp_path, monkeypatch):
    class Net(nn.Module):
        def __init__(self, give):
            super().__init__()
            self.forward = give
    nothing = Net(lambda images: torch.zeros(len(images), 4))
    one = Net(lambda images: images.new_tensor([1, 2, 3, 4]) * images.mean((1, 2, 3))[:, None].abs())  # of other norms
    some = Net(lambda images: images[:, :, ::28, ::28].flatten(1) * (images.mean((1, 2, 3)) > 0)[:, None])
    for each in faces / "synth.bin", write_tinyface(tmp_path / "tinyface"), write_ijb(tmp_path / "IJBC"):
        for net, message in (nothing, f"all its embeddings of {each} are 0"), (one, f"of all images of {each} are the"):
            monkeypatch.setattr("f2c_plugin.tools.evaluate.load_model", lambda *_, net=net: net)
            with pytest.raises(F2CError, match=f"model.pt: .*{message}"):
                evaluate(Path("model.pt"), [each])
        monkeypatch.setattr("f2c_plugin.tools.evaluate.load_model", lambda *_: some)
        found, = evaluate(Path("model.pt"), [each])
        assert found.summary()["zero_embeddings"] == found.zero > 0
        assert table([found]).endswith(f"\n\n{each.stem}: {found.zero} embeddings are 0, and have a cosine of 0 to all others")


def test_what_is_no_set_is_told_what_one_is_and_a_damaged_one_before_others_are_evaluated(trained, faces, tmp_path):
    with pytest.raises(SystemExit, match="model.pt: .*; a set is a .bin file, as f2c-plugin verification-set writes"):
        cli(["evaluate", str(trained / "model.pt"), str(trained / "model.pt")])
    whole = VerificationSet(faces / "synth.bin")
    save_bin(tmp_path / "damaged.bin", [*whole.images[:-1], b"damaged"], whole.same.tolist())
    with pytest.raises(VerificationSetError, match="damaged.bin: image 119 cannot be used"):
        evaluate(tmp_path / "no model", [faces / "synth.bin", tmp_path / "damaged.bin"])
