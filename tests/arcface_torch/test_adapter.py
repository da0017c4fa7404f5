"""The head's methods that arcface_torch calls: verification, and selection of the net that becomes model.pt."""

import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from f2c_plugin.arcface_torch.entry_points import f2c_dcp
from f2c_plugin.config_files import load_config
from f2c_plugin.errors import ConfigError
from f2c_plugin.models import get_model
from f2c_plugin.trainer.build import margin_loss


def head_of(path):
    """A head after some steps in arcface_torch, with two different nets, and its probe net."""
    torch.manual_seed(0)
    cfg = load_config(path)
    probe_net = get_model(cfg.network, cfg.embedding_size)
    head = f2c_dcp(cfg, probe_net, margin_loss(cfg))
    with torch.no_grad():
        for parameter in probe_net.parameters():
            parameter.normal_(std=0.2)
    head.continue_at(30)
    return head, probe_net


def test_the_gallery_net_is_verified_beside_arcface_torchs_own_verification(config, caplog):
    head, _ = head_of(config(output=".", f2c_recipe="paper"))
    with caplog.at_level(logging.INFO):
        head.verify(20)
    assert re.search(r"\[gallery_synth\]\[20\]Accuracy-Flip: 0\.\d{5}\+-0\.\d{5}", caplog.text)
    assert "[synth]" not in caplog.text and head.gallery.net.training is False
    logged = re.search(r"concentration: (\d\.\d+)", caplog.text)
    events = EventAccumulator("tensorboard")
    events.Reload()
    recorded = {name: events.Scalars(f"gallery_synth/{name}")[0] for name in ("alignment", "divergence", "concentration")}
    assert logged and recorded["concentration"].value == pytest.approx(float(logged[1]), abs=1e-4)
    assert [each.step for each in recorded.values()] == [20] * 3


@pytest.mark.parametrize("export", ["probe", "gallery", "best"])
def test_the_chosen_net_is_selected_and_both_accuracies_are_logged(config, caplog, export):
    head, probe_net = head_of(config(output=".", f2c_recipe="paper", f2c_export=export))
    with caplog.at_level(logging.INFO):
        selected = head.select_net()
    pattern = r"\[(gallery_|)synth\]\[30\]Accuracy-Flip: (\d\.\d+)"
    logged = {which: float(accuracy) for which, accuracy in re.findall(pattern, caplog.text)}
    accuracies = {"probe": logged[""], "gallery": logged["gallery_"]}
    which = max(accuracies, key=lambda net: accuracies[net]) if export == "best" else export
    assert selected is {"probe": probe_net, "gallery": head.gallery.net}[which]
    assert f"model.pt is the {which} net" in caplog.text
    assert accuracies["probe"] != accuracies["gallery"]
    scores = [np.load(name)["scores"] for name in ("synth_scores.npz", "gallery_synth_scores.npz")]
    assert len(scores[0]) == 60 and not np.allclose(*scores)


def test_best_without_a_verification_set_is_refused_at_the_start_and_missing_sets_are_skipped(config, caplog):
    for val_targets in [], ["lfw"]:
        with pytest.raises(ConfigError, match=r"f2c_export='best', but of val_targets=\[.*\] there is none in"):
            head_of(config(f2c_recipe="paper", f2c_export="best", val_targets=val_targets))
    head, probe_net = head_of(config(output=".", val_targets=["lfw"]))
    head.verify(20)
    assert head.select_net() is probe_net and not list(Path().glob("*_scores.npz"))


def test_a_head_without_a_gallery_net_verifies_nothing_and_selects_the_probe_net(config, caplog):
    head, probe_net = head_of(config(output="."))
    with caplog.at_level(logging.INFO):
        head.verify(20)
        assert head.select_net() is probe_net
    assert "gallery" not in caplog.text and "model.pt is the probe net" in caplog.text
    assert [path.name for path in Path().glob("*_scores.npz")] == ["synth_scores.npz"]
