"""Backbones by name: those here, and those of other packages."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from f2c_plugin.cli import main as cli
from f2c_plugin.data.dataset import normalize_faces
from f2c_plugin.errors import ConfigError, ExportError
from f2c_plugin.evaluation.onnx_export import ONNX_BYTES, export_checked, load_net
from f2c_plugin.models import NETWORKS, TOO_LARGE, get_model, get_model_on_meta, networks
from f2c_plugin.models.iresnet import IResNet
from f2c_plugin.trainer.output import write_states
from tests.models.light import LIGHT, PUBLISHED, parameters_and_operations
from tests.runs import history, run


@pytest.mark.parametrize("name, millions", [("r18", 24.0), ("r50", 43.6), ("r100", 65.2), ("mbf", 2.06), ("mbf_large", 6.31),
                                            ("vit_t", 19.14), ("vit_s", 76.02), ("vit_b", 113.8),
                                            ("vit_l_dp005_mask_005", 255.7), ("vit_h", 756.4),
                                            ("r2060", 1123.2)])  # counted in its nets
def test_nets_have_as_many_parameters_as_those_of_arcface_torch(name, millions):
    count = sum(parameter.numel() for parameter in get_model_on_meta(name).parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.005)


def test_nets_that_are_too_large_for_an_onnx_file_are_listed():
    sizes = {name: sum(each.nbytes for each in get_model_on_meta(name).state_dict().values()) for name in NETWORKS}
    assert {name for name, size in sizes.items() if size >= ONNX_BYTES} == {*TOO_LARGE}


def test_activations_that_are_computed_again_change_no_gradient():
    gradients = []
    for segments in None, (2, 3):
        torch.manual_seed(0)
        net = IResNet((1, 3, 4, 1), 8, segments=segments)
        net(torch.randn(2, 3, 112, 112))[:, 0].exp().sum().backward()
        gradients.append([each.grad for each in net.parameters() if each.requires_grad])
        assert net.eval()(torch.zeros(1, 3, 112, 112)).isfinite().all()
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", LIGHT)
def test_light_nets_have_the_parameters_and_operations_of_their_papers(name):
    millions, counted, mflops = PUBLISHED[name]
    parameters, operations = parameters_and_operations(name, counted)
    assert (f"{parameters / 1e6:.2f}", f"{operations / 1e6:.1f}") == (millions, mflops)


def test_vargfacenet_is_of_the_size_and_its_embedding_of_the_bytes_in_its_paper():
    with torch.device("meta"):
        net = get_model("vargfacenet")
    assert 19.5 < sum(each.nbytes for each in net.parameters()) / 2**20 < 20
    weights = [each.weight for each in net.embedding.modules() if isinstance(each, (torch.nn.Conv2d, torch.nn.Linear))]
    assert f"{sum(each.nbytes for each in weights) / 2**20:.2f}" == "5.78"


@pytest.mark.parametrize("name", LIGHT)
def test_a_light_net_embeds_alike_in_either_memory_format(name):
    torch.manual_seed(0)
    net, images = get_model(name, 24), torch.randn(4, 3, 112, 112)
    embeddings = net(images)
    embeddings[:, 0].exp().sum().backward()
    first = next(net.parameters())
    gradient, first.grad = first.grad, None
    net.to(memory_format=torch.channels_last)
    again = net(images.contiguous(memory_format=torch.channels_last))
    again[:, 0].exp().sum().backward()
    torch.testing.assert_close(again, embeddings, rtol=1e-3, atol=1e-3)
    assert torch.nn.functional.cosine_similarity(first.grad.flatten(), gradient.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("name", ["mbf", "mbf_large", "vit_t", "vit_t_dp005_mask0", "tiny", *LIGHT])
@pytest.mark.parametrize("fp16", [False, True])
def test_a_net_embeds_a_batch_in_float32(name, fp16):
    net = get_model(name, 24, fp16)
    embeddings = net(torch.randn(3, 3, 112, 112))
    assert embeddings.shape == (3, 24) and embeddings.dtype == torch.float32
    embeddings.sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters() if parameter.requires_grad)


def test_a_net_is_found_without_pytorchs_compiler(tmp_path):
    """Its import takes longer than that of the rest of PyTorch."""
    write_states(get_model("tiny", 8).state_dict(), tmp_path / "model.pt")  # the last of the nets that are tried
    script = ("import sys; from f2c_plugin.evaluation.onnx_export import load_net;"
              "print(load_net(sys.argv[1]).training, 'torch._dynamo' in sys.modules)")
    assert subprocess.check_output([sys.executable, "-c", script, tmp_path / "model.pt"]) == b"False False\n"


@pytest.mark.parametrize("name", ["mbf", "mbf_large"])
def test_a_mobile_net_is_loaded_and_exported_for_one_face_and_for_many(name, tmp_path):
    torch.manual_seed(0)
    net = get_model(name, 40)
    net(torch.randn(8, 3, 112, 112))  # running statistics
    write_states(net.state_dict(), tmp_path / "model.pt")
    loaded = load_net(tmp_path / "model.pt")
    assert export_checked(loaded, tmp_path / "model.onnx") > 0.9999
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    images = torch.randn(3, 3, 112, 112)
    for some in images[:1], images:
        with torch.no_grad():
            np.testing.assert_allclose(session.run(None, {"data": some.numpy()})[0], loaded(some), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("keys", [dict(network="vit_64", f2c_recipe="paper", save_all_states=True),
                                  dict(network="vit_64_mask0", fp16=True, optimizer="adamw", lr=0.001),
                                  *(dict(network=name, save_all_states=True) for name in LIGHT)], ids=str)
def test_a_training_leaves_nets_for_the_insightface_package(shorts, few_faces, config, keys):
    model_zoo = pytest.importorskip("insightface.model_zoo", reason="NOT LOADED BY INSIGHTFACE: pip install insightface")
    if keys["network"] in LIGHT:
        keys = keys | few_faces
    run(config(**keys, num_epoch=1))
    exports = {"model.onnx": load_net("out/model.pt")}
    if "save_all_states" in keys:
        checkpoint = str(max(Path("out").glob("checkpoint_*.pt")))
        for which in ("probe", "gallery") if "f2c_recipe" in keys else ("probe",):
            cli(["export", checkpoint, f"out/{which}.onnx", "--net", which])
            exports[f"{which}.onnx"] = load_net(checkpoint, which)
    faces = np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3), np.uint8)  # RGB
    for name, net in exports.items():
        recognizer = model_zoo.get_model(f"out/{name}", providers=["CPUExecutionProvider"])
        with torch.no_grad():
            expected = net(normalize_faces(torch.from_numpy(faces))).numpy()
        for some in faces[:1], faces:
            embeddings = recognizer.get_feat([np.ascontiguousarray(face[:, :, ::-1]) for face in some])  # takes BGR
            np.testing.assert_allclose(embeddings, expected[:len(some)], rtol=1e-3, atol=1e-3)


def test_a_backbone_of_another_package_trains_and_is_loaded_and_exported(other_package, config):
    assert networks() == [*NETWORKS, "pixels"]
    report = run(config(network="pixels", num_epoch=1))
    assert report["network"] == "pixels" and "loss" in history()[0]
    assert type(load_net("out/model.pt")).__name__ == "Pixels"
    assert onnxruntime.InferenceSession("out/model.onnx").get_outputs()[0].shape[1] == 32


def test_an_unknown_network_names_those_there_are(other_package, tmp_path):
    with pytest.raises(ConfigError, match="network='r51': must be one of r18, r34, .* mbf, mbf_large, vit_t, .* small, tiny, "
                                          "pixels$") as refused:
        get_model("r51")
    assert "vit_h" not in str(refused.value) and "r2060" not in str(refused.value)  # which the training refuses
    write_states({"weight": torch.zeros(3)}, tmp_path / "model.pt")
    with pytest.raises(ExportError, match="its weights fit none of the nets r18, .*pixels"):
        load_net(tmp_path / "model.pt")
