"""The report's page, for runs of arcface_torch and the built-in trainer, also in a real browser."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from f2c_plugin.errors import ReportError
from f2c_plugin.tools.report import Run, report

ARCFACE_TORCH_LOG = """\
Training: 2026-11-22 12:25:32,123-: margin_list              (1.0, 0.0, 0.4)
Training: 2026-11-22 12:25:32,124-: interclass_filtering_threshold0
Training: 2026-11-22 12:25:32,124-: head                     f2c_dcp
Training: 2026-11-22 12:25:32,124-: fp16                     False
Training: 2026-11-22 12:25:32,124-: total_batch_size         16
Training: 2026-11-22 12:25:40,779-F²C step 10: pool fill 1.000  pool hit rate 0.900  age 0.8 steps  evictions 2.0  \
positive cosine -0.031  hard-negative cosine nan  not finite 0  scale 64.0
Training: 2026-11-22 12:25:41,000-Speed 20.50 samples/sec   Loss 140.2500   LearningRate 0.040000   Epoch: 0   \
Global Step: 10   Fp16 Grad Scale:  1   Required: 0 hours
Training: 2026-11-22 12:25:44,000-[lfw][20]Accuracy-Flip: 0.61250+-0.02000
Training: 2026-11-22 12:25:44,000-[gallery_lfw][20]Accuracy-Flip: 0.63250+-0.02000
"""


@pytest.fixture
def runs(tmp_path):
    """A run of arcface_torch, and one of the built-in trainer, whose name must not become an HTML tag."""
    theirs, ours = tmp_path / "theirs", tmp_path / "<ours>"
    theirs.mkdir()
    ours.mkdir()
    (theirs / "training.log").write_text(ARCFACE_TORCH_LOG)
    (ours / "training.log").write_text("2026-11-22 12:25:32,124 : head                     softmax\n")
    history = [{"step": step, "images": 8 * step, "loss": 5 - step / 10, "images_per_second": 99.0} for step in range(1, 9)]
    history.append({"step": 8, "images": 64, "synth/accuracy": 0.75})
    (ours / "history.jsonl").write_text("\n".join(map(json.dumps, history)))
    summary = {"exported": "probe", "seconds": 90, "peak_mb": 1234, "onnx_cosine": 0.9999999}
    (ours / "report.json").write_text(json.dumps(summary))
    rng = np.random.default_rng(0)
    same = np.arange(400) % 2 == 0
    np.savez(ours / "synth_scores.npz", scores=rng.normal(same * 0.5, 0.2), same=same)
    return theirs, ours


def test_a_run_of_arcface_torch_is_read_from_its_log(runs):
    run = Run.read(runs[0])
    assert run.config == {"margin_list": "(1.0, 0.0, 0.4)", "interclass_filtering_threshold": "0", "head": "f2c_dcp",
                          "fp16": "False", "total_batch_size": "16"}
    assert run.series("loss") == [(160, 140.25)] and run.series("lfw/accuracy") == [(320, 0.6125)]
    assert run.series("lfw/gallery_accuracy") == [(320, 0.6325)]
    assert run.series("f2c/positive_cosine") == [(160, -0.031)] and run.series("f2c/age") == [(160, 0.8)]
    assert run.series("f2c/pool_hit_rate") == [(160, 0.9)]
    assert not run.series("f2c/hard_negative_cosine")


@pytest.mark.parametrize("key, value, padded", [
    ("fp16", "True", "fp16                     True"), ("output", "", "output                   "),
    ("interclass_filtering_threshold", "0.4", "interclass_filtering_threshold0.4"),
    ("interclass_filtering_threshold", "0.4", "interclass_filtering_threshold 0.4"),
    ("val_targets", "['lfw', 'cfp_fp']", "val_targets              ['lfw', 'cfp_fp']")])
@pytest.mark.parametrize("time", ["Training: 2026-11-22 12:25:32,123-", "2026-11-22 12:25:32,123 "])
def test_keys_and_values_of_the_config_are_told_apart(runs, time, key, value, padded):
    (runs[1] / "training.log").write_text(f"{time}: {padded}\n{time}resume: going on from step 3\n{time}rank_id: 0\n")
    assert Run.read(runs[1]).config == {key: value}


def test_runs_in_folders_of_the_same_name_get_distinct_names(runs, tmp_path):
    for parent in "a", "b":
        shutil.copytree(runs[1], tmp_path / parent / "out")
    text = report([tmp_path / "a/out", runs[0], tmp_path / "b/out"], tmp_path / "page").read_text()
    assert "<th>a/out</th><th>theirs</th><th>b/out</th>" in text


@pytest.mark.parametrize("file", ["history.jsonl", "report.json", "synth_scores.npz"])
def test_a_damaged_file_is_named(runs, file):
    (runs[1] / file).write_bytes(b"{")
    with pytest.raises(ReportError, match=f"{file}: damaged"):
        Run.read(runs[1])


def test_a_folder_without_a_run_is_refused_with_what_to_give(tmp_path):
    with pytest.raises(ReportError, match="no training.log; give the output folder"):
        Run.read(tmp_path)
    (tmp_path / "training.log").write_text("2026-11-22 rank_id: 0\n")
    with pytest.raises(ReportError, match="has not logged a step yet"):
        Run.read(tmp_path)


def test_the_page_compares_runs_and_holds_its_pictures(runs, tmp_path):
    page = report(runs, tmp_path / "out")
    text = page.read_text()
    assert len(re.findall('src="data:image/png;base64,', text)) == 3 and "http" not in text
    assert "<h1>theirs, &lt;ours&gt;</h1>" in text and "75.00%" in text and "softmax" in text and "1,234" in text
    assert sorted(path.name for path in page.parent.iterdir()) == ["curves.png", "report.html", "roc.png", "scores.png"]


def test_a_real_browser_shows_it(runs, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("NOT SHOWN IN A BROWSER: install chromium")
    page = report(runs, tmp_path / "out")
    # An image that was not decoded has no size.
    script = "<script>document.title = [...document.images].map(image => image.naturalWidth).join()</script>"
    page.write_text(page.read_text().replace("</body>", f"<script>onload = () => {{ {script[8:-9]} }}</script></body>"))
    done = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                           "--disable-component-update", "--disable-sync", "--no-first-run",
                           f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()],
                          capture_output=True, text=True, timeout=120)
    widths = re.search(r"<title>([\d,]+)</title>", done.stdout)
    assert widths and all(int(width) > 500 for width in widths[1].split(",")) and widths[1].count(",") == 2
