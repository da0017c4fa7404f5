"""The report's page, for runs of arcface_torch and the built-in trainer, also in a real browser."""

import html
import json
import re
import shutil
import subprocess
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from f2c_plugin.errors import ReportError
from f2c_plugin.tools.plotting import save_figure
from f2c_plugin.tools.report import Run, report
from f2c_plugin.tools.runs import distinct_names

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


def write_runs(folder):
    """A run of arcface_torch, and one of the built-in trainer, whose name must not become an HTML tag."""
    theirs, ours = folder / "theirs", folder / "<ours>"
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


@pytest.fixture
def runs(tmp_path):
    return write_runs(tmp_path)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """(the page of both runs, what was printed), for tests that change neither: drawing takes seconds."""
    folder = tmp_path_factory.mktemp("compared")
    with redirect_stdout(StringIO()) as printed:
        page = report(write_runs(folder), folder / "out")
    return page, printed.getvalue()


def test_a_run_of_arcface_torch_is_read_from_its_log(runs):
    run = Run.read(runs[0])
    assert run.config == {"margin_list": "(1.0, 0.0, 0.4)", "interclass_filtering_threshold": "0", "head": "f2c_dcp",
                          "fp16": "False", "total_batch_size": "16"}
    assert run.series("loss") == [(160, 140.25)] and run.series("lfw/accuracy") == [(320, 0.6125)]
    assert run.series("lfw/gallery_accuracy") == [(320, 0.6325)]
    assert run.series("f2c/positive_cosine") == [(160, -0.031)] and run.series("f2c/age") == [(160, 0.8)]
    assert run.series("f2c/pool_hit_rate") == [(160, 0.9)]
    assert not run.series("f2c/hard_negative_cosine")


def test_a_log_that_several_trainings_have_appended_to_is_that_of_the_last_that_began_anew(runs):
    log = runs[0] / "training.log"

    def started(resume, loss):
        fp16 = "Training: 2026-11-22 12:25:32,124-: fp16"
        config = f"Training: 2026-11-22 12:25:32,124-: resume                   {resume}\n{fp16}"
        return ARCFACE_TORCH_LOG.replace(fp16, config).replace("140.2500", loss)

    first = ARCFACE_TORCH_LOG.replace("Global Step: 10", "Global Step: 90")
    log.write_text(first + started("False", "7.5000"))
    assert Run.read(runs[0]).series("loss") == [(160, 7.5)]
    log.write_text(first + started("False", "7.5000") + started("True", "6.5000").replace("Global Step: 10", "Global Step: 30"))
    assert Run.read(runs[0]).series("loss") == [(160, 7.5), (480, 6.5)]


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


def test_folders_that_cannot_be_shown_are_left_out_with_the_reason(runs, tmp_path, capsys):
    (tmp_path / "a<b").mkdir()
    (tmp_path / "crashed").mkdir()
    (tmp_path / "crashed/training.log").write_text("2026-11-22 rank_id: 0\n")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/training.log").touch()
    (tmp_path / "damaged/history.jsonl").write_text("{")
    bad = [tmp_path / name for name in ("a<b", "crashed", "damaged", "nowhere")]
    page = report([*bad, *runs, runs[0] / "training.log"])
    assert page.parent == runs[0] and not (tmp_path / "nowhere").exists()
    text, printed = page.read_text(), capsys.readouterr().out
    assert "<h1>theirs, &lt;ours&gt;</h1>" in text and "<h2>Left out</h2>" in text
    for reason in (f"{bad[0]}: no training.log; give", f"{bad[1]}: the training has not logged a step yet",
                   f"{bad[2]}/history.jsonl: damaged", f"{bad[3]}: no training.log",
                   f"{runs[0]}/training.log: a file: give the output folder of a training, {runs[0]}"):
        assert f"<li>{html.escape(reason)}" in text and f"\nLeft out: {reason}" in printed
    with pytest.raises(ReportError) as refused:
        report(bad)
    assert [line.split(": ")[0] for line in str(refused.value).splitlines()] == [
        *map(str, bad[:2]), f"{bad[2]}/history.jsonl", str(bad[3])]
    assert "Left out" not in report(runs, tmp_path / "out").read_text()


def test_a_log_of_arcface_torch_without_its_batch_size_is_counted_by_its_speeds_and_times(runs):
    log = runs[0] / "training.log"
    log.write_text("".join(
        f"Training: 2026-11-22 12:25:{second:06.3f}-Speed {speed} samples/sec   Loss 1.0   LearningRate 0.1   Epoch: 0   "
        f"Global Step: {step}   Required: 0 hours\n".replace(".", ",", 1)
        for second, step, speed in ((1, 20, 700), (11, 30, 640), (36, 40, 256), (41.003, 50, 1279.2))))
    run = Run.read(runs[0])
    assert run.derived_batch == 640 and run.images_seen == 50 * 640
    assert run.clock[1][-1] * 3600 == pytest.approx(20 * 640 / 700 + 10 + 25 + 5, rel=0.01)
    log.write_text(log.read_text().splitlines()[0])
    assert Run.read(runs[0]).derived_batch == 1


def test_the_page_compares_runs_and_holds_its_pictures(compared):
    page, _ = compared
    text = page.read_text()
    assert len(re.findall('src="data:image/png;base64,', text)) == 4 and "http" not in text
    assert "<h1>theirs, &lt;ours&gt;</h1>" in text and "75.00%" in text and "softmax" in text and "1,234" in text
    assert sorted(path.name for path in page.parent.iterdir()) == ["curves.png", "curves_hours.png", "report.html", "roc.png",
                                                                     "scores.png"]


def table(page):
    """The table of runs, {run: {column: cell}}, from a page that an XML parser can read; columns as "group: column"."""
    root = ElementTree.fromstring(page.read_text().removeprefix("<!DOCTYPE html>"))
    (top, below), rows = (root.findall(f".//table[@class='runs']/{part}/tr") for part in ("thead", "tbody"))
    groups = [text(cell) for cell in top[1:] for _ in range(int(cell.attrib["colspan"]))]
    columns = [f"{group}: {text(cell)}" for group, cell in zip(groups, below, strict=True)]
    return {text(row[0]): dict(zip(columns, map(text, row[1:]), strict=True)) for row in rows}


def text(element):
    return "".join(element.itertext())


def test_the_table_has_a_row_for_each_run_with_the_settings_that_differ(runs, tmp_path):
    for name, lr in ("lr0.1", 0.1), ("lr0.2", 0.2), ("lr0.3", 0.3):
        shutil.copytree(runs[1], tmp_path / name / "f2c_demo")
        with open(tmp_path / name / "f2c_demo/training.log", "a") as log:
            log.write(f"2026-11-22 12:25:32,124 : lr                       {lr}\n"
                      f"2026-11-22 12:25:32,124 : output                   {name}\n")
    (tmp_path / "lr0.3/f2c_demo/training.log").write_text("")  # a version that records no config
    np.savez(tmp_path / "lr0.2/f2c_demo/synth_scores.npz", scores=np.linspace(1, 0, 4), same=np.arange(4) < 2)
    last = {"step": 9, "images": 72, "synth/accuracy": 1.0, "f2c/pool_hit_rate": 0.25, "f2c/evictions": 3}
    with open(tmp_path / "lr0.2/f2c_demo/history.jsonl", "a") as history:
        history.write("\n" + json.dumps(last))
    found = table(report([tmp_path / name / "f2c_demo" for name in ("lr0.1", "lr0.2", "lr0.3")], tmp_path / "out"))
    assert list(found) == ["lr0.1", "lr0.2", "lr0.3"]
    settings = {name: {column: cell for column, cell in row.items() if column.startswith("settings")}
                for name, row in found.items()}
    assert settings == {name: {"settings that differ: lr": value} for name, value in (
        ("lr0.1", "0.1"), ("lr0.2", "0.2"), ("lr0.3", "not recorded"))}
    assert found["lr0.2"].items() >= {"synth: last accuracy": "100.00%", "synth: best accuracy": "100.00%",
                                      ": images seen": "72",
                                      "synth: TAR at FAR 0.01": "not resolved", "pool: hit rate": "25.0%",
                                      "pool: evictions per step": "3.0", ": images/s (median)": "99"}.items()
    assert found["lr0.1"].items() >= {"pool: hit rate": "", ": peak memory of rank 0, MB": "1,234"}.items()
    assert "synth: TAR at FAR 0.01" in found["lr0.1"] and "synth: TAR at FAR 0.001" not in found["lr0.1"]  # of 200 pairs


def test_the_geometry_of_the_embeddings_is_in_the_table_and_among_the_curves(runs, tmp_path, monkeypatch):
    line = "2026-11-22 12:25:44,000 [gallery_lfw][20]Accuracy-Flip: 0.7+-0.02  TAR at FAR 1e-3: not resolved  XNorm: 9.9"
    with open(runs[0] / "training.log", "a") as log:
        log.write(f"{line}  alignment: 0.8125  divergence: -0.0125  concentration: 0.0500\n")
    with open(runs[1] / "history.jsonl", "a") as history:
        history.write('\n{"step": 9, "images": 72, "synth/accuracy": 0.8, "synth/alignment": 0.5, "synth/divergence": 0.25}')
    titles = []

    def save(figure, path):
        titles.extend(axis.get_title() for axis in figure.axes)
        return save_figure(figure, path)
    monkeypatch.setattr("f2c_plugin.tools.report.save_figure", save)
    found = table(report(runs, tmp_path / "out"))
    assert found["theirs"].items() >= {"gallery_lfw: alignment": "0.812", "gallery_lfw: divergence": "-0.013",
                                       "gallery_lfw: concentration": "0.050"}.items()
    assert found["<ours>"]["synth: divergence"] == "0.250" and "synth: concentration" not in found["<ours>"]
    assert {"gallery_lfw: concentration", "synth: alignment"} <= set(titles) and "lfw: alignment" not in titles


def test_the_best_accuracy_is_marked(runs, tmp_path):
    shutil.copytree(runs[1], tmp_path / "better")
    with open(tmp_path / "better/history.jsonl", "a") as history:
        history.write('\n{"step": 9, "images": 72, "synth/accuracy": 1.0}')
    page = report([runs[1], tmp_path / "better"], tmp_path / "out").read_text()
    assert re.findall('<td class="best">(.*?)</td>', page) == ["100.00%", "100.00%"]


@pytest.mark.parametrize("folders, names", [
    (["x/lr1/f2c_demo", "x/lr2/f2c_demo"], ["lr1", "lr2"]), (["x/lr1/s1/out", "x/lr2/s1/out"], ["lr1", "lr2"]),
    (["x/a/s1/out", "x/a/s2/out", "x/b/s1/out"], ["a/s1", "s2", "b/s1"]), (["x/f2c_demo"], ["f2c_demo"])])
def test_names_are_the_shortest_part_of_the_paths_that_tells_them_apart(folders, names):
    assert distinct_names(folders) == names


def test_a_run_that_is_named_twice_is_one(runs, tmp_path):
    assert "<h1>theirs</h1>" in report([runs[0], f"{runs[0]}/"], tmp_path / "out").read_text()


def test_hours_are_those_of_the_logged_speeds(runs):
    run = Run.read(runs[1])
    images, hours = run.clock
    assert images.tolist() == [0, *range(8, 65, 8)] and hours[-1] == pytest.approx(64 / 99 / 3600)
    assert run.facts["hours of training"] == "0.00018"


def test_a_log_is_searched_for_what_is_not_finite(runs):
    with open(runs[1] / "training.log", "a") as log:
        log.write("2026-11-22 12:25:33,124 the loss is nan at step 4: try a smaller lr or fp16=False\n"
                  + 2 * "2026-11-22 12:25:33,124 step 3 is skipped because its gradient is not finite (1 so far)\n")
    with open(runs[0] / "training.log", "a") as log:
        log.write(ARCFACE_TORCH_LOG.replace("Loss 140.2500", "Loss nan").replace("Step: 10", "Step: 30"))
    theirs, ours = map(Run.read, runs)
    assert (ours.not_finite_losses, ours.skipped_steps) == ([4], 1) and theirs.not_finite_losses == [30]
    assert theirs.last("lfw/accuracy_std") == 0.02
    report(runs)


def test_tar_in_an_old_history_is_not_drawn_where_the_pairs_do_not_resolve_it(runs):
    with open(runs[1] / "history.jsonl", "a") as history:
        history.write('\n{"step": 9, "images": 72, "synth/accuracy": 0.8, "synth/tar_at_far_1e-3": 0.5}')
    assert not Run.read(runs[1]).series("synth/tar_at_far_1e-3")
    np.savez(runs[1] / "synth_scores.npz", scores=np.zeros(2000), same=np.arange(2000) % 2 == 0)
    assert Run.read(runs[1]).series("synth/tar_at_far_1e-3") == [(72, 0.5)]


def test_what_stands_out_is_on_the_page_and_in_the_terminal(compared, runs, tmp_path):
    page, printed = compared
    sentence = "The runs have seen different numbers of images, from 64 (<ours>) to 320 (theirs)"
    assert html.escape(sentence) in page.read_text() and sentence in printed
    assert "<h2>What stands out</h2>\n<ul>\n<li>Nothing.</li>" in report([runs[1]], tmp_path / "one").read_text()


def shown(page, tmp_path, script):
    """What an expression is worth in a page that a real browser has opened."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("NOT SHOWN IN A BROWSER: install chromium")
    page.write_text(page.read_text().replace("</body>", "<script>onload = () => { document.title = JSON.stringify("
                                             f"{script}) }}</script></body>"))
    done = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                           "--disable-component-update", "--disable-sync", "--no-first-run", "--window-size=1200,900",
                           f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()],
                          capture_output=True, text=True, timeout=120)
    title = re.search("<title>(.+?)</title>", done.stdout)
    assert title
    return json.loads(html.unescape(title[1]))


def test_a_real_browser_shows_it(compared, tmp_path):
    page = Path(shutil.copy(compared[0], tmp_path))
    # An image that was not decoded has no size.
    widths = shown(page, tmp_path, "[...document.images].map(image => image.naturalWidth)")
    assert len(widths) == 4 and all(width > 500 for width in widths)


def test_a_narrow_window_keeps_pictures_readable_in_boxes_that_scroll(compared, tmp_path):
    page = Path(shutil.copy(compared[0], tmp_path))
    page.write_text(page.read_text().replace("<body>", '<body style="width: 460px">'))
    widths, fits = shown(page, tmp_path, "[[...document.images].filter(image => image.offsetWidth).map("
                         "image => [image.offsetWidth, image.naturalWidth, image.parentElement.offsetWidth]), "
                         "document.documentElement.scrollWidth <= innerWidth]")
    assert fits and [width for width, natural, box in widths] == [min(natural, 900) for _, natural, _ in widths]
    assert all(box <= 460 for *_, box in widths)


def test_a_browser_switches_the_curves_and_keeps_ten_runs_within_its_window_without_a_network(runs, tmp_path):
    for number in range(10):
        ten = tmp_path / f"sweep/{number}_{'name ' * 4}/f2c_demo"
        shutil.copytree(runs[number % 2], ten)
        with open(ten / "training.log", "a") as log:
            log.writelines(f"2026-11-22 12:25:32,124 : key_{key}                      {number}\n" for key in range(15))
    visible = "[...document.images].slice(0, 2).map(image => image.offsetWidth > 0)"
    page = report(sorted((tmp_path / "sweep").glob("*/f2c_demo")), tmp_path / "out")
    before, after, rows, fits, loaded = shown(
        page, tmp_path, f"[{visible}, (document.getElementById('hours').click(), {visible}), "
        "document.querySelectorAll('.runs tbody tr').length, document.documentElement.scrollWidth <= innerWidth, "
        "performance.getEntriesByType('resource').map(each => each.name).filter(name => !name.startsWith('data:'))]")
    assert before == [True, False] and after == [False, True] and rows == 10 and fits and loaded == []
