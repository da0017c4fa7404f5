"""The built-in trainer on a small pack: what it leaves behind and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from f2c_plugin.config_files import load_config
from f2c_plugin.data.dataset import normalize_faces
from f2c_plugin.data.writer import RecordWriter
from f2c_plugin.errors import TrainingDiverged
from f2c_plugin.evaluation.onnx_export import load_net
from f2c_plugin.evaluation.verification import VerificationSet
from f2c_plugin.models import get_model
from f2c_plugin.tools.report import report
from f2c_plugin.trainer.logger import TrainingLog
from f2c_plugin.trainer.rendezvous import process_group
from f2c_plugin.utils.safe_load import load_states
from tests.runs import IDENTITIES, history, launch, refusal, run, run_on


@pytest.mark.parametrize("ranks, keys", [(1, {}), (2, {}), (1, dict(f2c_recipe="paper")),
                                         (2, dict(f2c_recipe="paper", f2c_shard_pool=True))], ids=str)
def test_a_run_leaves_a_model_its_export_its_history_and_a_report(config, faces, ranks, keys):
    is_paper = "f2c_recipe" in keys
    path = config(head="f2c_dcp", f2c_pool_rate=1.0, batch_size=12 // ranks, num_workers=1, save_all_states=True, **keys)
    if is_paper and ranks == 2:
        run_on(ranks, path)
    else:
        launch(path, ranks)
    summary = json.loads(Path("out/report.json").read_text())
    assert summary["head"] == "f2c_dcp" and summary["images_seen"] == 2 * 120 and 100 < summary["peak_mb"] < 10_000
    assert 0 <= summary["verification"]["accuracy"] <= 1 and summary["verification"]["tar_at_far_1e-3"] is None  # 30 pairs
    entries = history()
    steps = [entry for entry in entries if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(2, 21, 2))
    for name in ("learning_rate", "images_per_second", "f2c/pool_fill", "f2c/pool_hit_rate", "f2c/evictions",
                 "f2c/positive_cosine", "f2c/not_finite", "f2c/age", "f2c/scale"):
        assert all(np.isfinite(entry[name]) for entry in steps), name
    assert steps[-1]["f2c/pool_fill"] == 1.0 and steps[-1]["f2c/scale"] == 16.0
    assert (steps[0]["f2c/scale"] < 9) != is_paper
    assert [entry["step"] for entry in entries if "synth/accuracy" in entry] == [5, 10, 15, 20]
    assert "Accuracy-Flip" in Path("out/training.log").read_text()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator("out/tensorboard")
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"loss", "f2c/pool_hit_rate", "synth/accuracy"} <= scalars and ("synth/gallery_accuracy" in scalars) == is_paper
    assert len(events.Scalars("loss")) == len(steps)
    geometry = {f"synth/{which}{name}" for name in ("alignment", "divergence", "concentration")
                for which in ("", *["gallery_"] * is_paper)}
    last = [entry for entry in entries if "synth/accuracy" in entry][-1]
    assert geometry <= scalars and geometry <= last.keys()
    assert last["synth/alignment"] == summary["verification"]["alignment"]

    net = get_model("tiny", 32)
    net.load_state_dict(torch.load("out/model.pt"), strict=True)
    import onnxruntime
    images = normalize_faces(VerificationSet(faces / "synth.bin").faces()[:5])
    exported = onnxruntime.InferenceSession("out/model.onnx").run(None, {"data": images.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(exported, net.eval()(images).numpy(), atol=1e-4)
    assert summary["onnx_cosine"] > 0.9999

    state = load_states(max(Path("out").glob("checkpoint_*.pt")))["head"]
    assert state["pool.rows"].shape == (2 if is_paper else 1, IDENTITIES, 32)  # whole, sharded or not

    page = report(["out"]).read_text()
    assert all(part in page for part in ("f2c_dcp", "synth: TAR at FAR 0.001", "exported net", "f2c_pool_rate"))
    assert all((Path("out") / name).read_bytes().startswith(b"\x89PNG") for name in ("curves.png", "scores.png", "roc.png"))


def test_the_full_fc_baseline_learns_its_training_set(config):
    run(config(head="softmax", num_epoch=12, val_targets=[]))
    losses = [entry["loss"] for entry in history()]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])


@pytest.mark.parametrize("export", ["probe", "gallery", "best"])
def test_both_nets_are_verified_and_the_selected_one_is_exported(config, export):
    summary = run(config(num_epoch=1, save_all_states=True, f2c_recipe="paper", f2c_momentum=0.5, f2c_export=export))
    last = {name: value for entry in history() for name, value in entry.items()}
    accuracies = {"probe": last["synth/accuracy"], "gallery": last["synth/gallery_accuracy"]}
    selected = summary["exported"]
    if export == "best":
        assert accuracies[selected] == max(accuracies.values())
    else:
        assert selected == export
    assert summary["verification"]["accuracy"] == pytest.approx(accuracies[selected])
    net = load_net(max(Path("out").glob("checkpoint_*.pt")), selected).state_dict()
    assert all(torch.equal(value, net[name]) for name, value in torch.load("out/model.pt").items())


@pytest.mark.parametrize("keys", [{}, dict(f2c_recipe="paper", f2c_momentum=0.9, lr=0.01)], ids=str)
def test_f2c_pulls_probes_to_their_slots(config, keys):
    run(config(num_epoch=24, val_targets=[], **keys))
    losses, cosines = ([entry[name] for entry in history()] for name in ("loss", "f2c/positive_cosine"))
    all_alike = np.log(IDENTITIES) + 16.0 * 0.2  # the loss if everyone's features were the same
    assert np.mean(losses[-10:]) < 0.6 * all_alike
    assert np.mean(cosines[-10:]) > np.mean(cosines[:10]) + 0.1


@pytest.mark.parametrize("keys", [dict(fp16=True), dict(gradient_acc=2), dict(optimizer="adamw", lr=1e-3),
                                  dict(f2c_recipe="paper", f2c_symmetric=False),
                                  dict(f2c_recipe="paper", f2c_identity_rate=0.0), dict(f2c_identity_rate=1.0),
                                  dict(f2c_kept_weights="file", batch_size=11),
                                  dict(margin_list=(1.0, 0.5, 0.0), interclass_filtering_threshold=0.4),
                                  dict(f2c_recipe="paper", f2c_pool_dtype="bfloat16"), dict(warmup_epoch=1),
                                  dict(f2c_pool_dtype="bfloat16"), dict(f2c_pool_dtype="float16", fp16=True)], ids=str)
def test_settings_train_to_finite_losses(config, keys):
    run(config(num_epoch=1, val_targets=[], **keys))
    assert all(np.isfinite(entry["loss"]) for entry in history())


def test_a_run_that_replaces_another_does_not_mix_with_it(config):
    for _ in range(2):
        run(config(num_epoch=1, val_targets=[]))
        # One file of the trainer's scalars, one of the head's.
        assert len(list(Path("out/tensorboard").glob("events*"))) == 2 and len(history()) == 5


def test_scalars_elsewhere_and_folders_stay_where_a_run_replaces_another(config):
    Path("elsewhere").mkdir()
    Path("elsewhere/events.out.tfevents.1").write_text("precious")
    Path("out").mkdir()
    Path("out/tensorboard").symlink_to("../elsewhere")
    run(config(num_epoch=1, val_targets=[]))
    assert Path("elsewhere/events.out.tfevents.1").read_text() == "precious"
    Path("other/tensorboard/events.out.tfevents.2").mkdir(parents=True)
    run(config(num_epoch=1, val_targets=[], output="other"))
    assert Path("other/tensorboard/events.out.tfevents.2").is_dir()


def test_an_output_folder_whose_name_is_not_utf_8_costs_the_scalars_only(config):
    printed = launch(config(num_epoch=1, val_targets=[], output="out\udcff"))
    assert Path("out\udcff/report.json").is_file() and "no more scalars are written there" in printed


def test_a_run_that_diverges_ships_nothing_and_says_what_to_do(config, caplog):
    Path("out").mkdir()
    Path("out/model.pt").write_bytes(b"of before")
    message = refusal(config(num_epoch=1, lr=1e12, head="softmax"))
    assert "not finite after step 10: probe net: layers." in message and "lower lr or set fp16=False, and start" in message
    assert Path("out/model.pt").read_bytes() == b"of before" and not list(Path("out").glob("report.json*"))
    assert not list(Path("out").glob("model.onnx*"))


def test_a_net_with_finite_weights_whose_embeddings_are_not_is_no_model(config, monkeypatch):
    def spoiled(self, *arguments, original=TrainingLog.verify):
        with torch.no_grad():
            arguments[1]["probe"].fc.weight.fill_(3e38)
        return original(self, *arguments)
    monkeypatch.setattr(TrainingLog, "verify", spoiled)
    with pytest.raises(TrainingDiverged, match="not finite after step 10: probe net: its embeddings"):
        run(config(num_epoch=1, verbose=1000))
    assert not list(Path("out").glob("report.json*")) and not list(Path("out").glob("model.onnx*"))


def test_the_baseline_takes_odd_batches(config):
    run(config(num_epoch=1, val_targets=[], head="softmax", batch_size=15))
    assert all(np.isfinite(entry["loss"]) for entry in history())


@pytest.mark.parametrize("keys, message", [
    (dict(head="f2c_dpc"), "config.head='f2c_dpc' is unknown; installed: dcq, f2c_dcp"),
    (dict(head=None), "head is not set, and the built-in trainer has no Partial FC"),
    (dict(sampler="f2c_dula"), "config.sampler='f2c_dula' is unknown; installed: f2c_dual"),
    (dict(batch_size=13, f2c_recipe="paper"), "batch_size=13: F²C splits a batch into two halves"),
    (dict(f2c_pool_rate=0.3), "f2c_pool_rate=0.3 gives 3 slots"),
    (dict(num_classes=11, f2c_pool_rate=1.0), "num_classes=11, but"),
    (dict(num_image=121), "num_image=121, but"),
    (dict(batch_size=122), "num_image=120 is less than one global batch"),
    (dict(network="r19"), "network='r19': must be one of r18"),
    (dict(optimizer="sdg"), "optimizer='sdg': must be 'sgd' or 'adamw'"),
    (dict(resume=True), "resume=True, but there is no checkpoint in out"),
    (dict(val_targets=["lfw"]), "lfw.bin: no such file"),
    (dict(rec="nowhere"), "rec='nowhere': there is no train.rec in"),
    (dict(dali=True), "dali=True: must be False: this package's loader decodes by itself"),
    (dict(head="softmax", f2c_pol_rate=0.1), "f2c_pol_rate: unknown key; did you mean f2c_pool_rate?"),
    (dict(output="config.py"), "output='config.py': cannot be made a folder: File exists: choose another"),
    (dict(output="config.py/out"), "output='config.py/out': cannot be made a folder: Not a directory: choose another"),
    (dict(output="a\0b"), r"output='a\x00b': must be a name, or None"),
    (dict(rec="a\0b"), r"rec='a\x00b': must be a name"), (dict(val_targets=["\0"]), r"val_targets=['\x00']: must be a list"),
    (dict(lr=1e308), "lr=1e+308: must be a number above 0, and below 1e38"), (dict(weight_decay=10**400), "weight_decay=1000"),
    (dict(margin_list=(1.0, 10**400, 0.0)), "must be three numbers"),
    (dict(margin_list=(1.0, 0.5, 0.2, 0.1)), "margin_list"),
    (dict(margin_list=(2.0, 0.5, 0.0)), r"margin_list=(2.0, 0.5, 0.0) is neither ArcFace"),
    (dict(margin_list=(1.0, 0.5, 0.0), f2c_margin="adaface"), "f2c_margin='adaface': takes its m from the third number of "
                                                              "margin_list=(1.0, 0.5, 0.0): set margin_list=(1.0, 0.0, 0.4)"),
], ids=str)
def test_bad_input_is_refused_with_the_key_or_file_the_value_and_the_remedy(config, keys, message):
    assert message in refusal(config(**keys))


def test_everything_that_is_wrong_is_reported_at_once_before_the_ranks_meet(config):
    path = config(network="r19", optimizer="sdg", batch_size=122, num_classes=11, val_targets=["lfw"], head="f2c_dpc",
                  lr="0.1", f2c_pol_rate=0.1, f2c_export="both", scale=0, warmup_epoch=9, margin_list=None, seed=-1,
                  f2c_save_every=0)
    message = refusal(path)
    for part in ("network='r19'", "num_image=120 is less than", "num_classes=11, but", "lfw.bin: no such file",
                 "head='f2c_dpc' is unknown", "lr='0.1': must be a number above 0", "f2c_pol_rate: unknown key",
                 "scale=0: must be", "warmup_epoch=9: is more than num_epoch=2", "margin_list=None: must be three numbers",
                 "seed=-1: must be", "f2c_save_every=0: must be"):
        assert part in message
    assert not Path("out").exists()


def test_damaged_packs_are_refused_with_the_file(config, faces, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "train.rec").write_bytes((faces / "train.rec").read_bytes())
    assert "broken/train.idx: no such file" in refusal(config(rec="broken"))
    with RecordWriter(broken / "train.rec"):
        pass
    assert "broken/train.rec: the file is empty" in refusal(config(rec="broken"))
    (broken / "train.rec").write_bytes((faces / "train.rec").read_bytes()[:-5000])
    (broken / "train.idx").write_bytes((faces / "train.idx").read_bytes())
    assert "broken/train.rec" in refusal(config(rec="broken"))


def test_a_training_whose_optimizer_would_never_take_a_step_is_refused(config):
    assert refusal(config(gradient_acc=21)).endswith(
        "gradient_acc=21: the training has 20 batches, so its optimizer would take no step: lower it to 20 or less")
    assert refusal(config(gradient_acc=0)).endswith("gradient_acc=0: must be a whole number above 0")


def test_the_time_left_has_the_verifications_that_are_yet_to_come(config):
    Path("out").mkdir()
    with process_group():
        log = TrainingLog(load_config(config(verbose=5)), 20, 0)
    seconds = [(step, log._left(step, 3600)) for step in (1, 5, 6, 15, 20)]
    assert seconds == [(1, "19:00:00 and 4 verifications"), (5, "15:00:00 and 4 verifications"),
                       (6, "14:00:00 and 3 verifications"), (15, "5:00:00 and 2 verifications"),
                       (20, "0:00:00 and 1 verification")]
    log._seconds_of_verification = 60
    assert [log._left(step, 3600) for step in (1, 15, 20)] == ["19:04:00", "5:02:00", "0:01:00"]
    log.cfg.val_targets = []
    assert log._left(20, 3600) == "0:00:00"
    log.close()
