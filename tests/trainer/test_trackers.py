"""Weights & Biases and MLflow, themselves, without a network."""

import json
import logging
import struct
from pathlib import Path

import mlflow
import pytest
from wandb.proto import wandb_internal_pb2

from f2c_plugin import train
from f2c_plugin.trainer import trackers
from tests.runs import history, losses, refusal, run, start

BLOCK = 32 << 10  # in which Weights & Biases writes: chunks of records, (checksum, length, kind) before each


def records(path):
    """What Weights & Biases has written into a file. It may write the last of it when the training has ended."""
    while True:
        found = list(parsed(path.read_bytes()))
        if found and found[-1].HasField("exit"):
            return found


def parsed(content):
    """The records of a file, up to where it ends."""
    at, record = 7, b""
    while at + 7 <= len(content):
        if BLOCK - at % BLOCK < 7:  # too little for another chunk
            at += BLOCK - at % BLOCK
            continue
        length, kind = struct.unpack("<4xHB", content[at:at + 7])
        if at + 7 + length > len(content):
            return
        record += content[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def logged(path):
    """{name: {step: value}} of such a file."""
    found = {}
    for record in records(path):
        items = {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for name, value in items.items():
            found.setdefault(name, {})[items.get("step")] = value
    return found


def test_weights_and_biases_gets_what_the_history_has_and_goes_on_when_a_training_resumes(config, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    keys = dict(using_wandb=True, wandb_project="faces", suffix_run_name="first", frequent=5, save_all_states=True)
    run(config(num_epoch=1, **keys))
    file, = Path("out", "wandb").glob("offline-run-*/*.wandb")
    started = next(record.run for record in records(file) if record.HasField("run"))
    assert (started.project, started.display_name) == ("faces", "out_first")
    assert {item.key: json.loads(item.value_json) for item in started.config.update}["lr"] == 0.05
    expected = {entry["step"]: entry["loss"] for entry in history() if "loss" in entry}
    assert logged(file)["loss"] == pytest.approx(expected) and len(expected) == 2
    assert "f2c/pool_fill" in logged(file) and "synth/accuracy" in logged(file)
    run(config(num_epoch=2, resume=True, **keys))
    other, = set(Path("out", "wandb").glob("offline-run-*/*.wandb")) - {file}
    assert next(record.run for record in records(other) if record.HasField("run")).run_id == started.run_id
    assert set(logged(other)["loss"]) == {15, 20}


def test_mlflow_gets_what_the_history_has_and_goes_on_when_a_training_resumes(config, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    mlflow.set_tracking_uri(None)
    keys = dict(using_mlflow=True, mlflow_experiment="faces", frequent=5, save_all_states=True)
    run(config(num_epoch=1, **keys))
    run(config(num_epoch=2, resume=True, **keys))
    client = mlflow.MlflowClient()
    found, = client.search_runs([client.get_experiment_by_name("faces").experiment_id])
    assert (found.info.run_name, found.info.status, found.data.params["lr"]) == ("out", "FINISHED", "0.05")
    seen = {metric.step: metric.value for metric in client.get_metric_history(found.info.run_id, "loss")}
    assert seen == pytest.approx({images // 12: loss for images, loss in losses().items()}) and len(seen) == 4
    assert any("synth" in name for name in found.data.metrics)


def test_a_service_that_cannot_be_had_is_said_before_training_begins(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # where nobody has logged in
    for name in "WANDB_MODE", "WANDB_API_KEY":
        monkeypatch.delenv(name, raising=False)
    train.main([config(num_epoch=1)])  # a run that is there already
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file() and path.name != ".lock"}
    training = start(config(using_wandb=True))  # this process may have been told that it is offline
    said, _ = training.communicate(timeout=300)
    assert training.returncode == 1 and "using_wandb=True: UsageError: " in said.splitlines()[-1]
    assert said.splitlines()[-1].endswith("or set WANDB_MODE=offline, which keeps the run in config.output")
    assert "Traceback" not in said and len(before) > 5 and before == {path: path.read_bytes() for path in before}
    train.main([config(num_epoch=1, lr=0.01)])
    events = list(Path("out/tensorboard").iterdir())
    assert not set(events) & before.keys() and len(history()) == len(before[Path("out/history.jsonl")].splitlines())
    log = Path("out/training.log").read_text()
    assert "lr                       0.01" in log and "lr                       0.05" not in log

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://")
    assert "using_mlflow=True: " in (said := refusal(config(using_mlflow=True)))
    assert said.endswith("or, without a server, to file:///FOLDER, and MLFLOW_ALLOW_FILE_STORE=true")

    def missing(module, extra):
        raise trackers.F2CError(f"{module} cannot be imported: pip install 'f2c-plugin[{extra}]'")
    monkeypatch.setattr(trackers, "require", missing)
    assert refusal(config(using_mlflow=True)).endswith(
        "using_mlflow=True: mlflow cannot be imported: pip install 'f2c-plugin[mlflow]'")


def test_a_service_that_fails_later_is_said_once_and_training_goes_on(config, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "offline")

    def fail(*_):
        raise ConnectionError("gone")
    monkeypatch.setattr(trackers._WeightsAndBiases, "write", fail)
    with caplog.at_level(logging.WARNING):
        run(config(using_wandb=True, num_epoch=1))
    said = [record.message for record in caplog.records if "using_wandb" in record.message]
    assert said == ["using_wandb=True: ConnectionError: gone: nothing more is logged there, and training goes on"]
    assert len(losses()) == 5
