"""benchmarks/fine_tuning.py on a small pack: what goes on from what, and that nothing is trained twice."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import torch

from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.models import get_model
from f2c_plugin.synthetic.dataset import write_dataset
from f2c_plugin.trainer.check import check
from tests.runs import IDENTITIES, IMAGES

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
KEYS = ["--epochs", "1", "--lr", "0.01", "0.02", "--batch-size", "6", "--embedding-size", "16", "--work", "work",
        "--seeds", "2", "--json", "out.json"]


def test_pretrained_nets_go_on_with_the_whole_pack_beside_nets_from_scratch(faces, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(BENCHMARKS)
    write_dataset(tmp_path / "unseen", 4, 3, num_pairs=2, seed=1, processes=1)
    monkeypatch.setattr(sys, "argv", ["fine_tuning.py", "--data", str(faces), "--unseen", "unseen", *KEYS])
    fine_tuning = importlib.import_module("fine_tuning")
    monkeypatch.setattr(fine_tuning.comparison, "FARS", ("1e-2", "1e-3"))
    monkeypatch.setattr(fine_tuning.comparison, "tar_at_far", lambda scores, same, far: float(scores[same].mean()))
    trained = []

    def train(cfg, train=fine_tuning.train):
        trained.append(cfg)
        if cfg.save_all_states:  # what others go on from
            return train(cfg)
        check(cfg)
        torch.manual_seed(len(trained))
        Path(cfg.output).mkdir(parents=True)
        torch.save(get_model(cfg.network, cfg.embedding_size).state_dict(), Path(cfg.output) / "model.pt")
    monkeypatch.setattr(fine_tuning, "train", train)
    fine_tuning.main()
    rows = json.loads(Path("out.json").read_text())["rows"]
    assert [row["name"].replace(", 1 epochs", "") for row in rows] == [
        "F²C, pretrained on one half", "F²C, from net", "F²C, from net and class weights", "F²C, from scratch",
        "F²C, from scratch, 2 epochs", "full FC, pretrained on one half", "full FC, from net and class weights",
        "full FC, from scratch", "full FC, from scratch, 2 epochs"]
    assert [row["images"] for row in rows[:5]] == [IMAGES * IDENTITIES * passes for passes in (0.5, 1, 1, 1, 2)]
    for row in rows:  # the rate that is best on the first seed, for all seeds
        assert row["runs"][0] == max(row["by_lr"], key=lambda each: each["tar_1e-3"])
        assert [(each["lr"], each["seed"]) for each in row["runs"]] == [(row["lr"], 0), (row["lr"], 1)]
    assert len(trained) == 2 * 1 + 3 * 2 + 2 * 2 * 2 + 9 == sum(len(row["by_lr"] + row["runs"][1:]) for row in rows)

    half = RecordDataset(trained[0].rec)
    whole = RecordDataset(faces)
    order = np.argsort(whole.index.identity, kind="stable")[:len(half)]
    assert half.num_classes == IDENTITIES // 2
    assert all(torch.equal(*each) for each in zip(half.faces(np.arange(len(half))), whole.faces(order), strict=True))
    went_on = [cfg for cfg in trained if cfg.get("f2c_init")]
    assert {(cfg.head, cfg.f2c_init_classes) for cfg in went_on} == {("f2c_dcp", False), ("f2c_dcp", True), ("softmax", True)}
    pretrained = {(cfg.head, cfg.seed): Path(cfg.output) for cfg in trained if cfg.save_all_states}
    assert all(Path(cfg.f2c_init).parent == pretrained[cfg.head, cfg.seed] for cfg in went_on)

    printed = capsys.readouterr().out
    assert printed.count("| F²C, ") == 5 and "| TAR at FAR 1e-3 |" in printed
    fine_tuning.main()
    assert len(trained) == 25
