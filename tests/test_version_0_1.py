"""States, checkpoints and runs of version 0.1 are still good."""

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from f2c_plugin.data.sampler import DualSampler
from f2c_plugin.method.head import F2CHead
from f2c_plugin.method.margin import Margin
from f2c_plugin.method.pool import DynamicClassPool
from f2c_plugin.method.schedule import Schedule
from f2c_plugin.models import NETWORKS, _plain
from f2c_plugin.tools.report import Run
from tests.conftest import FIXTURES
from tests.runs import history, refusal, run

OLD = FIXTURES / "v0_1"


def test_the_state_of_a_head_goes_on_with_the_loss_gradient_and_pool_that_0_1_had():
    saved = torch.load(OLD / "head.pt")
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.PReLU(16), nn.Linear(16, 6)).double()
    net.load_state_dict(saved["net"])
    head = F2CHead(net, DynamicClassPool(12, 30, 6).double(), Schedule.paper(Margin(16.0, angular=0.3), 0.9))
    head.load_state_dict(saved["head"])
    assert head.steps == 15
    embeddings = net(saved["images"])
    loss = head(embeddings, saved["labels"])
    torch.testing.assert_close(loss.detach(), saved["loss"], rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, embeddings)[0], saved["gradient"], rtol=0, atol=1e-12)
    expected = {name.replace("due_row", "next_row"): value for name, value in saved["next_pool"].items()}
    for name, value in head.pool.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-12)


def draw_pairs_as_0_1(monkeypatch):
    """0.1 drew two images of an identity at random, whatever had come before."""
    def batch(self, step, original=DualSampler.batch):
        self.step = step
        return original(self, step)

    def pairs(self, positions):
        rng = np.random.default_rng([self.seed, 2, self.step, self.rank])
        chosen = self.identities.take(positions)
        count = np.diff(self.index.starts)[chosen]
        first = rng.integers(count)
        second = (first + 1 + rng.integers(count - 1)) % count
        return self.index.grouped[self.index.starts[chosen] + np.stack([first, second])].astype(np.int64)
    monkeypatch.setattr(DualSampler, "batch", batch)
    monkeypatch.setattr(DualSampler, "_pairs", pairs)


def test_a_training_goes_on_from_a_checkpoint_to_the_model_that_0_1_ended_with(config, monkeypatch):
    micro = _plain((4, 2), (4, 2), (4, 2), before=partial(nn.AvgPool2d, 2))  # what the fixture was trained with
    monkeypatch.setitem(NETWORKS, "micro", micro)
    draw_pairs_as_0_1(monkeypatch)
    path = config(network="micro", embedding_size=8, resume=True, f2c_save_every=10, f2c_recipe="paper")
    Path("out").mkdir()
    shutil.copy(OLD / "checkpoint_000000000120.pt", "out")
    shutil.copy(OLD / "run/history.jsonl", "out")
    run(path)
    ours, old = torch.load("out/model.pt"), torch.load(OLD / "model_at_end.pt")
    assert ours.keys() == old.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, old[name], rtol=1e-4, atol=1e-5, msg=name)
    assert [entry["images"] for entry in history() if "loss" in entry] == list(range(24, 241, 24))


def test_a_run_is_reported_on_with_todays_names():
    old = Run.read(OLD / "run")
    assert len(old.series("f2c/pool_hit_rate")) == 10 and not old.series("f2c/found")
    assert "synth: TAR at FAR 0.1" in old.facts


def test_a_training_by_the_recipe_that_is_no_more_is_refused_with_the_version_that_can_end_it(config):
    Path("out").mkdir()
    saved = torch.load(OLD / "checkpoint_000000000120.pt")
    del saved["settings"]["f2c_recipe"]  # "ramp" was the default
    torch.save(saved, "out/checkpoint_000000000120.pt")
    message = refusal(config(network="tiny", embedding_size=8, resume=True))
    assert "f2c_recipe was 'ramp' and is now 'resident'" in message and "f2c-plugin 0.2 can end this training" in message
