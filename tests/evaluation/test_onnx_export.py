"""Exported nets: loaded from every kind of file, and used by the real insightface package."""

import resource
import sys

import numpy as np
import pytest
import torch

from f2c_plugin.cli import main as cli
from f2c_plugin.data.dataset import normalize_faces
from f2c_plugin.errors import ExportError
from f2c_plugin.evaluation.onnx_export import export_checked, load_net
from f2c_plugin.method.gallery import GalleryNet
from f2c_plugin.models import get_model


def trained(name="small", size=32):
    """A net whose BatchNorm statistics differ from the initial ones."""
    torch.manual_seed(0)
    net = get_model(name, size)
    for _ in range(2):
        net(torch.randn(4, 3, 112, 112))
    return net.eval()


@pytest.fixture
def files(tmp_path):
    """A model.pt, and checkpoints of the built-in trainer and arcface_torch with a different gallery net."""
    probe, other = trained(), get_model("small", 32)
    gallery = {"gallery." + name: value for name, value in GalleryNet(other).state_dict().items()}
    head = gallery | {"pool.clock": torch.tensor(3)}
    torch.save(probe.state_dict(), tmp_path / "model.pt")
    torch.save({"backbone": probe.state_dict(), "head": head}, tmp_path / "ours.pt")
    torch.save({"state_dict_backbone": probe.state_dict(), "state_dict_softmax_fc": head}, tmp_path / "theirs.pt")
    return tmp_path, probe, other


def assert_equal(net, expected):
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("name", ["model.pt", "ours.pt", "theirs.pt"])
def test_nets_are_found_in_every_kind_of_file(files, name):
    folder, probe, gallery = files
    assert_equal(load_net(folder / name), probe)
    if name != "model.pt":
        assert_equal(load_net(folder / name, "gallery"), gallery)


def test_what_holds_no_net_is_refused_and_nothing_is_written(files):
    folder, *_ = files
    with pytest.raises(ExportError, match="holds no gallery net: give a checkpoint of"):
        load_net(folder / "model.pt", "gallery")
    torch.save({"backbone": torch.load(folder / "model.pt"), "head": {"pool.clock": torch.tensor(3)}}, folder / "resident.pt")
    with pytest.raises(SystemExit, match="resident.pt: holds no gallery net, because its training had none: with the recipe "
                                         "'resident' .* f2c_forget_rate .*f2c_recipe='paper', head='dcq' or"):
        cli(["export", str(folder / "resident.pt"), str(folder / "model.onnx"), "--net", "gallery"])
    (folder / "text.pt").write_text("not a checkpoint")
    with pytest.raises(ExportError, match="text.pt: holds no net"):
        load_net(folder / "text.pt")
    torch.save({"weight": torch.zeros(3)}, folder / "other.pt")
    with pytest.raises(SystemExit, match="its weights fit none of the nets r18"):
        cli(["export", str(folder / "other.pt"), str(folder / "model.onnx")])
    with pytest.raises(SystemExit, match="is the trained model itself"):
        cli(["export", str(folder / "model.pt"), str(folder / "." / "model.pt")])
    for content in {"backbone": [1, 2]}, {"head": torch.zeros(3)}, {"backbone": {"features.weight": 5}}:
        torch.save(content, folder / "other.pt")
        for which in "probe", "gallery":
            with pytest.raises(ExportError, match="other.pt"):
                load_net(folder / "other.pt", which)
    with pytest.raises(SystemExit, match="missing.pt"):
        cli(["export", str(folder / "missing.pt"), str(folder / "model.onnx")])
    assert not list(folder.glob("*.onnx*"))


CRAFTED = {
    "a weight that is a number": {"features.weight": 5}, "one that is a string": {"fc.bias": "a"},
    "one without dimensions": {"features.weight": torch.tensor(1.0)}, "one of another shape": {"fc.bias": torch.ones(1, 32)},
    "a net of many gigabytes": {"features.weight": torch.ones(1 << 24, dtype=torch.int8)},
}


@pytest.mark.parametrize("name", CRAFTED)
def test_weights_that_do_not_fit_are_refused_before_a_net_is_built(files, name):
    folder, probe, _ = files
    torch.save(probe.state_dict() | CRAFTED[name], folder / "model.pt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SystemExit, match="model.pt: its weights do not fit small: .* of other shapes"):
        cli(["export", str(folder / "model.pt"), str(folder / "model.onnx")])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2e5 and not list(folder.glob("*.onnx*"))


def test_versions_of_modules_that_are_none_and_names_that_are_numbers_are_refused(files):
    folder, probe, _ = files
    state = probe.state_dict()
    state._metadata["features"] = 5
    torch.save(state, folder / "model.pt")
    with pytest.raises(ExportError, match="model.pt: its weights do not fit small"):
        load_net(folder / "model.pt")
    torch.save({"backbone": probe.state_dict(), "head": {5: torch.ones(1)}}, folder / "ours.pt")
    with pytest.raises(ExportError, match="ours.pt: holds no gallery net"):
        load_net(folder / "ours.pt", "gallery")


@pytest.mark.parametrize("name", ["small", "r18"])
def test_the_insightface_package_loads_the_export_and_embeds_as_pytorch_does(tmp_path, name):
    model_zoo = pytest.importorskip("insightface.model_zoo", reason="NOT LOADED BY INSIGHTFACE: pip install insightface")
    net = trained(name, 64)
    torch.save(net.state_dict(), tmp_path / "model.pt")
    cli(["export", str(tmp_path / "model.pt"), str(tmp_path / "model.onnx")])
    recognizer = model_zoo.get_model(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert recognizer.taskname == "recognition" and recognizer.input_size == (112, 112)

    faces = np.random.default_rng(0).integers(0, 256, (5, 112, 112, 3), np.uint8)  # RGB
    embeddings = recognizer.get_feat([np.ascontiguousarray(face[:, :, ::-1]) for face in faces])  # takes BGR
    with torch.no_grad():
        expected = net(normalize_faces(torch.from_numpy(faces))).numpy()
    cosine = (embeddings * expected).sum(1) / np.linalg.norm(embeddings, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosine.min() > 0.9999


def test_a_net_that_is_not_finite_is_not_exported(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"of before")
    for spoil, found in [("fc.bias", "fc.bias"), ("features.running_var", "features.running_var"),
                         ("fc.weight", "its embeddings")]:
        net = trained()
        net.state_dict()[spoil].fill_(3e38 if found == "its embeddings" else torch.nan)
        torch.save(net.state_dict(), tmp_path / "model.pt")
        with pytest.raises(SystemExit, match=f"model.onnx: not written, because the net is not finite: {found}: export"):
            cli(["export", str(tmp_path / "model.pt"), str(tmp_path / "model.onnx")])
    assert (tmp_path / "model.onnx").read_bytes() == b"of before" and len(list(tmp_path.iterdir())) == 2


def test_without_onnxruntime_the_export_is_not_compared(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert export_checked(trained(), tmp_path / "model.onnx") is None and (tmp_path / "model.onnx").is_file()
    assert "is not compared with PyTorch: onnxruntime cannot be imported" in caplog.text
