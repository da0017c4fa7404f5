"""Signals outside the steps, other trainings in the folder, and how a training ends: its exit codes, also through torchrun."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from f2c_plugin import train
from f2c_plugin.trainer import check, loop, output, rendezvous
from f2c_plugin.trainer.signals import Stopped, listening
from f2c_plugin.utils.safe_load import load_states
from tests.runs import by_torchrun, completed, hear_interrupts, history, refusal, start
from tests.trainer.test_checkpoint import checkpoints

KEYS = dict(num_epoch=1, val_targets=[])
SENTENCES = {signal.SIGTERM: "f2c_plugin.train: stopped by a signal ", signal.SIGINT: "f2c_plugin.train: interrupted. "}


def main(path):
    """Exit code of the command, run in this process."""
    try:
        train.main([path])
    except SystemExit as exit:
        return exit.code
    return 0


@pytest.fixture
def signalled(monkeypatch):
    """The exit code of a training in which a function, when it is first called, sends a signal to this process."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background

    def run(path, module, name, number):
        unsent = [number]

        def function(*arguments, original=getattr(module, name), **options):
            if unsent:
                os.kill(os.getpid(), unsent.pop())
            return original(*arguments, **options)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, function)
            return main(path)
    yield run
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", SENTENCES)
@pytest.mark.parametrize("module, name", [(check, "check"), (rendezvous, "process_group"), (loop, "build_state")])
def test_sigterm_and_ctrl_c_at_the_start_end_it_with_a_sentence(config, signalled, capsys, module, name, number):
    assert signalled(config(**KEYS), module, name, number) == 128 + number
    assert SENTENCES[number] in capsys.readouterr().err and not checkpoints()


@pytest.mark.parametrize("number", SENTENCES)
@pytest.mark.parametrize("name", ["select_net", "export_checked", "written_whole"])
def test_sigterm_and_ctrl_c_at_the_end_leave_the_last_checkpoint_from_which_the_rest_is_done(
        config, signalled, capsys, name, number):
    keys = KEYS | dict(save_all_states=True)
    assert signalled(config(**keys), loop, name, number) == 128 + number
    assert SENTENCES[number] in capsys.readouterr().err
    assert load_states(checkpoints()[-1])["step"] == 10
    assert not list(Path("out").glob("report.json*")) and not list(Path("out").glob("*.partial"))
    assert main(config(resume=True, **keys)) == 0 and Path("out/report.json").is_file() and len(history()) == 5


@pytest.mark.parametrize("number, code", [(signal.SIGUSR1, 0), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_are_heard_while_pytorch_is_imported(config, number, code):
    path = config(**KEYS)
    process = subprocess.Popen([sys.executable, "-X", "importtime", "-m", "f2c_plugin.train", path], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True, preexec_fn=hear_interrupts)
    assert process.stderr is not None
    next(line for line in process.stderr if "| " in line and line.split("|")[-1].strip().startswith("torch."))
    process.send_signal(number)
    errors = [line for line in process.stderr if not line.startswith("import time:")]
    assert process.wait() == code and not any("Traceback" in line for line in errors), errors
    if code:
        assert SENTENCES[number] in "".join(errors)


def test_nothing_but_small_modules_is_imported_before_signals_are_heard():
    code = "import sys; from f2c_plugin import train; print({'numpy', 'torch', 'easydict'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_a_second_ctrl_c_does_not_disturb_the_end(config, signalled, capsys):
    assert signalled(config(**KEYS), check, "check", signal.SIGINT) == 130
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_signal_within_torchs_writer_is_still_that_signal(config, monkeypatch, capsys):
    class Spoiled:
        def __init__(self, file):
            self.file, self.flush = file, file.flush

        def write(self, content):
            os.kill(os.getpid(), signal.SIGTERM)
            return self.file.write(content)

    def save(states, file, original=torch.save, files=[]):  # noqa: B006  # counts the calls
        files.append(file)
        original(states, file if len(files) == 1 else Spoiled(file))  # the first is the epoch's
    monkeypatch.setattr(torch, "save", save)
    Path("out").mkdir()
    assert main(config(**KEYS)) == 128 + signal.SIGTERM
    assert SENTENCES[signal.SIGTERM] in capsys.readouterr().err and len(list(Path("out").glob("model.pt*"))) == 1


def test_sigterm_behind_the_last_step_ends_the_training_before_the_final_verification(config, signalled, capsys):
    assert signalled(config(**KEYS), loop, "write_states", signal.SIGTERM) == 128 + signal.SIGTERM
    assert "stopped by a signal after the last step" in capsys.readouterr().err
    assert Path("out/model.pt").is_file() and not Path("out/report.json").exists()


def test_an_error_that_a_signal_has_caused_is_that_signal():
    with pytest.raises(Stopped) as stopped, listening():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Stopped:
            raise RuntimeError("Connection closed by peer") from None
    assert isinstance(stopped.value.__cause__, RuntimeError)


@pytest.mark.parametrize("module, name, steps", [(check, "check", [1, 10]), (loop, "export_checked", [10])])
def test_sigusr1_at_the_start_saves_after_the_first_step_and_at_the_end_changes_nothing(config, signalled, module, name, steps):
    path = config(f2c_save_every=10, **KEYS)
    assert signalled(path, module, name, signal.SIGUSR1) == 0 and Path("out/report.json").is_file()
    assert [load_states(file)["step"] for file in checkpoints()] == steps


def test_a_second_training_in_a_folder_is_refused_and_touches_nothing_until_the_first_is_dead(config, monkeypatch):
    Path("out").mkdir()
    Path("out/training.log").write_text("of the first\n")
    Path("out/history.jsonl").write_text("of the first\n")
    held = "import fcntl, sys; f = open('out/.lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    monkeypatch.setattr(output, "_RESTART_SECONDS", 0.1)
    with subprocess.Popen([sys.executable, "-c", held], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        first.stdout.readline()
        before = sorted(path.name for path in Path("out").iterdir())
        for resume in False, "auto":
            assert "output='out': another training is at work there" in refusal(config(resume=resume, **KEYS))
        assert sorted(path.name for path in Path("out").iterdir()) == before
        assert Path("out/training.log").read_text() == Path("out/history.jsonl").read_text() == "of the first\n"
        first.kill()
    assert main(config(**KEYS)) == 0


def test_a_training_waits_for_the_one_that_it_replaces(config):
    Path("out").mkdir()
    held = "import fcntl, time; f = open('out/.lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); time.sleep(1)"
    with subprocess.Popen([sys.executable, "-c", held], stdout=subprocess.PIPE) as first:
        first.stdout.readline()
        assert main(config(**KEYS)) == 0


def ended(path, *launcher, **environment):
    """A command that has ended: exit code, and all that it printed."""
    done = completed(*launcher, "-m", "f2c_plugin.train", path, stderr=subprocess.STDOUT, environment=environment)
    return done.returncode, done.stdout


def test_torchrun_turns_every_error_into_exit_code_1(config):
    code, printed = ended(config(lr=-1, **KEYS), *by_torchrun(2))
    assert code == 1 and "f2c_plugin.train: lr=-1: must be" in printed and "exitcode  : 1 " in printed, printed
    code, printed = ended(config(head="softmax", batch_size=6, lr=1e12, **KEYS), *by_torchrun(2))
    assert code == 1 and "f2c_plugin.train: not finite after step 10" in printed, printed
    assert not list(Path("out").glob("model.*"))


def test_sigterm_to_torchrun_while_its_ranks_start_ends_them_with_a_sentence(config):
    path = config(batch_size=6, **KEYS)
    with open(path, "a") as file:  # it tells that it is read, and goes on when all ranks are there
        file.write("\nimport os, pathlib, time\npathlib.Path('started_' + os.environ['RANK']).touch()\ntime.sleep(600)")
    process = start(path, ranks=2)
    while len(list(Path().glob("started_*"))) < 2:
        assert process.poll() is None, process.communicate()
    process.terminate()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and printed.count("stopped by a signal before the first step") == 2, printed


def test_the_old_launcher_an_ascii_terminal_and_no_docstrings_nor_asserts(config):
    path = config(batch_size=6, **KEYS)
    code, printed = ended(path, "-OO", "-m", "torch.distributed.launch", "--standalone", "--nproc_per_node=2",
                          PYTHONIOENCODING="ascii", PYTHONOPTIMIZE="2")
    assert code == 0 and "F\\xb2C step 2" in printed and "--- Logging error" not in printed, printed
    assert "F²C step 2" in Path("out/training.log").read_text(encoding="utf-8")


def test_a_signal_during_the_save_that_another_has_asked_for_is_not_lost():
    with listening() as requests, pytest.raises(Stopped), requests.in_steps():
        requests.receive(signal.SIGUSR1, None)
        assert requests.agreed() == 1
        requests.receive(signal.SIGTERM, None)  # while the checkpoint is written
        requests.done()
        assert requests.agreed() == 2
