"""A disk that is full when the trainer writes: the error names the file, nothing is half-written, the last checkpoint stays."""

import json
import logging
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from f2c_plugin import train
from f2c_plugin.trainer import logger, loop
from f2c_plugin.trainer.logger import TrainingLog
from f2c_plugin.trainer.output import write_states
from f2c_plugin.utils.safe_load import load_states
from tests.runs import history
from tests.trainer.test_checkpoint import checkpoints, small_disk  # noqa: F401  # a fixture


def fill(disk):
    with suppress(OSError), open(disk / "rest", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))  # a page, of which a tmpfs consists


@pytest.fixture
def output(small_disk):  # noqa: F811
    return small_disk / "out"


@pytest.fixture
def filled_at(config, output, monkeypatch):
    """What a training prints as its last word whose disk is full from the moment that a function is called."""
    def run(owner, name):
        def function(*arguments, original=getattr(owner, name), **options):
            fill(output.parent)
            return original(*arguments, **options)
        monkeypatch.setattr(owner, name, function)
        with pytest.raises(SystemExit) as exit:
            train.main([config(embedding_size=4, num_epoch=2, save_all_states=True, output=str(output), frequent=1)])
        return str(exit.value.code)
    return run


def assert_last_checkpoint(output, step):
    assert load_states(checkpoints(output)[-1])["step"] == step
    assert not [path for path in output.rglob("*") if ".partial" in path.name]


@pytest.mark.parametrize("module, name, file", [
    (loop, "unusable", "model.pt"), (loop, "select_net", "model.pt"), (loop, "export_checked", "model.onnx"),
    (loop, "_peak_memory", "report.json")])
def test_what_is_shipped_is_whole_or_as_it_was(filled_at, output, module, name, file):
    output.mkdir()
    for shipped in "model.onnx", "report.json":
        (output / shipped).write_text("of before")
    message = filled_at(module, name)
    assert message.startswith("f2c_plugin.train: ") and "No space left on device" in message and f"out/{file}" in message
    assert_last_checkpoint(output, 10 if name == "unusable" else 20)
    for shipped in "model.onnx", "report.json":
        assert (output / shipped).read_text(errors="replace") == "of before" or (file, shipped) == ("report.json", "model.onnx")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's own thread
def test_history_and_log_wait_for_room_while_training_goes_on_without_tensorboard_and_scores(
        config, output, monkeypatch, capsys):
    def update(self, step, *arguments, original=TrainingLog.update):
        if step == 3:
            fill(output.parent)
        if step == 58:
            (output.parent / "rest").unlink()
        original(self, step, *arguments)
    monkeypatch.setattr(TrainingLog, "update", update)
    train.main([config(embedding_size=4, num_epoch=1, batch_size=2, output=str(output), frequent=1, verbose=30)])
    assert [entry["step"] for entry in history(output) if "loss" in entry] == list(range(1, 61))
    log = (output / "training.log").read_text(encoding="utf-8")
    assert all(f" step {step}: loss" in log for step in range(1, 61))
    printed = capsys.readouterr().out
    for name in "training.log", "history.jsonl":
        assert printed.count(f"No space left on device: '{output / name}'; what it lacks is kept, and training goes on") == 1
    assert f"{output / 'tensorboard'}: No space left on device: no more scalars are written there" in printed
    assert f"the scores are not saved: [Errno 28] No space left on device: '{output / 'synth_scores.npz'}'" in printed
    assert json.loads((output / "report.json").read_text())


@pytest.mark.parametrize("name", ["history.jsonl", "training.log"])
def test_a_history_or_log_that_lacks_lines_in_the_end_is_an_error(config, monkeypatch, name):
    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, _):
            raise OSError(28, "No space left on device")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    def patient(path, original=logger.PatientFile, **keys):
        made = original(path, **keys)
        if path.name == name:
            made._file = Full(made._file)
        return made
    monkeypatch.setattr(logger, "PatientFile", patient)
    with pytest.raises(SystemExit, match=rf"f2c_plugin.train: \[Errno 28\] No space left on device: 'out/{name}'"):
        train.main([config(num_epoch=1, val_targets=[])])
    assert Path("out/report.json").is_file() and not logging.getLogger().handlers[2:]


def test_a_terminal_that_has_gone_does_not_end_a_training(config):
    process = subprocess.Popen([sys.executable, "-m", "f2c_plugin.train", config(num_epoch=1, val_targets=[])],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    process.stdout.close()
    assert process.wait(timeout=120) == 0, process.stderr.read()
    assert Path("out/report.json").is_file() and "step 10: loss" in Path("out/training.log").read_text()


def test_a_file_of_states_is_named_whatever_torch_makes_of_a_full_disk(small_disk):  # noqa: F811
    fill(small_disk)
    os.truncate(small_disk / "rest", (small_disk / "rest").stat().st_size - (1 << 16))
    with pytest.raises(OSError, match="No space left on device: '.*/states.pt'"):
        write_states({"weight": torch.zeros(1 << 20)}, small_disk / "states.pt")
    assert [path.name for path in small_disk.iterdir()] == ["rest"]
