"""Vision transformers: what they compute, what is random in training, and all that is done with a trained one."""

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from f2c_plugin.config_files import load_config
from f2c_plugin.errors import ConfigError, ExportError
from f2c_plugin.evaluation.onnx_export import export_checked, load_net
from f2c_plugin.method.gallery import GalleryNet
from f2c_plugin.models import get_model, get_model_on_meta
from f2c_plugin.models.vit import VisionTransformer
from f2c_plugin.trainer.build import wrap
from f2c_plugin.trainer.check import check
from f2c_plugin.trainer.output import write_states
from f2c_plugin.trainer.rendezvous import process_group
from tests.reference.vit import slow_embeddings
from tests.runs import on_ranks, refusal, run

IMAGES = torch.randn(4, 3, 112, 112, generator=torch.Generator().manual_seed(0))
NAMES = ["vit_t", "vit_t_dp005_mask0", "vit_s", "vit_s_dp005_mask_0", "vit_b", "vit_b_dp005_mask_005",
         "vit_l_dp005_mask_005", "vit_h"]


def short(dim=64, drop_path=0.0, mask_ratio=0.0, **keys):
    """Two blocks, with weights that are far from their initial values."""
    torch.manual_seed(1)
    net = VisionTransformer(dim, 2, drop_path, mask_ratio, 24, **keys)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                value += 0.3 * torch.randn_like(value) if not name.endswith("running_var") else torch.rand_like(value)
    return net


@pytest.mark.parametrize("heads", [2, 8])
def test_embeddings_are_those_of_the_paper(heads):
    net = short(drop_path=0.5, mask_ratio=0.5, heads=heads).eval()
    with torch.no_grad():
        torch.testing.assert_close(net(IMAGES).double(), slow_embeddings(net.state_dict(), IMAGES, heads), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_in_training_do_not_see_masked_patches(checkpointing):
    net = short(mask_ratio=0.25, checkpointing=checkpointing)
    net.feature.eval()
    torch.manual_seed(5)
    embeddings = net(IMAGES)
    torch.manual_seed(5)
    seen = torch.rand(4, 144).argsort(1)[:, :108].tolist()
    state = {name: value.detach() for name, value in net.state_dict().items()}
    torch.testing.assert_close(embeddings.double(), slow_embeddings(state, IMAGES, 8, seen), rtol=1e-3, atol=1e-3)


def test_a_block_leaves_out_either_branch_of_some_images_and_scales_those_of_others():
    net = short(drop_path=0.4)
    assert [block.drop_path for block in net.blocks] == [0, 0.4]
    block, tokens = net.blocks[1], torch.randn(400, 3, 64)
    with torch.no_grad():
        attention = block.attn(block.norm1(tokens))
        block.mlp = nn.Sequential(nn.LayerNorm(64), nn.Threshold(1e9, 1))  # 1 everywhere
        change = block(tokens) - tokens
    kinds = [torch.isclose(change, attention * first / 0.6 + second / 0.6, atol=1e-5).flatten(1).all(1)
             for first in (0, 1) for second in (0, 1)]
    assert torch.stack(kinds).sum(0).eq(1).all()
    for kind, share in zip(kinds, (0.16, 0.24, 0.24, 0.36), strict=True):
        assert kind.float().mean() == pytest.approx(share, abs=0.08)


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in False, True:
        net = short(drop_path=0.5, mask_ratio=0.1, checkpointing=checkpointing)
        torch.manual_seed(2)
        net(IMAGES)[:, 0].exp().sum().backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("fp16", [False, True])
def test_steps_lower_the_loss(fp16):
    torch.manual_seed(3)
    net = VisionTransformer(64, 2, 0.1, 0.1, 4, fp16).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    losses = []
    for _ in range(6):
        losses.append(nn.functional.cross_entropy(net(IMAGES.contiguous(memory_format=torch.channels_last)), torch.arange(4)))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2


def test_the_gallery_net_drops_and_masks_nothing():
    gallery = GalleryNet(short(drop_path=0.5, mask_ratio=0.5))
    gallery(IMAGES)
    assert torch.equal(gallery(IMAGES), gallery(IMAGES))


@pytest.mark.parametrize("name", NAMES)
def test_nets_have_the_settings_that_their_names_have_in_arcface_torch(name):
    net = get_model_on_meta(name)
    dim, depth = {"t": (256, 12), "s": (512, 12), "b": (512, 24), "l": (768, 24), "h": (1024, 48)}[name[4]]
    assert net.pos_embed.shape == (1, 144, dim) and len(net.blocks) == depth and net.checkpointing == (depth >= 24)
    assert net.blocks[-1].drop_path == (0.05 if "dp005" in name else 0.1)
    # arcface_torch masks a tenth in the two of mask_005, too: of their mask_ratio it reads only that it is above 0.
    assert net.mask_ratio == (0 if name.endswith(("mask0", "mask_0", "vit_h")) else 0.1)


def ddp_step(rank, folder):
    with process_group():
        for mask_ratio in 0.0, 0.1:
            net = short(drop_path=0.1, mask_ratio=mask_ratio, checkpointing=True).to(memory_format=torch.channels_last)
            wrapped = wrap(net)
            for _ in range(2):  # a gradient that is missing shows in the second
                wrapped(IMAGES[2 * rank:2 * rank + 2])[:, 0].exp().sum().backward()
            torch.save({name: value.grad for name, value in net.named_parameters()}, f"{folder}/{mask_ratio}_{rank}.pt")


def test_two_ranks_have_the_same_gradients_with_masks_and_without(tmp_path):
    on_ranks(ddp_step, (tmp_path,), 2)
    for mask_ratio in 0.0, 0.1:
        one, other = (torch.load(tmp_path / f"{mask_ratio}_{rank}.pt") for rank in (0, 1))
        assert {name for name, gradient in one.items() if gradient is None} == ({"mask_token"} if not mask_ratio else set())
        assert all(torch.equal(one[name], other[name]) for name in one if one[name] is not None)


def test_a_training_starts_from_a_pretrained_one(shorts, config, caplog):
    caplog.set_level(logging.INFO)
    write_states(get_model("vit_64", 32).state_dict(), Path("pretrained.pt"))
    run(config(network="vit_64_mask0", f2c_init="pretrained.pt", num_epoch=1))
    assert "f2c_init='pretrained.pt': taken: backbone (40 tensors)" in caplog.text
    problem = refusal(config(network="vit_32", f2c_init="pretrained.pt", output="another"))
    assert "f2c_init='pretrained.pt': does not fit network='vit_32'" in problem


def test_nets_of_the_same_parameters_are_told_apart_by_their_shapes(shorts, tmp_path):
    for name in "vit_64", "vit_32":
        write_states(get_model(name, 24).state_dict(), tmp_path / "model.pt")
        assert load_net(tmp_path / "model.pt").pos_embed.shape == (1, 144, int(name[4:]))
    write_states(short().state_dict() | {"norm.bias": torch.zeros(3)}, tmp_path / "model.pt")
    with pytest.raises(ExportError, match="its weights do not fit vit_64: norm.bias of other shapes"):
        load_net(tmp_path / "model.pt")


def test_a_net_too_large_for_an_onnx_file_is_refused_before_it_is_trained_or_exported(config, tmp_path):
    for name, size in ("vit_h", "2.8"), ("r2060", "4.[12]"):
        problem = f"its weights take {size} GiB, and an ONNX file holds less than 2 GiB: choose a smaller net"
        with pytest.raises(ConfigError, match=f"network='{name}': {problem}"):
            check(load_config(config(network=name)))
        with pytest.raises(ExportError, match=f"model.onnx: not written: {problem}"):
            export_checked(get_model_on_meta(name), tmp_path / "model.onnx")
