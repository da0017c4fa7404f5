"""Ctrl-C ends every command with one line and exit code 130, and leaves neither files nor processes."""

import fcntl
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from f2c_plugin.cli import COMMANDS, main as cli
from f2c_plugin.data.writer import write_insightface_pack
from f2c_plugin.evaluation.verification import VerificationSet
from tests.runs import hear_interrupts


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_ends_with_one_line(command, monkeypatch, capsys):
    def interrupted(_):
        signal.raise_signal(signal.SIGINT)
    monkeypatch.setitem(COMMANDS, command, (interrupted, ()))
    with pytest.raises(SystemExit) as end:
        cli([command])
    assert end.value.code == 130 and capsys.readouterr() == ("", f"f2c-plugin {command}: interrupted\n")


def start(*arguments, stderr, **environment):
    return subprocess.Popen([sys.executable, "-m", "f2c_plugin", *map(str, arguments)], stdout=subprocess.PIPE, stderr=stderr,
                            start_new_session=True, preexec_fn=hear_interrupts, env={**os.environ, **environment})


def interrupt(process):
    """Ctrl-C reaches all processes of a terminal's group. None of them is left."""
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def printed_until(terminal, awaited):
    """What a process prints to a terminal, until ``awaited`` or its end."""
    text = ""
    while awaited is None or awaited not in text:
        assert select.select([terminal], [], [], 120)[0], f"nothing more after {text!r}"
        try:
            read = os.read(terminal, 1 << 16)
        except OSError:  # Linux's way to say that the other end is closed
            return text
        if not read:
            return text
        text += read.decode(errors="replace")
    return text


def synth(folder: Path):
    return ["synth", folder / "new", "--identities", 10_000, "--pairs", 2, "--processes", 2], "drawing train.rec"


def index(folder: Path):
    jpeg = next(iter((folder / "images" / "0").iterdir())).read_bytes()
    (folder / "new").mkdir()
    write_insightface_pack(folder / "new" / "train.rec", [jpeg] * 20_000, [20_000])
    return ["index", folder / "new", "--verify"], "decoding"


def pack(folder: Path):
    return ["pack", folder / "images", folder / "new"], "decoding"


@pytest.mark.parametrize("command", [synth, index, pack])
def test_worker_processes_end_and_no_file_is_half_written(command, faces, tmp_path):
    jpeg = VerificationSet(faces / "synth.bin").images[0]
    (tmp_path / "images" / "0").mkdir(parents=True)
    for number in range(2000):
        (tmp_path / "images" / "0" / f"{number}.jpg").write_bytes(jpeg)
    arguments, awaited = command(tmp_path)
    before = {path.name for path in (tmp_path / "new").glob("*")}
    terminal, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("4H", 24, 200, 0, 0))  # a progress bar needs columns
    process = start(*arguments, stderr=other)
    os.close(other)
    text = printed_until(terminal, awaited)
    assert awaited in text, text
    interrupt(process)
    text += printed_until(terminal, None)
    os.close(terminal)
    assert text.splitlines()[-1] == f"f2c-plugin {command.__name__}: interrupted" and "Traceback" not in text, text
    left = {path.name for path in (tmp_path / "new").glob("*")} - before
    assert left <= {"synth.bin", "property"}  # of synth; whole, and written again by the next


def test_a_clone_that_is_interrupted_leaves_nothing(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, and never answers
        source = f"git://127.0.0.1:{server.getsockname()[1]}/insightface"
        process = start("fetch-host", "--from", source, stderr=subprocess.PIPE, F2C_CACHE=str(tmp_path / "cache"))
        with server.accept()[0]:
            interrupt(process)
    assert process.communicate() == (b"", b"f2c-plugin fetch-host: interrupted\n")
    assert list((tmp_path / "cache").iterdir()) == []


def test_ctrl_c_after_the_work_changes_nothing():
    script = ("import atexit, signal, sys; atexit.register(signal.raise_signal, signal.SIGINT); "
              "sys.argv = 'f2c-plugin plan --identities 1000 --gpus 1 --pool-rate 1 --network tiny'.split(); "
              "from f2c_plugin.__main__ import main; main()")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, preexec_fn=hear_interrupts)
    assert (done.returncode, done.stderr) == (0, "") and "All heads fit" in done.stdout
