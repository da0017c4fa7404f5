"""The fuzzers, all at the same time, for a minute."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


def test_a_minute_of_fuzzing_finds_no_crash_no_hang_and_nothing_read_or_done_that_should_not_be(tmp_path):
    pytest.importorskip("atheris", reason="NOT FUZZED: atheris is for Linux only; pip install atheris")
    script = Path(__file__).with_name("fuzz.py")
    limits = ["-max_total_time=60", "-max_len=20000", "-timeout=20", "-rss_limit_mb=4096"]

    def start(target):
        with open(tmp_path / f"{target}.log", "w") as log:
            return subprocess.Popen([sys.executable, str(script), target, *limits, str(tmp_path / target)], cwd=tmp_path,
                                    stdout=subprocess.DEVNULL, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})

    running = {target: start(target) for target in ("pack", "verification", "checkpoint", "states", "archive")}
    for target, process in running.items():
        code = process.wait(timeout=300)
        log = (tmp_path / f"{target}.log").read_text(errors="replace")
        assert code == 0, f"{target}:\n{log[-4000:]}"
        inputs = int(re.search(r"Done (\d+) runs", log)[1])
        print(f"{target}: {inputs:,} inputs")
        assert inputs > 100
