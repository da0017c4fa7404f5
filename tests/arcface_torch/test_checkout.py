"""The real arcface_torch, patched, run under torchrun on CPU over gloo.

Needs a checkout: ARCFACE_TORCH, or `f2c-plugin fetch-host`.
"""

import filecmp
import math
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from f2c_plugin.arcface_torch import patching
from f2c_plugin.cli import main as cli
from f2c_plugin.models import get_model
from f2c_plugin.synthetic.dataset import write_dataset
from f2c_plugin.tools.report import Run
from tests.arcface_torch.killed import die_at_change, tree
from tests.models.light import LIGHT
from tests.runs import by_torchrun, completed
from tests.test_tutorial import BLOCKS
from tests.trainer.test_checkpoint import equal

pytestmark = pytest.mark.host

# (identities, images per identity). With few identities the published recipe learns within 40 steps.
FEW, MORE = (8, 40), (40, 8)


@pytest.fixture(scope="session")
def packs(tmp_path_factory):
    """Folders of packs by size."""
    folders = {size: tmp_path_factory.mktemp("pack") for size in (FEW, MORE)}
    for (identities, images), folder in folders.items():
        write_dataset(folder, identities, images, num_pairs=40, seed=3)
    return folders


@pytest.fixture(scope="session")
def patched(checkout, tmp_path_factory):
    """A copy of the checkout with the plugin installed by the command."""
    copy = tmp_path_factory.mktemp("checkout") / "arcface_torch"
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns("__pycache__", ".git"))
    cli(["install", str(copy)])
    return copy


def write_config(folder, name, packs, size, **keys):
    """Write a config of arcface_torch: the defaults of base.py, the pack of that size, and ``keys``."""
    identities, images = size
    lines = ["from easydict import EasyDict as edict", "config = edict()"]
    keys = dict(network="mbf", output=f"work_dirs/{name}", embedding_size=64, batch_size=8, lr=0.05, num_workers=1,
                rec=str(packs[size]), num_classes=identities, num_image=identities * images, num_epoch=2, warmup_epoch=0,
                val_targets=["synth"], verbose=15, frequent=2, save_all_states=True,
                margin_list=(1.0, 0.0, 0.4)) | keys
    lines += [f"config.{key} = {value!r}" for key, value in keys.items()]
    (folder / "configs" / f"{name}.py").write_text("\n".join(lines) + "\n")


def run(folder, name, ranks=2):
    """Run arcface_torch's own command. Returns its log."""
    done = completed(*by_torchrun(ranks), "train_v2.py", f"configs/{name}", cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return (folder / "work_dirs" / name / "training.log").read_text()


def losses(log):
    return [float(value) for value in re.findall(r"Loss (\S+)", log)]


def assert_trained(log, folder, name, ranks=2):
    values = losses(log)
    assert len(values) >= 10 and all(map(math.isfinite, values))
    # 40 steps barely lower the loss of F²C, but its monitor shows that probes approach their slots.
    values = [-float(value) for value in re.findall(r"positive cosine (-?\d\.\d+)", log)] or values
    third = len(values) // 3
    assert sum(values[-third:]) < sum(values[:third])
    assert re.search(r"\[synth\]\[\d+\]Accuracy-Flip: 0\.\d+", log)
    return [torch.load(folder / "work_dirs" / name / f"checkpoint_gpu_{rank}.pt") for rank in range(ranks)]


def test_f2c_trains_verifies_saves_and_resumes_with_the_pool_as_it_was(patched, packs):
    # As published: under the ramp the loss grows because its scale does.
    keys = dict(head="f2c_dcp", f2c_pool_rate=1.0, f2c_recipe="paper", f2c_momentum=0.9)
    write_config(patched, "f2c", packs, FEW, **keys, f2c_export="best")
    log = run(patched, "f2c")
    assert re.search(r"model.pt is the (probe|gallery) net", log)
    assert len(re.findall(r"F²C step \d+: pool fill \d\.\d+  pool hit rate", log)) == 20  # rank 0, every config.frequent steps
    rank_0, rank_1 = assert_trained(log, patched, "f2c")
    of_run = Run.read(patched / "work_dirs" / "f2c")
    assert len(of_run.series("loss")) >= 10 and len(of_run.series("f2c/positive_cosine")) == 20
    assert [len(of_run.series(f"synth/{which}accuracy")) for which in ("", "gallery_")] == [3, 3]  # at steps 15, 30 and 40
    assert of_run.scores.keys() == {"synth", "gallery_synth"}
    assert of_run.config["f2c_recipe"] == "paper"
    assert of_run.history[-1]["images"] == 40 * 8 * 2
    for name, value in rank_0["state_dict_softmax_fc"].items():
        if name.startswith("pool."):
            assert torch.equal(value, rank_1["state_dict_softmax_fc"][name]), name
    assert rank_0["state_dict_softmax_fc"]["pool.slot_identity"].min() >= 0

    write_config(patched, "f2c", packs, FEW, **keys, resume=True, num_epoch=3, f2c_export="gallery")
    run(patched, "f2c")
    output = patched / "work_dirs" / "f2c"
    resumed = torch.load(output / "checkpoint_gpu_0.pt")
    gallery = {name.removeprefix("gallery.net."): value for name, value in resumed["state_dict_softmax_fc"].items()
               if name.startswith("gallery.net.")}
    assert equal(dict(torch.load(output / "model.pt")), gallery)
    assert not equal(gallery, dict(resumed["state_dict_backbone"]))
    assert rank_0["global_step"] == 40 and resumed["global_step"] == 60
    # The clock counts the writes of all ranks in the half-steps that stay: it went on from where it was.
    before, after = (state["state_dict_softmax_fc"]["pool.clock"].item() for state in (rank_0, resumed))
    assert before == 40 * 8 and after == 60 * 8
    assert resumed["state_dict_softmax_fc"]["_extra_state"] == 60


def test_class_weights_that_learn_train_save_and_resume(patched, packs):
    keys = dict(head="f2c_dcp", f2c_pool_rate=0.6, val_targets=[])
    write_config(patched, "resident", packs, MORE, **keys)
    assert all(map(math.isfinite, losses(run(patched, "resident"))))
    folder = patched / "work_dirs" / "resident"
    heads = [torch.load(folder / f"checkpoint_gpu_{rank}.pt")["state_dict_softmax_fc"] for rank in range(2)]
    assert heads[0]["pool.kept.rows"].shape == (1, MORE[0], 64) and heads[1]["pool.kept.rows"].shape == (1, MORE[0] // 2, 64)
    assert torch.equal(heads[0]["pool.rows"], heads[1]["pool.rows"])  # of all ranks
    write_config(patched, "resident", packs, MORE, **keys, resume=True, num_epoch=3)
    assert all(map(math.isfinite, losses(run(patched, "resident"))))
    resumed = torch.load(folder / "checkpoint_gpu_0.pt")
    clocks = [head["pool.clock"].item() for head in (heads[0], resumed["state_dict_softmax_fc"])]
    assert resumed["global_step"] * clocks[0] == heads[0]["_extra_state"] * clocks[1] > 0
    assert resumed["state_dict_softmax_fc"]["_extra_state"] == resumed["global_step"]


def test_the_config_of_the_tutorial_trains_with_its_network_and_scale(patched, packs):
    of_page = next(text for language, text in BLOCKS if language == "python" and text.startswith("# faces.py"))
    identities, images = MORE
    here = dict(rec=str(packs[MORE]), num_classes=identities, num_image=identities * images, batch_size=8, num_epoch=1,
                verbose=30, frequent=2, val_targets=["synth"], output="work_dirs/tutorial")
    lines = [f"config.{key} = {value!r}" for key, value in here.items()]
    (patched / "configs/tutorial.py").write_text("\n".join([of_page, *lines]))
    log = run(patched, "tutorial", ranks=1)
    assert "network                  tiny" in log and re.findall(r"scale ([\d.]+)", log)[-1] == "32.0"
    assert "Accuracy-Flip" in log and all(map(math.isfinite, losses(log)))


@pytest.mark.parametrize("name, keys", [
    ("dcq", dict(head="dcq", f2c_queue_size=40, margin_list=(1.0, 0.0, 0.3))),
    ("neighbours", dict(head="f2c_dcp", f2c_pool_rate=0.6, f2c_margin="sface", margin_list=(1.0, 0.9, 1.2), f2c_sub_centers=2,
                        f2c_forget_rate=0.2, f2c_low_resolution=0.5))])
def test_the_neighbours_of_f2c_train_save_and_resume(patched, packs, name, keys):
    keys |= dict(val_targets=[])
    write_config(patched, name, packs, MORE, **keys)
    assert all(map(math.isfinite, losses(run(patched, name))))
    folder = patched / "work_dirs" / name
    before = torch.load(folder / "checkpoint_gpu_0.pt")
    write_config(patched, name, packs, MORE, **keys, resume=True, num_epoch=3, f2c_teacher=str(folder / "model.pt"))
    shutil.copy(folder / "model.pt", folder / "teacher.pt")
    assert all(map(math.isfinite, losses(run(patched, name))))
    after = torch.load(folder / "checkpoint_gpu_0.pt")
    clocks = [state["state_dict_softmax_fc"]["pool.clock"].item() for state in (before, after)]
    assert after["global_step"] * clocks[0] == before["global_step"] * clocks[1] > 0


@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
def test_configs_without_a_head_train_partial_fc_as_before(patched, packs, sample_rate):
    name = f"pfc_{int(10 * sample_rate)}"
    write_config(patched, name, packs, MORE, sample_rate=sample_rate)
    rank_0, rank_1 = assert_trained(run(patched, name), patched, name)
    assert rank_0["state_dict_softmax_fc"]["weight"].shape == (MORE[0] // 2, 64)
    assert not torch.equal(rank_0["state_dict_softmax_fc"]["weight"], rank_1["state_dict_softmax_fc"]["weight"])


def test_f2c_goes_on_from_checkpoints_of_partial_fc_on_other_ranks(patched, packs):
    before = patched / "work_dirs" / "pfc_10"
    if not (before / "checkpoint_gpu_1.pt").is_file():
        write_config(patched, "pfc_10", packs, MORE, num_epoch=1, val_targets=[])
        run(patched, "pfc_10")
    file = str(before / "checkpoint_gpu_1.pt")
    write_config(patched, "grown", packs, MORE, head="f2c_dcp", f2c_pool_rate=1.0, f2c_init=file, f2c_init_classes=True,
                 num_epoch=1, val_targets=[])
    log = run(patched, "grown", ranks=1)
    taken = re.search(r"taken: backbone \((\d+) tensors\), class weights of 40 identities; left: epoch, global_step", log)
    assert f"f2c_init={file!r}" in log and int(taken[1]) > 100 and all(map(math.isfinite, losses(log)))


@pytest.mark.parametrize("keys", [dict(), dict(head="f2c_dcp", f2c_pool_rate=1.0)], ids=["Partial FC", "F²C"])
def test_merged_checkpoints_resume_in_arcface_torch_on_another_number_of_ranks(patched, packs, keys):
    name = f"merged_{len(keys)}"
    write_config(patched, name, packs, MORE, **keys, num_epoch=1, val_targets=[])
    run(patched, name)
    output = patched / "work_dirs" / name
    output.rename(output.with_suffix(".of_2"))
    cli(["checkpoint", "merge", str(output.with_suffix(".of_2")), str(output), "--ranks", "1"])
    write_config(patched, name, packs, MORE, **keys, num_epoch=2, val_targets=[], resume=True)
    log = run(patched, name, ranks=1)
    saved = torch.load(output / "checkpoint_gpu_0.pt")
    assert saved["epoch"] == 2 and saved["global_step"] == 2 * 40  # 20 an epoch with two ranks
    assert saved["state_dict_softmax_fc"].get("_extra_state", 2 * 40) == 2 * 40
    assert all(map(math.isfinite, losses(log)))


def test_model_pt_loads_into_the_backbones_of_arcface_torch_and_of_this_package(patched, packs, tmp_path):
    if not (patched / "work_dirs" / "f2c" / "model.pt").is_file():
        write_config(patched, "f2c", packs, FEW, head="f2c_dcp", f2c_pool_rate=1.0, num_epoch=1)
        run(patched, "f2c")
    for name in "r18", "r50", "r100", "mbf", "mbf_large":
        torch.save(get_model(name).state_dict(), tmp_path / f"{name}.pt")
    script = f"""
import torch
from backbones import get_model
net = get_model("mbf", num_features=64)
net.load_state_dict(torch.load("work_dirs/f2c/model.pt"), strict=True)
for name in "r18", "r50", "r100", "mbf", "mbf_large":
    net = get_model(name, num_features=512, fp16=False)
    net.load_state_dict(torch.load(r"{tmp_path}/" + name + ".pt"), strict=True)
    torch.manual_seed(0)
    with torch.no_grad():
        torch.save(net(torch.randn(4, 3, 112, 112)), r"{tmp_path}/" + name + "_embeddings.pt")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=patched, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in "r18", "r50", "r100", "mbf", "mbf_large":
        net = get_model(name)  # in training mode: untrained, the running statistics of r100 overflow
        net.load_state_dict(torch.load(tmp_path / f"{name}.pt"))
        torch.manual_seed(0)
        with torch.no_grad():
            torch.testing.assert_close(net(torch.randn(4, 3, 112, 112)),
                                       torch.load(tmp_path / f"{name}_embeddings.pt"), rtol=1e-3, atol=1e-3)


def test_states_of_the_largest_residual_net_are_those_of_arcface_torch(checkout):
    script = """
import torch
from backbones import get_model
from f2c_plugin.models import get_model_on_meta
ours = get_model_on_meta("r2060")
with torch.device("meta"):
    theirs = get_model("r2060", num_features=512)
one, other = ([(name, value.shape, value.dtype) for name, value in net.state_dict().items()] for net in (theirs, ours))
assert one == other, set(one) ^ set(other)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# timm's own functions without the rest of timm, which needs the torchvision that was built for this torch.
LAYERS_OF_TIMM = """
import importlib.util, sys, types
for name in "timm", "timm.layers":
    layers = types.ModuleType(name)
    layers.__path__ = importlib.util.find_spec(name).submodule_search_locations
    sys.modules[name] = layers
for part in "drop", "helpers", "weight_init":
    vars(layers).update(vars(importlib.import_module(f"timm.layers.{part}")))
sys.modules["timm.models"] = sys.modules["timm"]
sys.modules["timm.models.layers"] = layers
"""


@pytest.mark.skipif(find_spec("timm") is None, reason="NOT COMPARED WITH ARCFACE_TORCH'S: pip install --no-deps timm")
def test_vision_transformers_compute_what_those_of_arcface_torch_do(checkout):
    script = LAYERS_OF_TIMM + """
import torch
from backbones import get_model
from backbones.vit import VisionTransformer
from f2c_plugin import models
from f2c_plugin.models import vit
for name in "vit_t", "vit_s_dp005_mask_0", "vit_b_dp005_mask_005":
    theirs, ours = get_model(name), models.get_model(name)
    ours.load_state_dict(theirs.state_dict())
    assert ours.checkpointing == theirs.using_checkpoint and (ours.mask_ratio > 0) == (theirs.mask_ratio > 0)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in theirs.blocks]
    torch.testing.assert_close([block.drop_path for block in ours.blocks], rates)
for mask_ratio in 0.0, 0.05:
    theirs = VisionTransformer(112, 9, 3, 24, 64, 3, 8, drop_path_rate=0.3, mask_ratio=mask_ratio)
    ours = vit.VisionTransformer(64, 3, 0.3, 0.1 if mask_ratio else 0.0, 24)  # theirs always masks a tenth
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(6, 3, 112, 112)
    for training in True, False:
        embeddings, gradients = [], []
        for net in theirs.train(training), ours.train(training):
            torch.manual_seed(0)
            embeddings.append(net(images))
            net.zero_grad()
            embeddings[-1][:, 0].exp().sum().backward()
            gradients.append([each.grad for name, each in net.named_parameters() if name != "mask_token" or mask_ratio])
        torch.testing.assert_close(*embeddings, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(dict(theirs.named_buffers()), dict(ours.named_buffers()))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_backbone_of_another_package_is_one_of_arcface_torch(patched, other_package):
    script = """
from backbones import get_model
net = get_model("pixels", dropout=0.0, fp16=False, num_features=64)
print(type(net).__name__, net.dense[2].out_features)
get_model("r51")"""
    path = os.pathsep.join([str(other_package), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", script], cwd=patched, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": path})
    assert done.stdout == "Pixels 64\n"
    assert done.stderr.strip().endswith("ValueError: 'r51' is none of the installed arcface_torch.backbones: mixfacenet_m, "
                                        "mixfacenet_s, pixels, small, tiny, vargfacenet")


def test_the_light_backbones_of_this_package_are_some_of_arcface_torch(patched, tmp_path):
    for name in LIGHT:
        torch.save(get_model(name, 64).state_dict(), tmp_path / f"{name}.pt")
    script = f"""
import torch
from backbones import get_model
get_model("mixfacenet_s", fp16=False)  # as arcface_torch's inference.py calls it
for name in {LIGHT}:
    net = get_model(name, dropout=0.0, fp16=True, num_features=64)
    net.load_state_dict(torch.load(r"{tmp_path}/" + name + ".pt"))
    print(name, net.fp16, *net(torch.randn(2, 3, 112, 112)).shape)"""
    done = subprocess.run([sys.executable, "-c", script], cwd=patched, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{name} True 2 64" for name in LIGHT], done.stderr


def test_a_vision_transformer_without_timm_names_the_command_that_installs_it(patched):
    script = "import sys; sys.modules['timm'] = None; from backbones import get_model; get_model('vit_t')"
    done = subprocess.run([sys.executable, "-c", script], cwd=patched, capture_output=True, text=True)
    assert re.search(r"F2CError: timm.layers cannot be imported .*: pip install 'f2c-plugin\[vit\]'$", done.stderr.strip())


def test_an_unknown_head_names_those_there_are(patched, packs):
    write_config(patched, "unknown", packs, FEW, head="f2c_dpc")
    with pytest.raises(AssertionError, match=r"'f2c_dpc' is none of the installed arcface_torch.heads: dcq, f2c_dcp"):
        run(patched, "unknown")


@pytest.fixture
def copy(checkout, tmp_path):
    return Path(shutil.copytree(checkout, tmp_path / "arcface_torch", ignore=shutil.ignore_patterns("__pycache__")))


def test_installing_twice_changes_nothing_and_reversing_restores_every_byte(copy, checkout):
    cli(["install", str(copy), "--check"])
    assert tree(copy) == tree(checkout)
    cli(["install", str(copy)])
    installed = tree(copy)
    assert installed != tree(checkout)
    cli(["install", str(copy)])
    assert tree(copy) == installed
    cli(["install", str(copy), "--reverse"])
    assert tree(copy) == tree(checkout)
    assert filecmp.cmp(copy / "train_v2.py", checkout / "train_v2.py", shallow=False)


def test_a_checkout_with_the_first_patch_alone_gets_the_others(copy):
    first = patching.patches()[0]
    subprocess.run(["git", "apply", str(first)], cwd=copy, check=True,
                   env={**os.environ, "GIT_CEILING_DIRECTORIES": str(copy.parent)})
    assert not any(first.stem in change.reasons for change in patching.plan_install(copy))
    cli(["install", str(copy)])
    assert patching.plan_install(copy) == []


@pytest.mark.parametrize("after", [["install"], ["install", "--reverse"]], ids=["completed", "undone"])
def test_an_installation_that_was_killed_is_completed_and_undone(copy, checkout, tmp_path, after):
    whole = Path(shutil.copytree(copy, tmp_path / "whole"))
    if "--reverse" not in after:
        cli(["install", str(whole)])
    for changes in 0, 1, 7, 20:
        assert die_at_change(changes, ["install", str(copy)])
        cli([*after, str(copy)])
        assert tree(copy) == tree(whole)
        cli(["install", str(copy), "--reverse"])
        assert tree(copy) == tree(checkout)


def test_a_checkout_that_does_not_fit_is_left_untouched_with_file_and_line_named(copy):
    text = (copy / "partial_fc_v2.py").read_text()
    (copy / "partial_fc_v2.py").write_text(text.replace("torch.cuda.amp.autocast(self.fp16)", "nullcontext()"))
    before = tree(copy)
    with pytest.raises(SystemExit, match=r"0002-todays-stack.patch does not fit .*partial_fc_v2.py:\d+\. Nothing was changed"):
        cli(["install", str(copy)])
    assert tree(copy) == before


def test_a_config_that_was_edited_stays_through_installing_and_reversing(copy, capsys):
    cli(["install", str(copy)])
    config = copy / "configs" / "ms1mv3_r50_f2c.py"
    config.write_text("mine")
    cli(["doctor", "--checkout", str(copy)])
    for command in ["install"], ["install", "--reverse"]:
        cli([*command, str(copy)])
        assert config.read_text() == "mine" and "ms1mv3_r50_f2c.py stays" in capsys.readouterr().out


def test_reversing_a_patched_file_that_was_edited_is_refused_with_its_place(copy):
    cli(["install", str(copy)])
    text = (copy / "dataset.py").read_text()
    (copy / "dataset.py").write_text(text.replace("pin_memory=torch.cuda.is_available()", "pin_memory=False"))
    before = tree(copy)
    for command in ["install"], ["install", "--reverse"]:
        with pytest.raises(SystemExit, match=r"0003-without-a-gpu.patch does not fit .*dataset.py:\d+\. Nothing was changed"):
            cli([*command, str(copy)])
    assert tree(copy) == before


def test_an_installation_that_is_interrupted_leaves_the_checkout_as_it_was(copy, monkeypatch):
    before = tree(copy)
    replaced = []

    def replace(source, target, replace=os.replace):
        replaced.append(target)
        if len(replaced) == 5:
            raise KeyboardInterrupt
        replace(source, target)
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(SystemExit, match="130"):
        cli(["install", str(copy)])
    assert len(replaced) >= 5 and tree(copy) == before


@pytest.mark.parametrize("link", ["dataset.py", "configs"])
def test_a_link_out_of_the_checkout_is_not_followed(copy, tmp_path, link):
    outside = tmp_path / "outside"
    (copy / link).rename(outside)
    (copy / link).symlink_to(outside)
    before, behind = tree(copy), tree(outside) if outside.is_dir() else outside.read_bytes()
    with pytest.raises(SystemExit, match="is, or is behind, a link to .*outside.*, outside the checkout. Nothing was changed"):
        cli(["install", str(copy)])
    assert tree(copy) == before and (tree(outside) if outside.is_dir() else outside.read_bytes()) == behind


def test_line_ends_stay_as_they_are_whatever_the_users_git_does_with_them(copy, checkout, monkeypatch):
    for name, value in ("COUNT", "1"), ("KEY_0", "core.autocrlf"), ("VALUE_0", "true"):
        monkeypatch.setenv(f"GIT_CONFIG_{name}", value)
    cli(["install", str(copy)])
    assert not any(b"\r" in content for path, content in tree(copy).items() if path.suffix == ".py")
    cli(["install", str(copy), "--reverse"])
    assert tree(copy) == tree(checkout)


def test_the_configs_load_in_arcface_torch(patched):
    names = [config.stem for config in patching.arcface_torch_configs()]
    script = ("from utils.utils_config import get_config; import sys;"
              "cfg = get_config('configs/' + sys.argv[1]); assert cfg.head == 'f2c_dcp' and cfg.output")
    for name in names:
        subprocess.run([sys.executable, "-c", script, name], cwd=patched, check=True)


def test_fetch_host_clones_the_tested_revision_into_the_cache(checkout, tmp_path, monkeypatch):
    root = subprocess.run(["git", "-C", str(checkout), "rev-parse", "--show-toplevel"], capture_output=True, text=True)
    if root.returncode:
        pytest.skip("ARCFACE_TORCH is not in a git checkout")
    monkeypatch.setenv("F2C_CACHE", str(tmp_path / "cache"))
    fetched = patching.fetch_checkout(root.stdout.strip())
    assert tree(fetched) == tree(checkout)
    assert patching.fetch_checkout("no such source") == fetched  # already cloned
