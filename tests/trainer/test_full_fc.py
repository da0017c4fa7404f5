"""The full FC layer: its ramp is F²C's, step by step, and goes on where a training resumes."""

import pytest
import torch

from f2c_plugin.method.margin import Margin
from f2c_plugin.method.schedule import Schedule
from f2c_plugin.trainer import build
from f2c_plugin.utils.safe_load import load_states
from tests.runs import history, losses, refusal, run
from tests.trainer.test_checkpoint import checkpoints, equal

STEPS = 20
KEYS = dict(head="softmax", softmax_ramp=True, num_epoch=2, frequent=1, val_targets=[])


def test_every_step_of_the_ramp_has_its_scale_and_margin(config, monkeypatch):
    def explicit(cfg, backbone, margin_loss):
        head = build.softmax(cfg, backbone, margin_loss)

        def set_margin(head, _):
            share = min(1, head.steps / (0.7 * STEPS))
            head.schedule = Schedule(Margin(scale=8 + share * 8, additive=share * 0.2))
        head.register_forward_pre_hook(set_margin)
        return head
    monkeypatch.setitem(build.BUILT_IN_HEADS, "explicit", explicit)
    run(config(**KEYS))
    run(config(**KEYS | dict(head="explicit", softmax_ramp=False, output="explicit")))
    run(config(**KEYS | dict(softmax_ramp=False, output="without")))
    assert len(losses()) == STEPS and list(losses().values()) == pytest.approx(list(losses("explicit").values()), rel=1e-6)
    assert losses("without")[12] > 1.5 * losses()[12]


@pytest.mark.parametrize("keys", [{}, dict(fp16=True)], ids=str)
def test_a_ramp_that_is_resumed_in_its_middle_ends_bit_for_bit_as_without_a_break(config, keys):
    run(config(save_all_states=True, **KEYS, **keys))
    whole, model = losses(), torch.load("out/model.pt")
    middle, end = checkpoints()
    assert load_states(middle)["step"] == 10 and load_states(middle)["head"].keys() == {"weight"}  # as in version 0.2
    end.unlink()
    run(config(save_all_states=True, resume=True, **KEYS, **keys))
    assert losses() == whole and equal(torch.load("out/model.pt"), model)
    assert history()[-1]["step"] == STEPS


@pytest.mark.parametrize("head", ["softmax", "f2c_dcp"])
def test_adafaces_running_statistics_go_on_where_a_training_resumes(config, head):
    keys = KEYS | dict(head=head, f2c_margin="adaface", save_all_states=True)
    run(config(**keys))
    end = checkpoints()[-1]
    whole = load_states(end)["head"]
    assert whole["quality.mean"] > 0 and whole["quality.std"] > 0
    end.unlink()
    run(config(resume=True, **keys))
    assert equal(load_states(checkpoints()[-1])["head"], whole)
    message = refusal(config(resume=True, **keys | dict(f2c_margin=None)))
    assert "belongs to another training: f2c_margin was 'adaface' and is now None" in message
