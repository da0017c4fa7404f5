"""The neighbours of F²C in whole trainings: each learns, is checked with its pack, and goes on after a break bit for bit."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from f2c_plugin.config_files import load_config
from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.evaluation.onnx_export import load_net
from f2c_plugin.evaluation.verification import embed
from f2c_plugin.trainer.loop import build_state
from f2c_plugin.trainer.rendezvous import process_group
from f2c_plugin.utils.safe_load import load_states
from tests.runs import losses, refusal, run
from tests.trainer.test_checkpoint import checkpoints, equal

KEYS = dict(num_epoch=2, frequent=1, save_all_states=True, val_targets=[])
METHODS = {
    "DCQ": dict(head="dcq", f2c_queue_size=24, f2c_gallery_images=2, f2c_pool_rate=0.1, margin_list=(1.0, 0.0, 0.3)),
    "DCQ, SFace": dict(head="dcq", f2c_queue_size=24, f2c_margin="sface", margin_list=(1.0, 0.9, 1.2)),
    "SFace": dict(f2c_margin="sface", margin_list=(1.0, 0.9, 1.2)),
    "SFace, as published": dict(f2c_margin="sface", margin_list=(1.0, 0.9, 1.2), f2c_recipe="paper"),
    "SFace, full FC": dict(f2c_margin="sface", margin_list=(1.0, 0.9, 1.2), head="softmax"),
    "ArcFace by name": dict(f2c_margin="arcface", margin_list=(1.0, 0.3, 0.0)),
    "sub-centres": dict(f2c_sub_centers=3), "sub-centres, full FC": dict(f2c_sub_centers=3, head="softmax"),
    "small loss": dict(f2c_forget_rate=0.3, f2c_export="gallery"),
    "low resolution": dict(f2c_low_resolution=0.5), "low resolution, full FC": dict(f2c_low_resolution=0.5, head="softmax"),
    "low resolution, DCQ": dict(f2c_low_resolution=0.5, head="dcq", f2c_queue_size=24),
    "all of the pool": dict(f2c_sub_centers=2, f2c_forget_rate=0.3, f2c_low_resolution=0.5, f2c_margin="adaface"),
}


@pytest.mark.parametrize("keys", METHODS.values(), ids=METHODS)
def test_a_training_that_is_resumed_in_its_middle_ends_bit_for_bit_as_without_a_break(config, keys):
    keys = KEYS | keys
    run(config(**keys))
    whole, model = losses(), torch.load("out/model.pt")
    assert len(set(whole.values())) == len(whole)
    _, end = checkpoints()
    end.unlink()
    run(config(resume=True, **keys))
    assert losses() == whole and equal(torch.load("out/model.pt"), model)


def test_a_student_learns_the_teachers_embeddings_and_the_teacher_is_in_no_checkpoint(config, faces):
    run(config(output="teacher", num_epoch=6, val_targets=[]))
    keys = KEYS | dict(num_epoch=6, save_all_states=False, f2c_teacher="teacher/model.pt", seed=7)
    images, _ = RecordDataset(faces).faces(np.arange(60))
    teacher = embed(load_net("teacher/model.pt"), images)
    for head in "f2c_dcp", "softmax":
        cosines = []
        for folder, change in (head, {}), (f"{head} alone", dict(f2c_teacher=None)):
            run(config(head=head, output=folder, **keys | change))
            cosines.append(cosine_similarity(embed(load_net(f"{folder}/model.pt"), images), teacher, dim=2).mean())
        assert cosines[0] > cosines[1] + 0.1
    saved = config(output="saved", **keys | dict(save_all_states=True, num_epoch=1))
    run(saved)
    assert not [name for name in load_states(checkpoints("saved")[-1])["head"] if "distillation" in name]


def test_the_teacher_sees_sharp_images_where_the_student_sees_small_ones(config):
    run(config(output="teacher", num_epoch=1, val_targets=[]))
    cfg = load_config(config(f2c_teacher="teacher/model.pt", f2c_low_resolution=1.0))
    teacher, images, seen = load_net("teacher/model.pt"), torch.rand(6, 3, 112, 112) * 2 - 1, []
    with process_group():
        state = build_state(cfg, torch.device("cpu"), 10)
        state.head.distillation.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
        state.backbone.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
        state.head(state.backbone(images), torch.arange(6))
    small, embeddings = seen
    assert not torch.equal(small, images)
    torch.testing.assert_close(embeddings, teacher(images), check_dtype=False)


def test_a_teacher_that_is_not_finite_is_refused(config):
    run(config(output="teacher", num_epoch=1, val_targets=[]))
    state = torch.load("teacher/model.pt")
    next(value for value in state.values() if value.is_floating_point())[0] = torch.nan
    torch.save(state, "nan.pt")
    assert re.search("f2c_teacher='nan.pt': .* not finite: choose another file", refusal(config(f2c_teacher="nan.pt")))


@pytest.mark.parametrize("change, message", [
    (dict(f2c_teacher="nowhere.pt"), "f2c_teacher: nowhere.pt"),
    (dict(head="dcq", f2c_identity_rate=0), "f2c_identity_rate=0: DCQ learns from pairs of images alone: leave it out"),
    (dict(head="dcq", f2c_queue_size=3), "f2c_queue_size=3: a gathered batch brings 6 class weights"),
    (dict(f2c_margin="sface"), r"f2c_margin='sface': takes its a and b from the second and third number of margin_list=\(1.0, "
                               r"0.0, 0.2\): set margin_list=\(1.0, 0.9, 1.2\)"),
    (dict(f2c_recipe="paper", f2c_sub_centers=2), "f2c_sub_centers=2: only the recipe 'resident' has it"),
    (dict(head="dcq", f2c_forget_rate=0.2), "f2c_forget_rate=0.2: only the recipe 'resident' has it"),
    (dict(f2c_forget_rate=1.0), "f2c_forget_rate=1.0: must be from 0 to below 1"),
    (dict(f2c_low_resolution=2), "f2c_low_resolution=2: must be from 0 to 1"),
    (dict(head="dcq", batch_size=13), "batch_size=13: .* make it even"),
])
def test_what_does_not_fit_is_refused_before_the_first_step(config, change, message):
    found = refusal(config(**change))
    assert re.search(message, found), found
    assert not list(Path().glob("out/*.pt"))
