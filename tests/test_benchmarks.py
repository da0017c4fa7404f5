"""The comparisons of heads: what they count, choose and print, and a small run of each script."""

import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.errors import TrainingDiverged
from f2c_plugin.evaluation.verification import save_bin
from f2c_plugin.method.gallery import GalleryNet
from f2c_plugin.models import NETWORKS
from f2c_plugin.synthetic.dataset import write_dataset
from tests.runs import IDENTITIES, IMAGES, run as run_training

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
FULL_FC, PAPER = "full FC, with the ramp", "F²C 100 %, as published"  # 3 and 4 units


@pytest.fixture(autouse=True)
def import_path(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture
def comparison():
    return importlib.import_module("comparison")


@pytest.fixture
def worlds():
    return importlib.import_module("worlds")


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Runs a script in an empty folder; returns the tables that it writes."""
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / name), *map(str, arguments), "--work", "work", "--json", "out.json"])
        importlib.import_module(name.removesuffix(".py")).main()
        return json.loads(Path("out.json").read_text())
    return run


@pytest.fixture
def results(comparison, tmp_path, monkeypatch):
    """Compares variants whose results are made up; returns the tables and counts the runs."""
    def compare(measured, *arguments, num_images=1000):
        made = comparison.parser("made up")
        parsed, variants = comparison.parsed(made, ["--jobs", "0", "--batch-size", "10", "--work", str(tmp_path / "work"),
                                                    *arguments])
        runs = []

        def train(run, folder):
            runs.append(run)
            return measured(run)
        compared = comparison.Comparison(parsed, variants, {"world": "made up"}, num_images, train)
        return compared, compared.tables(), runs
    return compare


# Labels.

def test_so_many_labels_are_wrong_and_each_other_identity_is_as_likely(worlds):
    labels = np.repeat(np.arange(50), 40)
    wrong = worlds.with_wrong_labels(labels, 0.2, np.random.default_rng(0))
    changed = wrong != labels
    assert changed.sum() == 400 and labels.tolist() == np.repeat(np.arange(50), 40).tolist()
    assert np.bincount(wrong[changed], minlength=50).min() > 0 and wrong.max() == 49
    assert np.bincount(labels[changed], minlength=50).max() < 25  # spread over all identities
    np.testing.assert_array_equal(wrong, worlds.with_wrong_labels(labels, 0.2, np.random.default_rng(0)))


@pytest.mark.parametrize("share, count", [(0.3, 3), (1.0, 10), (0.0, 0)])
def test_so_many_identities_are_split_into_halves(worlds, share, count):
    sizes = np.array([1, 2, 3, 10, 11, 1, 4, 5, 6, 7, 8, 9])  # ten with several images
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(12), sizes))
    split = worlds.with_split_identities(labels, share, np.random.default_rng(0))
    moved = split != labels
    assert sorted(set(split[moved])) == list(range(12, 12 + count)) and len(set(labels[moved])) == count
    for new in range(12, 12 + count):
        old, = set(labels[split == new])
        assert (split == new).sum() == sizes[old] // 2 and (split == old).sum() == sizes[old] - sizes[old] // 2


def test_a_spoiled_pack_has_the_same_images_with_other_labels_and_leaves_the_pack_as_it_was(worlds, faces, tmp_path):
    pack = Path(shutil.copytree(faces, tmp_path / "pack"))
    dataset = RecordDataset(pack)
    before = {path: path.read_bytes() for path in pack.rglob("*") if path.is_file()}
    folder = worlds.spoiled_pack(pack, 0.25, 0.5, seed=3)
    labels = worlds.spoiled(dataset.index.identity.astype(np.int64), 0.25, 0.5, 3)
    label_of = {dataset.face(i).tobytes(): label for i, label in enumerate(labels.tolist())}
    spoiled = RecordDataset(folder)
    assert len(spoiled) == len(dataset) == len(label_of) and spoiled.num_classes == 18
    assert all(label_of.pop(spoiled.face(i).tobytes()) == spoiled.labels(i) for i in range(len(spoiled)))
    assert spoiled.index.describe_conflict() is None and (folder / "property").read_text() == "18,112,112\n"
    assert (folder / "synth.bin").read_bytes() == (pack / "synth.bin").read_bytes()
    assert before == {path: path.read_bytes() for path in pack.rglob("*") if path.is_file()}
    written = (folder / "train.rec").stat().st_mtime_ns
    assert worlds.spoiled_pack(pack, 0.25, 0.5, seed=3) == folder and (folder / "train.rec").stat().st_mtime_ns == written
    assert worlds.spoiled_pack(pack, 0.25, 0.5, seed=4) != folder
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


# Metrics and tables.

def test_pairs_are_measured_as_by_looking_at_each(comparison):
    rng = np.random.default_rng(0)
    embeddings = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(60, 3))).float())
    identity = rng.integers(8, size=60)
    pairs = [(float(embeddings[i] @ embeddings[j]), identity[i] == identity[j]) for i in range(60) for j in range(i)]
    same = np.array([score for score, is_same in pairs if is_same])
    different = sorted((score for score, is_same in pairs if not is_same), reverse=True)
    found = comparison.pair_metrics(embeddings, identity)
    assert found["tar_1e-2"] == np.mean(same > different[len(different) // 100])
    assert found["tar_1e-3"] == np.mean(same > different[1]) and found["tar_1e-4"] is None
    assert found["auc"] == pytest.approx(np.mean(same[:, None] > different), abs=1e-6)
    assert comparison.auc(np.array([0.5, 0.5, 0.5, 0.2]), np.array([True, True, False, False])) == 0.75
    assert set(comparison.pair_metrics(embeddings[:3], np.zeros(3)).values()) == {None}


def test_the_table_has_means_and_deviations_blanks_and_one_table_where_two_are_equal(comparison):
    columns = [comparison.Column("lr", "lr", comparison.number), comparison.Column("classes", "classes", comparison.number),
               comparison.Column("tar", "TAR", comparison.percent), comparison.Column("auc", "AUC", comparison.percent),
               comparison.Column("none", "none", comparison.percent), comparison.Column("mb", "MB", comparison.median)]
    runs = [dict(lr=0.1, classes=10000, tar=0.5, mb=1000), dict(lr=0.1, classes=10000, tar=0.52, mb=3000, auc=None)]
    rows = {"a": {"by_lr": runs[:1], "runs": runs}, "b": {"by_lr": runs[:1], "runs": [dict(lr=0.2, tar=0.25)]}}
    tables = [dict(passes=1.0, equal="images", rows=rows), dict(passes=1.0, equal="compute", rows=rows),
              dict(passes=4.0, equal="images", rows={})]
    assert comparison.markdown(tables, columns, keep_empty=columns[3:4]) == """\
1 pass of full FC, equal images and equal compute:

| head | lr | classes | TAR | AUC | MB |
|---|---|---|---|---|---|
| a | 0.1 | 10,000 | 51.00 % ± 1.41 |  | 2,000 |
| b | 0.2 |  | 25.00 % |  |  |

4 passes of full FC, equal images:

| head | AUC |
|---|---|
"""


# Runs.

def test_each_variant_has_its_own_best_learning_rate_on_the_first_seed(results):
    def measured(run):
        best = 0.2 if run.variant == FULL_FC else 0.05
        return {"tar_1e-3": (run.lr == best) / 2 + run.seed / 100, "accuracy_synth": run.lr}
    _, tables, runs = results(measured, "--variants", FULL_FC, PAPER, "--lr", "0.05", "0.1", "0.2", "--seeds", "3")
    assert len(runs) == 3 * 5  # full FC has the same steps in both tables
    for table in tables:
        for variant, lr in (FULL_FC, 0.2), (PAPER, 0.05):
            row = table["rows"][variant]
            assert [run["lr"] for run in row["by_lr"]] == [0.05, 0.1, 0.2] and {run["lr"] for run in row["runs"]} == {lr}
            assert [run["seed"] for run in row["runs"]] == [0, 1, 2]
            assert [run["tar_1e-3"] for run in row["runs"]] == pytest.approx([0.5, 0.51, 0.52])


def test_without_unseen_identities_the_learning_rate_is_chosen_by_accuracy(results):
    _, (table, _), _ = results(lambda run: {"tar_1e-3": None, "accuracy_a": run.lr, "accuracy_b": -2 * (run.lr == 0.2)},
                               "--variants", FULL_FC, "--lr", "0.05", "0.1", "0.2")
    assert table["rows"][FULL_FC]["runs"][0]["lr"] == 0.1


def test_a_run_that_was_cut_off_begins_anew(results):
    compared, _, runs = results(lambda run: {"tar_1e-3": 0.5}, "--variants", FULL_FC)
    folder = compared.folder(runs[0])
    (folder / "result.json").unlink()
    (folder / "checkpoint_000000000010.pt").write_bytes(b"of a run that was killed")
    _, _, again = results(lambda run: {"tar_1e-3": 0.5}, "--variants", FULL_FC)
    assert again == runs and [file.name for file in sorted(folder.iterdir())] == ["result.json", "run.json"]


def test_equal_compute_is_counted_in_units(results):
    _, tables, _ = results(lambda run: {"tar_1e-3": 0.5}, "--variants", FULL_FC, PAPER, PAPER + ", not symmetric", "F²C 10 %",
                           "--passes", "1", "5")
    steps = {(table["passes"], table["equal"]): [row["runs"][0]["steps"] for row in table["rows"].values()] for table in tables}
    assert steps == {(1, "images"): [100] * 4, (1, "compute"): [100, 75, 150, 100],
                     (5, "images"): [500] * 4, (5, "compute"): [500, 375, 750, 500]}
    assert [row["runs"][0]["units"] for row in tables[0]["rows"].values()] == [3, 4, 2, 3]
    assert tables[1]["rows"][PAPER]["runs"][0]["passes"] == 0.75


def test_results_are_kept_with_their_commit_and_those_of_other_settings_apart(results, comparison):
    first, _, runs = results(lambda run: {"tar_1e-3": 0.5}, "--variants", FULL_FC)
    again, tables, none = results(lambda run: {"tar_1e-3": 0.7}, "--variants", FULL_FC)
    assert len(runs) == 1 and not none
    found, = tables[0]["rows"][FULL_FC]["runs"]
    assert found["tar_1e-3"] == 0.5 and found["versions"]["torch"] == torch.__version__
    assert found["commit"] is None or re.search(r"[0-9a-f]{12}", found["commit"])
    folder = first.folder(runs[0])
    first.setting["world"] = "other"
    assert first.folder(runs[0]) != folder != again.folder(runs[0]._replace(lr=0.3))


def test_a_run_that_fails_names_its_folder_and_error_and_the_others_go_on(results, comparison, capsys):
    def measured(run):
        if run.lr == 0.2 or run.seed == 1:
            raise TrainingDiverged("not finite after step 3")
        return {"tar_1e-3": 0.5}
    compared, (table, _), _ = results(measured, "--variants", FULL_FC, "--lr", "0.1", "0.2", "--seeds", "2")
    assert [run["seed"] for run in table["rows"][FULL_FC]["runs"]] == [0] and len(table["rows"][FULL_FC]["by_lr"]) == 1
    with pytest.raises(SystemExit) as exit:
        comparison.main(compared, comparison.SETTING_COLUMNS)
    for run in comparison.Run(FULL_FC, 100, 0.2, 0), comparison.Run(FULL_FC, 100, 0.1, 1):
        assert f"{comparison.describe(run)}: {compared.folder(run)}: not finite after step 3" in str(exit.value)
    assert f"| {FULL_FC} | 0.1 |" in capsys.readouterr().out


@pytest.mark.parametrize("option, value, expected", [
    ("--wrong-labels", "20.0", "from 0 to 1"), ("--split", "-0.1", "from 0 to 1"), ("--pool-rate", "0.0", "above 0, up to 1"),
    ("--passes", "0.0", "above 0"), ("--lr", "-0.1", "above 0"), ("--seeds", "0", "at least 1"), ("--jobs", "-1", "at least 0"),
    ("--batch-size", "1", "at least 2")])
def test_options_out_of_range_are_refused(results, capsys, option, value, expected):
    with pytest.raises(SystemExit):
        results(None, option, value)
    assert f"{option} {value}: must be {expected}" in capsys.readouterr().err


def test_an_unknown_variant_is_refused_with_those_there_are(results, capsys):
    with pytest.raises(SystemExit):
        results(None, "--variants", "F²C 20 %")
    assert "--variants 'F²C 20 %': must be of full FC, full FC, with the ramp, Partial FC 1" in capsys.readouterr().err
    results(lambda run: {"tar_1e-3": 0.5}, "--variants", "F²C 20 %", "--pool-rate", "0.2")


def test_another_margin_is_that_of_every_head_and_of_other_results(results, comparison, monkeypatch, capsys):
    first, *_ = results(lambda run: {"tar_1e-3": 0.5}, "--variants", FULL_FC)
    other, *_ = results(lambda run: {"tar_1e-3": 0.6}, "--variants", FULL_FC, "--margin", "adaface")
    assert comparison.setting_of(first.arguments).items() < comparison.setting_of(other.arguments).items()
    vectors = importlib.import_module("vectors")
    for variant in FULL_FC, "F²C 100 %":
        cfg = comparison.config(other.arguments, comparison.Run(variant, 1, 0.1, 0), 20, network="mlp")
        monkeypatch.setitem(NETWORKS, "mlp", lambda num_features, fp16: vectors.Perceptron(num_features))
        with vectors.process_group():
            head = vectors.build_state(cfg, torch.device("cpu"), 1).head
        assert head.schedule.margin.adaptive and head.quality
    with pytest.raises(SystemExit):
        results(None, "--margin", "adaface", "--variants", "Partial FC 1")
    assert "--margin adaface: arcface_torch's Partial FC has no such margin" in capsys.readouterr().err


# The scripts.

@pytest.fixture
def pack(faces, tmp_path):
    """The pack ``faces`` with a second verification set and an unseen pack beside it."""
    folder = Path(shutil.copytree(faces, tmp_path / "pack"))
    write_dataset(tmp_path / "pack_unseen", 8, 3, num_pairs=2, seed=1, processes=1)
    dataset = RecordDataset(tmp_path / "pack_unseen")
    images = [bytes(dataset.records.image_record(int(offset)).image) for offset in dataset.index.offsets]
    save_bin(folder / "other.bin", images, [number % 3 == 0 for number in range(12)])
    return folder


SMALL = "--batch-size", "12", "--embedding-size", "8", "--pool-rate", "1"


def test_accuracy_on_a_pack_of_ones_own(script, pack, capsys):
    arguments = "--data", pack, *SMALL, "--variants", FULL_FC, PAPER, "--passes", "2", "--equal", "compute"
    found = script("accuracy.py", *arguments, "--jobs", "2", "--plot", "plot.png")
    table, = found["tables"]
    assert table["equal"] == "compute" and not found["failed"]
    assert found["setting"] | {"pack": 0, "unseen": 0} == {
        "batch_size": 12, "embedding_size": 8, "scale": 32.0, "margin_list": [1.0, 0.0, 0.35], "long_tail": False,
        "wrong_labels": 0.0, "split": 0.0, "network": "tiny", "data": "pack", "pack": 0, "images": IDENTITIES * IMAGES,
        "identities": IDENTITIES, "unseen": 0, "pairs": {"other": 12, "synth": 60}}
    full_fc, paper = (table["rows"][name]["runs"][0] for name in (FULL_FC, PAPER))
    assert (full_fc["steps"], full_fc["passes"], full_fc["classes"]) == (20, 2, IDENTITIES) and full_fc["peak_mb"]
    assert (paper["steps"], paper["passes"]) == (15, 1.5) and paper["gallery_accuracy"]
    assert 0 <= full_fc["tar_1e-2"] <= 1 and full_fc["tar_1e-3"] is None  # 252 different pairs
    assert [images for images, _ in full_fc["curve"]] == [60, 120, 180, 240]
    header = "accuracy, other | accuracy, synth | TAR at FAR 1e-2 | TAR at FAR 1e-3 | TAR at FAR 1e-4 | AUC | accuracy of the"
    assert header in capsys.readouterr().out and Path("plot.png").read_bytes().startswith(b"\x89PNG")
    results = {path: path.stat().st_mtime_ns for path in Path("work").glob("*/result.json")}
    assert len(results) == 2 and script("accuracy.py", *arguments)["tables"] == found["tables"]
    assert results == {path: path.stat().st_mtime_ns for path in Path("work").glob("*/result.json")}


def test_a_student_has_its_teacher_and_results_of_their_own(script, pack, capsys):
    arguments = "--data", pack, *SMALL, "--passes", "1", "--jobs", "0", "--val-targets", "--equal", "images"
    plain, student = "F²C 100 %", "F²C 100 %, distillation"
    with pytest.raises(SystemExit):
        script("accuracy.py", *arguments, "--variants", student)
    assert f"--variants {student!r}: needs --teacher MODEL" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script("accuracy.py", *arguments, "--variants", student, "--teacher", "nowhere.pt")
    assert "--teacher nowhere.pt: there is no such file" in capsys.readouterr().err
    script("accuracy.py", *arguments, "--variants", plain)
    teacher, = Path("work").glob("*/model.pt")
    found = script("accuracy.py", *arguments, "--variants", plain, student, "--teacher", teacher)
    folders = set(Path("work").iterdir())
    assert len(folders) == 2 and found["tables"][0]["rows"][student]["runs"][0]["auc"]
    other, = folders - {teacher.parent}
    assert not all(map(torch.equal, torch.load(teacher).values(), torch.load(other / "model.pt").values()))
    script("accuracy.py", *arguments, "--variants", student, "--teacher", other / "model.pt")
    assert len(set(Path("work").iterdir())) == 3


def test_parts_of_a_pack_are_trained_on_for_as_many_images_as_the_whole(script, pack, capsys):
    """Of an identity's ten images five are kept, where five are copies of the others."""
    found = script("thinning.py", "--data", pack, *SMALL, "--variants", "F²C 100 %", "--passes", "2", "--val-targets",
                   "--keep", "0.5", "--copies", "0.5")
    table, = found["tables"]
    assert list(table["rows"]) == [f"F²C 100 %, {of}" for of in ("all images", "chosen", "at random")]
    assert [row["runs"][0]["steps"] for row in table["rows"].values()] == [20] * 3
    assert [row["runs"][0]["passes"] for row in table["rows"].values()] == [2, 4, 4]
    copied, = Path(pack).parent.glob("pack_copies-0.5_seed-0_*")
    whole = RecordDataset(pack)
    origin = {whole.face(i).tobytes(): i for i in range(len(whole))}
    originals = [i for i in range(IDENTITIES * IMAGES) if RecordDataset(copied).face(i).tobytes() in origin]
    assert len(originals) == IDENTITIES * IMAGES // 2
    for name in "by_*", "at-random":
        part, = Path("work").glob(f"pack_copies*_0.5_{name}")
        kept = RecordDataset(part)
        assert len(kept) == IDENTITIES * IMAGES // 2 and kept.num_classes == IDENTITIES
    thinning = importlib.import_module("thinning")
    kept = thinning.at_random(np.repeat(np.arange(5), [1, 2, 3, 4, 10]), 0.5, np.random.default_rng(0))
    assert kept.sum() == 10 and kept[0] and len({*np.repeat(np.arange(5), [1, 2, 3, 4, 10])[kept]}) == 5


def test_two_passes_of_a_comparison_are_two_epochs_of_the_trainer(script, pack, config):
    script("accuracy.py", "--data", pack, *SMALL, "--variants", FULL_FC, "--passes", "2", "--jobs", "0", "--val-targets")
    run_training(config(head="softmax", softmax_ramp=True, rec=str(pack), num_epoch=2, embedding_size=8, lr=0.1, seed=0,
                        scale=32.0, margin_list=(1.0, 0.0, 0.35), val_targets=[]))
    folder, = Path("work").iterdir()
    ours, trained = (torch.load(path) for path in (folder / "model.pt", "out/model.pt"))
    assert all(torch.equal(value, trained[name]) for name, value in ours.items())


def test_without_an_unseen_pack_its_columns_are_blank_and_wrong_labels_are_of_the_training_set_only(script, pack, capsys):
    shutil.rmtree(f"{pack}_unseen")
    found = script("accuracy.py", "--data", pack, *SMALL, "--variants", FULL_FC, "--jobs", "0", "--val-targets", "synth",
                   "--wrong-labels", "0.1", "--split", "0.5")
    assert found["setting"]["identities"] == 18 and found["setting"]["data"].startswith("pack_wrong-0.1_split-0.5_seed-0_")
    result, = found["tables"][0]["rows"][FULL_FC]["runs"]
    assert result["classes"] == 18 and "tar_1e-2" not in result and 0 < result["accuracy_synth"] <= 1
    printed = capsys.readouterr().out
    assert "TAR at FAR 1e-4 | AUC | images/s" in printed and re.search(r"% \|(  \|){4} [\d,]+ \| [\d,]+ \|\n", printed)
    with pytest.raises(SystemExit):
        script("accuracy.py", "--data", pack, "--val-targets")
    with pytest.raises(SystemExit, match="accuracy.py: .*nowhere"):
        script("accuracy.py", "--data", "nowhere")


def test_vectors(script, monkeypatch, capsys):
    vectors = importlib.import_module("vectors")
    monkeypatch.setattr(vectors, "UNSEEN", (30, 5))
    monkeypatch.setattr(vectors, "CHUNK", 100)
    world = "--identities", "50", "--images", "4", "--long-tail", "--wrong-labels", "0.2", "--split", "0.2", "--noise", "0.1"
    found = script("vectors.py", *world, *SMALL, "--pool-rate", "0.2", "--variants", FULL_FC, "F²C 20 %",
                   "F²C 20 %, as published", "--jobs", "0", "--seeds", "2", "--passes", "2", "--equal", "compute")
    table, = found["tables"]
    several = np.bincount(vectors.power_law(50, 4)) @ (np.arange(len(np.bincount(vectors.power_law(50, 4)))) > 1)
    assert table["rows"][FULL_FC]["runs"][0]["classes"] == 50 + round(0.2 * several)
    assert [row["runs"][0]["steps"] for row in table["rows"].values()] == [32, 32, 24]
    for row in table["rows"].values():
        assert len(row["runs"]) == 2 and all(0.5 < run["auc"] < 1 and run["tar_1e-2"] > 0.01 for run in row["runs"])
        assert row["runs"][0]["auc"] != row["runs"][1]["auc"]
    images, = Path("work").glob("*.npy")
    stored = np.load(images)
    assert stored.shape == (200, 128) and stored.dtype == np.float16 and 0.5 < stored.std() < 2
    assert "| F²C 20 % | 0.1 | 1" in capsys.readouterr().out


def test_images_of_an_identity_are_alike_and_those_of_unseen_identities_are_others(tmp_path):
    world = importlib.import_module("vectors").World(noise=0.1, nuisance=0.3, seed=0)
    world.write(tmp_path / "images.npy", np.repeat(np.arange(100), 5))
    seen = np.load(tmp_path / "images.npy").astype(np.float64)
    unseen, labels = world.unseen()
    for images, of in (seen, np.repeat(np.arange(100), 5)), (unseen.double().numpy(), labels):
        unit = images / np.linalg.norm(images, axis=1, keepdims=True)
        cosine, same = unit @ unit.T, of[:, None] == of
        assert cosine[same].mean() > 0.7 > 0.2 > cosine[~same].mean() and np.isfinite(cosine).all()
    unit = [images / np.linalg.norm(images, axis=1, keepdims=True) for images in (seen, unseen.double().numpy())]
    assert (unit[0] @ unit[1].T).max() < 0.9 and (unit[0] @ unit[0].T - np.eye(500)).max() > 0.9


@pytest.mark.parametrize("variant", [FULL_FC, "F²C 100 %", PAPER, PAPER + ", not symmetric", "DCQ 100 %",
                                     "F²C 100 %, small loss", "F²C 100 %, sub-centres"])
def test_the_units_of_compute_are_what_a_step_does(comparison, monkeypatch, variant):
    vectors = importlib.import_module("vectors")
    counted = {"probe": 0, "gallery": 0}

    def perceptron(num_features, fp16):
        net = vectors.Perceptron(num_features)
        net.register_forward_hook(lambda net, images, _: counted.update(probe=counted["probe"] + len(images[0])))
        return net

    def gallery(self, images, forward=GalleryNet.forward):
        before = counted["probe"]
        embedded = forward(self, images)
        counted.update(probe=before, gallery=counted["gallery"] + len(images))
        return embedded
    monkeypatch.setattr(GalleryNet, "forward", gallery)
    monkeypatch.setitem(NETWORKS, "counting", perceptron)
    arguments = comparison.parser("").parse_args(["--batch-size", "8", "--embedding-size", "4", "--pool-rate", "1"])
    cfg = comparison.config(arguments, comparison.Run(variant, 1, 0.1, 0), 20, network="counting")
    with vectors.process_group():
        state = vectors.build_state(cfg, torch.device("cpu"), 1)
        vectors.train_step(state, torch.randn(8, 128), torch.arange(8))
    units = (3 * counted["probe"] + counted["gallery"]) / 8
    assert units == comparison.units(comparison.variants_at([1.0])[variant]) and counted["probe"] in (8, 4)


def test_the_table_of_all_worlds_in_the_docs_is_that_of_the_committed_results(tmp_path):
    learning = importlib.import_module("learning")
    table = learning.table()
    assert table in (BENCHMARKS.parent / "docs" / "benchmarks.md").read_text()
    for file in learning.RESULTS.glob("learning_*.json"):
        assert learning.world(json.loads(file.read_text())["setting"]) in table
    learning.plot(tmp_path / "worlds.png")
    assert (tmp_path / "worlds.png").stat().st_size > 10_000


def test_the_neighbours_tables_in_the_docs_are_those_of_the_committed_results():
    methods = importlib.import_module("methods")
    tables = methods.tables()
    assert tables in (BENCHMARKS.parent / "docs" / "methods.md").read_text()
    for file in methods.RESULTS.glob("methods_*.json"):
        report = json.loads(file.read_text())
        kind, _, world = methods.world(report["setting"]).partition(", ")
        assert f"| {kind} |" in tables and f"| {world}, " in tables
        for variant, row in report["tables"][0]["rows"].items():
            assert f"| {variant}" in tables and f"{100 * np.mean([run['tar_1e-3'] for run in row['runs']]):.1f}" in tables
