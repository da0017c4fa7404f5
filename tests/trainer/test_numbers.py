"""Numbers that are not finite: they stay out of pool and nets, are counted, and end a training that makes nothing else."""

import pytest
import torch

from f2c_plugin.data.loader import DualLoader
from f2c_plugin.errors import TrainingDiverged
from f2c_plugin.method.gallery import GalleryNet
from f2c_plugin.method.resident_head import ResidentHead
from f2c_plugin.utils.safe_load import load_states
from tests.runs import history, losses, refusal, run
from tests.trainer.test_checkpoint import checkpoints


def spoil_images(monkeypatch, steps, value):
    """The loader's images of these steps, counted from 0, hold ``value`` in one pixel."""
    def spoiled(self, each=DualLoader.__iter__):
        for step, (images, labels) in zip(self.sampler.steps, each(self), strict=True):
            if step in steps:
                images[1, 0, 5, 5] = value
            yield images, labels
    monkeypatch.setattr(DualLoader, "__iter__", spoiled)


def assert_whole(folder="out"):
    state = load_states(checkpoints(folder)[-1])
    for part in "backbone", "head":
        assert all(value.isfinite().all() for value in state[part].values())
    for moments in state["optimizer"]["state"].values():
        assert moments["momentum_buffer"].isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("keys", [
    {}, dict(fp16=True), dict(head="softmax"), dict(gradient_acc=2), dict(f2c_low_resolution=0.5),
    dict(head="softmax", f2c_low_resolution=0.5), dict(f2c_forget_rate=0.3), dict(head="dcq", f2c_queue_size=24)], ids=str)
def test_images_that_are_not_finite_spoil_neither_pool_nor_nets_and_training_goes_on(config, monkeypatch, value, keys):
    spoil_images(monkeypatch, {3, 4, 11}, value)
    run(config(frequent=1, val_targets=["synth"], save_all_states=True, **keys))
    assert_whole()
    last = history()[-1]
    assert last["synth/accuracy"] > 0.4 and last["step"] == 20


def test_embeddings_that_are_not_finite_are_counted(config, monkeypatch):
    spoil_images(monkeypatch, {3}, torch.nan)
    run(config(frequent=1, val_targets=[]))
    counted = {entry["step"]: entry["f2c/not_finite"] for entry in history()}
    assert counted.pop(4) > 0 and set(counted.values()) == {0}


def test_gradients_that_are_not_finite_change_nothing(config, monkeypatch):
    keys = dict(val_targets=[], num_epoch=1, save_all_states=True, frequent=1)
    before = {}

    def spoiled(self, *arguments, forward=ResidentHead.forward):
        loss = forward(self, *arguments)
        if self.steps == 6:
            before.update({name: value.clone() for name, value in self.probe_net.named_parameters()})
            return loss * torch.inf
        if self.steps == 7:
            assert all(torch.equal(value, before[name]) for name, value in self.probe_net.named_parameters())
        return loss
    monkeypatch.setattr(ResidentHead, "forward", spoiled)
    run(config(**keys))
    assert before
    assert_whole()


@pytest.mark.parametrize("keys", [{}, dict(fp16=True), dict(optimizer="adamw", lr=0.001)], ids=str)
def test_the_very_first_step_may_be_bad(config, monkeypatch, keys):
    """As it nearly always is in float16, whose scaler begins too high."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # what nobody initialises is NaN
    try:
        spoil_images(monkeypatch, {0, 1}, torch.nan)
        run(config(num_epoch=1, frequent=1, val_targets=[], **keys))
    finally:
        torch.use_deterministic_algorithms(False)
    assert [*losses()] == [12 * step for step in range(3, 11)]  # those that are finite


def test_too_many_bad_steps_in_a_row_end_the_training_and_the_last_good_checkpoint_stays(config, monkeypatch):
    spoil_images(monkeypatch, {1, 2, *range(9, 100)}, torch.nan)
    keys = dict(val_targets=[], f2c_save_every=4, f2c_max_bad_steps=5)
    with pytest.raises(TrainingDiverged, match=r"not finite in 5 steps in a row, up to step 14 \(f2c_max_bad_steps=5\)"):
        run(config(**keys))
    assert [load_states(file)["step"] for file in checkpoints()] == [4, 8]
    assert_whole()
    assert "f2c_max_bad_steps=5" in refusal(config(resume=True, **keys))


def test_the_gallery_net_does_not_follow_what_is_not_finite():
    net = torch.nn.Linear(2, 2)
    gallery = GalleryNet(net)
    with torch.no_grad():
        net.weight[0, 0] = torch.nan
        net.weight[1, 1] = 3.0
    before = gallery.net.weight.clone()
    gallery.follow(net, 0.5)
    assert torch.equal(gallery.net.weight, before)
    with torch.no_grad():
        net.weight[0, 0] = 1.0
    gallery.follow(net, 0.5)
    torch.testing.assert_close(gallery.net.weight, (before + net.weight) / 2)
