"""Commands print to terminals that lack their characters, and end quietly when nobody reads on."""

import io
import os
import subprocess
import sys
from contextlib import suppress

import pytest

from f2c_plugin.cli import main as cli
from tests.conftest import FIXTURES

MODULE = [sys.executable, "-m", "f2c_plugin"]
PLAN = ["plan", "--identities", "1000000", "--network", "r18"]
INDEX = ["index", str(FIXTURES / "insightface")]


@pytest.mark.parametrize("command", [PLAN, ["doctor", "--dataset", str(FIXTURES / "insightface")], ["plan", "--help"],
                                     INDEX], ids=lambda command: " ".join(command[:1]))
def test_characters_that_the_terminal_lacks_are_escaped(command, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    with suppress(SystemExit):
        cli(command)
    printed = terminal.buffer.getvalue().decode("ascii")
    assert r"\xb2" in printed or r"\xd7" in printed  # F²C, 112×112


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0",
                                                                         "PYTHONCOERCECLOCALE": "0"}], ids=["ascii", "C"])
def test_a_process_with_an_ascii_terminal_reads_and_writes_utf_8(environment, tmp_path):
    run = tmp_path / "läuft"
    run.mkdir()
    (run / "training.log").write_text("2026-11-22 12:25:32,123 : head                     F²C\n", encoding="utf-8")
    (run / "history.jsonl").write_text('{"step": 1, "images": 8, "loss": 5, "ä": 1}\n', encoding="utf-8")
    done = subprocess.run([*MODULE, "report", str(run)], env={**os.environ, **environment}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert rb"F\xb2C" in done.stdout and b"Traceback" not in done.stderr
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "läuft" in page and "F²C" in page


@pytest.mark.parametrize("command", [INDEX, ["--help"]], ids=lambda command: command[0])
def test_a_pipe_that_its_reader_has_closed_ends_the_command_quietly(command):
    reader, writer = os.pipe()
    os.close(reader)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([*MODULE, *command], stdout=writer, stderr=subprocess.PIPE, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("module", ["f2c_plugin.train", "f2c_plugin"])
def test_streams_that_are_closed_are_replaced(module, tmp_path):
    code = (f"import os, sys; from runpy import run_module; run_module({module!r}, run_name='x')\n"
            "from f2c_plugin.utils.terminal import tolerate_any_terminal; tolerate_any_terminal()\n"
            "file = open('opened', 'w'); print('x'); print('x', file=sys.stderr, flush=True); file.write(str(file.fileno()))")
    (tmp_path / "code.py").write_text(code)
    done = subprocess.run(["sh", "-c", f"exec {sys.executable} code.py <&- >&- 2>&-"], cwd=tmp_path)
    assert done.returncode == 0 and int((tmp_path / "opened").read_text()) > 2


def test_a_report_is_written_though_its_summary_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "training.log").write_text("")
    (tmp_path / "history.jsonl").write_text('{"step": 1, "images": 8, "loss": 5}')
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        with pytest.raises(SystemExit, match="1"):
            cli(["report", str(tmp_path)])
    assert (tmp_path / "report.html").is_file()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="NOT TRIED ON A FULL DISK: needs /dev/full")
def test_output_that_finds_no_room_is_an_error_in_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run([*MODULE, *INDEX], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "f2c-plugin index: [Errno 28] No space left on device: 'standard output'\n"
