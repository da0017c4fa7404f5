"""Backbones of other packages: what is trained with them, which net a file is of, and what is said of broken ones."""

from pathlib import Path

import pytest
import torch

from f2c_plugin.cli import main as cli
from f2c_plugin.config_files import load_config
from f2c_plugin.errors import BrokenPlugin, ConfigError, ExportError
from f2c_plugin.evaluation.onnx_export import export_checked, load_net
from f2c_plugin.evaluation.verification import embed
from f2c_plugin.models import get_model, get_model_on_meta
from f2c_plugin.tools.net_costs import count
from f2c_plugin.trainer.check import check
from f2c_plugin.trainer.output import write_states
from tests.runs import refusal, run

CODE = """
import torch
from torch import nn

CONSTANT = torch.ones(3)

class Net(nn.Module):
    def __init__(self, size, activation=torch.relu, last=nn.BatchNorm1d):
        super().__init__()
        self.activation = activation
        self.conv, self.fc, self.last = nn.Conv2d(3, 4, 7, stride=16), nn.Linear(196, size), last(size)

    def forward(self, x):
        return self.last(self.fc(self.activation(self.conv(x)).flatten(1)))

class Two(Net):
    def forward(self, x):
        return super().forward(x), 1

class Map(Net):
    def forward(self, x):
        return self.conv(x)

class First(Net):
    def forward(self, x):
        return super().forward(x)[:1]

class Fixed(Net):
    def forward(self, x):
        return super().forward(x).reshape(int(x.shape[0]), -1)

class Raising(Net):
    def forward(self, x):
        raise ValueError("needs a licence")

def relu(dropout, fp16, num_features): return Net(num_features)
def tanh(dropout, fp16, num_features): return Net(num_features, torch.tanh)
def plain(dropout, fp16, num_features): return Net(num_features, last=nn.Identity)
def more(dropout, fp16, num_features): return Net(num_features + 3)
def two(dropout, fp16, num_features): return Two(num_features)
def map_(dropout, fp16, num_features): return Map(num_features)
def first(dropout, fp16, num_features): return First(num_features)
def fixed(dropout, fp16, num_features): return Fixed(num_features)
def raising(dropout, fp16, num_features): return Raising(num_features)
def values(dropout, fp16, num_features):
    net = Net(num_features)
    net.rates = [x.item() * c.item() for x, c in zip(torch.linspace(0, 0.1, 3), CONSTANT)]
    return net
def only_features(num_features): return Net(num_features)
def none(dropout, fp16, num_features): return None
def failing(dropout, fp16, num_features): raise RuntimeError("no weights")
"""
BROKEN = {"bad": ("broken_nets:make", "RuntimeError: licence file missing"),
          "unknown": ("none_such:make", "ModuleNotFoundError"),
          "lacking": ("json:make", "AttributeError: module 'json' has no attribute 'make'"),
          "failing": ("mine_nets:failing", "RuntimeError: no weights"),
          "features": ("mine_nets:only_features", "TypeError: .*dropout"),
          "nothing": ("mine_nets:none", "it returns a NoneType, but must return a torch.nn.Module")}


@pytest.fixture
def nets(install_backbones):
    return lambda *names: install_backbones("mine", CODE, {name: name for name in names})


@pytest.fixture
def broken(install_backbones, nets):
    nets("relu")
    entries = {name: where for name, (where, _) in BROKEN.items()}
    install_backbones("broken", "raise RuntimeError('licence file missing')", entries)


@pytest.fixture
def keys(few_faces):
    return few_faces | dict(num_epoch=1)


@pytest.mark.parametrize("head", [dict(), dict(f2c_recipe="paper"), dict(head="softmax")], ids=str)
@pytest.mark.parametrize("name", ["plain", "values", "two"])
def test_nets_without_buffers_with_values_or_with_tuples_are_trained_and_exported(nets, config, faces, capsys, name, head):
    nets(name)
    run(config(**head, network=name, num_epoch=1))
    cli(["export", "out/model.pt", "again.onnx"])
    assert "32-dimensional" in capsys.readouterr().out
    assert Path("again.onnx").read_bytes() == Path("out/model.onnx").read_bytes()
    cli(["evaluate", "out/model.pt", f"{faces}/synth.bin"])
    cli(["evaluate", "out/model.onnx", f"{faces}/synth.bin"])
    one, other = (line.split("synth")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("synth"))
    assert one.split()[:3] == other.split()[:3]


def test_a_net_that_needs_values_is_counted_as_one_that_does_not(nets):
    nets("relu", "values")
    assert count("values", 24, 4, fp16=True) == count("relu", 24, 4, fp16=True)
    torch.manual_seed(0)
    assert all(value.is_meta for value in get_model_on_meta("values").state_dict().values())
    assert torch.initial_seed() == 0 and torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("name, problem", [
    ("map_", "the backbone returns a tensor of shape .*: F²C needs embeddings"),
    ("raising", "cannot embed faces: ValueError: needs a licence"),
    ("first", r"gives embeddings \(1, 32\) of 2 faces, but must give \(2, 32\)"),
    ("more", r"gives embeddings \(2, 35\) of 2 faces, but must give \(2, 32\): set embedding_size"),
    ("fixed", r"the export gives \(1, 64\) for 2 faces: its graph is fixed to the one face")])
def test_a_net_that_cannot_be_exported_is_refused_before_its_training(nets, config, keys, name, problem):
    nets(name)
    with pytest.raises(ConfigError, match=f"network='{name}': mine_nets:{name} of the package mine 1.0: .*{problem}"):
        check(load_config(config(**keys, network=name)))
    if name == "fixed":
        with pytest.raises(ExportError, match=r"model.onnx: not written: the export gives \(1, 192\) for 8 faces: its graph"):
            export_checked(get_model(name, 24), "model.onnx")


def test_a_model_whose_weights_fit_nets_of_other_packages_is_taken_for_none_of_them(nets, config, keys, faces):
    nets("relu", "tanh")
    run(config(**keys, network="tanh", save_all_states=True))
    model, pairs = "out/model.pt", f"{faces}/synth.bin"
    several = f"{model}: its weights fit relu and tanh, .*: give a checkpoint .*, --network NAME, to f2c-plugin export"
    for command in ["export", model, "model.onnx"], ["evaluate", model, pairs], ["thin", str(faces), model, "thinned"]:
        with pytest.raises(SystemExit, match=several):
            cli(command)
    assert f"f2c_teacher: {model}: its weights fit" in refusal(config(**keys, f2c_teacher=model, output="student"))
    checkpoint = str(max(Path("out").glob("checkpoint_*.pt")))
    check(load_config(config(**keys, f2c_teacher=checkpoint, output="student")))
    images = torch.randint(0, 256, (2, 112, 112, 3), dtype=torch.uint8)
    expected = get_model("tanh", 32)
    expected.load_state_dict(load_net(model, network="tanh").state_dict())
    assert torch.equal(embed(load_net(checkpoint), images), embed(expected, images))
    assert not torch.allclose(embed(load_net(model, network="relu"), images), embed(expected, images))
    cli(["export", model, "model.onnx", "--network", "tanh"])
    assert Path("model.onnx").read_bytes() == Path("out/model.onnx").read_bytes()
    cli(["evaluate", model, pairs, "--network", "relu"])
    for name, problem in (("small", "its weights do not fit small: .* only in one of both"),
                          ("none", "network='none': must be one")):
        with pytest.raises(SystemExit, match=f"{model}: {problem}"):
            cli(["evaluate", model, pairs, "--network", name])
    with pytest.raises(SystemExit, match="--network tanh: an ONNX file holds its net"):
        cli(["evaluate", "model.onnx", pairs, "--network", "tanh"])


def test_a_checkpoint_of_a_net_that_is_gone_names_it(nets, config, keys, monkeypatch):
    site = nets("tanh")
    run(config(**keys, network="tanh", save_all_states=True))
    monkeypatch.setattr("sys.path", [each for each in __import__("sys").path if each != str(site)])
    with pytest.raises(ExportError, match="is of a training with network='tanh', which is not installed here"):
        load_net(max(Path("out").glob("checkpoint_*.pt")))


def test_own_nets_of_the_same_shapes_are_taken_for_each_other_and_for_no_other_packages(nets, shorts, tmp_path):
    write_states(get_model("vit_64_mask0", 24).state_dict(), tmp_path / "model.pt")
    assert load_net(tmp_path / "model.pt").mask_ratio == 0.1  # in training alone


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_package_is_named_with_its_entry_point_and_the_cause(broken, config, keys, name):
    where, cause = BROKEN[name]
    problem = (f"network='{name}': {where} of the package broken 1.0 cannot be used: {cause}.*: upgrade or uninstall that "
               "package, or set another network")
    for build in get_model, get_model_on_meta:
        with pytest.raises(BrokenPlugin, match=problem):
            build(name)
    with pytest.raises(ConfigError, match=problem):
        check(load_config(config(**keys, network=name)))
    with pytest.raises(SystemExit, match=problem):
        cli(["plan", "--identities", "100000", "--network", name])


def test_a_broken_package_is_left_out_where_the_net_of_a_file_is_found(broken, tmp_path):
    write_states(get_model("tiny", 24).state_dict(), tmp_path / "model.pt")
    assert type(load_net(tmp_path / "model.pt")).__name__ == "PlainNet"
    write_states({"weight": torch.ones(3)}, tmp_path / "model.pt")
    with pytest.raises(ExportError, match="fit none of the nets r18, .*; left out: network='bad': broken_nets:make of"):
        load_net(tmp_path / "model.pt")


def test_doctor_finds_broken_backbones_and_those_that_another_net_hides(broken, install_backbones, capsys):
    install_backbones("hiding", CODE, {"r18": "relu"})
    with pytest.raises(SystemExit):
        cli(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    found = {line[2:24].strip(): (line[0], line[25:]) for line in lines}
    assert found["relu"] == (" ", "found, mine_nets:relu of the package mine 1.0 in arcface_torch.backbones")
    for name, (where, _) in BROKEN.items():
        assert found[name][0] == "!" and f"{where} of the package broken 1.0 cannot be used" in found[name][1]
    assert found["r18"] == ("!", "hiding_nets:relu of the package hiding 1.0 is hidden by this package's own net of that name: "
                                 "it needs another name in arcface_torch.backbones")
    assert "mbf" not in found and "mixfacenet_s" not in found
