"""The report's page, of runs of both hosts, and in a real browser."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from f2c_plugin.errors import ReportError
from f2c_plugin.tools.report import Run, report

HOST_LOG = """\
Training: 2026-11-22 12:25:32,123-: margin_list              (1.0, 0.0, 0.4)
Training: 2026-11-22 12:25:32,124-: interclass_filtering_threshold0
Training: 2026-11-22 12:25:32,124-: head                     f2c_dcp
Training: 2026-11-22 12:25:32,124-: total_batch_size         16
Training: 2026-11-22 12:25:40,779-F²C step 10: pool fill 1.000  found 0.900  age 0.8 steps  evictions 2.0  positive cosine \
-0.031  hard-negative cosine nan  not finite 0  scale 64.0
Training: 2026-11-22 12:25:41,000-Speed 20.50 samples/sec   Loss 140.2500   LearningRate 0.040000   Epoch: 0   \
Global Step: 10   Fp16 Grad Scale:  1   Required: 0 hours
Training: 2026-11-22 12:25:44,000-[lfw][20]Accuracy-Flip: 0.61250+-0.02000
Training: 2026-11-22 12:25:44,000-[gallery_lfw][20]Accuracy-Flip: 0.63250+-0.02000
"""


@pytest.fixture
def runs(tmp_path):
    """A run of arcface_torch, and one of the built-in host, with a name that HTML must not take for a tag."""
    hosts, ours = tmp_path / "hosts", tmp_path / "<ours>"
    hosts.mkdir(), ours.mkdir()
    (hosts / "training.log").write_text(HOST_LOG)
    (ours / "training.log").write_text("2026-11-22 12:25:32,124 : head                     softmax\n")
    history = [{"step": step, "images": 8 * step, "loss": 5 - step / 10, "images_per_second": 99.0} for step in range(1, 9)]
    history.append({"step": 8, "images": 64, "synth/accuracy": 0.75})
    (ours / "history.jsonl").write_text("\n".join(map(json.dumps, history)))
    (ours / "report.json").write_text(json.dumps({"exported": "probe", "seconds": 90, "peak_mb": 1234, "onnx_cosine": 0.9999999}))
    rng = np.random.default_rng(0)
    same = np.arange(400) % 2 == 0
    np.savez(ours / "synth_scores.npz", scores=rng.normal(same * 0.5, 0.2), same=same)
    return hosts, ours


def test_a_run_of_arcface_torch_is_read_from_its_log(runs):
    run = Run.read(runs[0])
    assert run.config == {"margin_list": "(1.0, 0.0, 0.4)", "interclass_filtering_threshold": "0", "head": "f2c_dcp",
                          "total_batch_size": "16"}
    assert run.series("loss") == [(160, 140.25)] and run.series("lfw/accuracy") == [(320, 0.6125)]
    assert run.series("lfw/gallery_accuracy") == [(320, 0.6325)]
    assert run.series("f2c/positive_cosine") == [(160, -0.031)] and run.series("f2c/age") == [(160, 0.8)]
    assert not run.series("f2c/hard_negative_cosine")


def test_a_folder_without_a_run_is_refused_with_what_to_give(tmp_path):
    with pytest.raises(ReportError, match="no training.log; give the output folder"):
        Run.read(tmp_path)
    (tmp_path / "training.log").write_text("2026-11-22 rank_id: 0\n")
    with pytest.raises(ReportError, match="has logged no step yet"):
        Run.read(tmp_path)


def test_the_page_compares_runs_and_holds_its_pictures(runs, tmp_path):
    page = report(runs, tmp_path / "out")
    text = page.read_text()
    assert len(re.findall('src="data:image/png;base64,', text)) == 3 and "http" not in text
    assert "<h1>hosts, &lt;ours&gt;</h1>" in text and "75.00%" in text and "softmax" in text and "1,234" in text
    assert sorted(path.name for path in page.parent.iterdir()) == ["curves.png", "report.html", "roc.png", "scores.png"]


def test_a_real_browser_shows_it(runs, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("NOT SHOWN IN A BROWSER: install chromium")
    page = report(runs, tmp_path / "out")
    # What has not been decoded has no size.
    script = "<script>document.title = [...document.images].map(image => image.naturalWidth).join()</script>"
    page.write_text(page.read_text().replace("</body>", f"<script>onload = () => {{ {script[8:-9]} }}</script></body>"))
    done = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                           "--disable-component-update", "--disable-sync", "--no-first-run",
                           f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()],
                          capture_output=True, text=True, timeout=120)
    widths = re.search(r"<title>([\d,]+)</title>", done.stdout)
    assert widths and all(int(width) > 500 for width in widths[1].split(",")) and widths[1].count(",") == 2
