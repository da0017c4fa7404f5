"""Fine-tuning and growing: a pretrained net goes on with twice as many identities.

    python benchmarks/fine_tuning.py                                # a few minutes on one core
    python benchmarks/fine_tuning.py --identities 2000 --images 20 --lr 0.05 0.1 --seeds 3 --json FILE
    python benchmarks/fine_tuning.py --data PACK

The pack is split by identity. A net is trained on the first half for --epochs. It goes on with the whole pack for as many, with
the class weights of the first half and without. Beside it stand nets that are trained on the whole pack from scratch, for
--epochs and for twice as many, which are more images than the pretrained net sees in all. The same for the full FC layer with
the ramp: the old class weights go on beside new columns.

All are trained by the built-in trainer, and measured on all pairs of images of identities that are in no training set: the pack
--unseen, or PACK_unseen if there is one. Without --data, packs of synthetic faces are drawn. Each has its own learning rate: of
those in --lr the best on the first seed, in TAR at FAR 1e-3; nets are pretrained with --pretraining-lr.

Results go into --work as they come, and none is measured again with the same settings and pack.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import comparison
import numpy as np
import torch
from accuracy import World
from comparison import Result

from f2c_plugin.config import DEFAULTS, TrainConfig
from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.data.recordio import image_of_record
from f2c_plugin.data.writer import write_insightface_pack
from f2c_plugin.errors import F2CError
from f2c_plugin.evaluation.onnx_export import load_net
from f2c_plugin.evaluation.verification import embed
from f2c_plugin.trainer.checkpoint import pack_digest
from f2c_plugin.trainer.loop import train
from f2c_plugin.trainer.output import checkpoints_in
from f2c_plugin.trainer.rendezvous import process_group
from f2c_plugin.utils.atomic import written_whole

NET, CLASSES = "net", "net and class weights"
HEADS: dict[str, dict[str, Any]] = {
    "F²C": dict(head=comparison.F2C), "full FC": dict(head=comparison.FULL_FC, softmax_ramp=True)}
SETTINGS = "pool_rate", "pretraining_lr", "network", "embedding_size", "batch_size", "scale", "margin_list"


class Run(NamedTuple):
    """A training."""

    head: str
    epochs: int
    lr: float
    half: bool = False
    start: str | None = None  # NET or CLASSES of the pretrained net with this head; None is from scratch
    seed: int = 0  # of the pretraining, too

    @property
    def name(self) -> str:
        what = f"from {self.start}" if self.start else "pretrained on one half" if self.half else "from scratch"
        return f"{self.head}, {what}, {self.epochs} epochs"


def first_half(pack: Path, folder: Path) -> Path:
    """The pack of the first half of the identities; written unless it is there. Raises RecordError if it cannot be read."""
    if folder.is_dir():
        return folder
    dataset = RecordDataset(pack)
    order = np.argsort(dataset.index.identity, kind="stable")
    sizes = np.unique(dataset.index.identity, return_counts=True)[1][:dataset.num_classes // 2]
    offsets = dataset.index.offsets[order[:sizes.sum()]].tolist()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".half-", dir=folder.parent) as work:
        made = Path(work, "pack")
        made.mkdir()
        images = (bytes(image_of_record(dataset.records.read(offset))) for offset in offsets)
        write_insightface_pack(made / "train.rec", images, sizes.tolist())
        made.rename(folder)
    return folder


class Trainings:
    """Runs, and their results."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.world = arguments, World(arguments)
        if not self.world.unseen:
            raise F2CError(f"--data {arguments.data}: needs --unseen, a pack of identities that are in no training set")
        self.work = arguments.work / pack_digest(self.world.dataset.index)[:8]
        unseen = RecordDataset(self.world.unseen)
        self.faces, self.identity = unseen.faces(np.arange(len(unseen)))

    def result(self, run: Run) -> Result:
        """Of a run; trained unless it has been."""
        arguments, keys = self.arguments, HEADS[run.head]
        setting = {name: getattr(arguments, name) for name in SETTINGS}
        digest = hashlib.sha256(json.dumps([setting, keys, run], sort_keys=True).encode()).hexdigest()
        folder = self.work / digest[:12]
        file = folder / "result.json"
        if not file.is_file():
            data = first_half(self.world.data, self.work / "first_half") if run.half else self.world.data
            dataset = RecordDataset(data)
            if run.start:
                keys = keys | dict(f2c_init=str(self.pretrained(run)), f2c_init_classes=run.start == CLASSES)
            with process_group():
                train(TrainConfig(DEFAULTS | dict(
                    rec=str(data), num_classes=dataset.num_classes, num_image=len(dataset), num_workers=1, num_epoch=run.epochs,
                    lr=run.lr, network=arguments.network, embedding_size=arguments.embedding_size, scale=arguments.scale,
                    margin_list=tuple(arguments.margin_list), batch_size=arguments.batch_size, seed=run.seed,
                    f2c_pool_rate=max(arguments.pool_rate, arguments.batch_size / dataset.num_classes),
                    save_all_states=run.half, resume="auto", output=str(folder)) | keys))
            embeddings = torch.nn.functional.normalize(embed(load_net(folder / "model.pt"), self.faces).sum(1)).float()
            found = run._asdict() | {"name": run.name, "images": run.epochs * len(dataset)} | comparison.pair_metrics(
                embeddings, self.identity.numpy()) | comparison.provenance()
            with written_whole(file) as output:
                output.write(json.dumps(found).encode())
        found = json.loads(file.read_text())
        print(f"{run.name}, learning rate {run.lr:g}, seed {run.seed}: TAR at FAR 1e-3 {found['tar_1e-3']:.2%}",
              file=sys.stderr, flush=True)
        return found | {"folder": folder}

    def pretraining(self, head: str, seed: int = 0) -> Run:
        return Run(head, self.arguments.epochs, self.arguments.pretraining_lr, half=True, seed=seed)

    def pretrained(self, run: Run) -> Path:
        """The last checkpoint of the pretraining that a run goes on with."""
        return checkpoints_in(self.result(self.pretraining(run.head, run.seed))["folder"])[0]

    def table(self) -> list[Result]:
        """Of each training {"name", "images", "lr", "by_lr": results of the first seed, "runs": results of all seeds}."""
        epochs, rates = self.arguments.epochs, self.arguments.lr
        rows: list[Result] = []
        for head in HEADS:
            starts = [NET, CLASSES] if head == "F²C" else [CLASSES]
            for tried in ([self.pretraining(head)], *([Run(head, epochs, lr, start=start) for lr in rates] for start in starts),
                          *([Run(head, times * epochs, lr) for lr in rates] for times in (1, 2))):
                by_lr = [self.result(run) for run in tried]
                best = tried[max(range(len(tried)), key=lambda at: by_lr[at]["tar_1e-3"])]
                runs = [self.result(best._replace(seed=seed)) for seed in range(self.arguments.seeds)]
                for each in by_lr + runs:
                    del each["folder"]
                rows.append({"name": best.name, "images": runs[0]["images"], "lr": best.lr, "by_lr": by_lr, "runs": runs})
        return rows


def markdown(rows: list[Result]) -> str:
    columns = [each for each in comparison.PAIR_COLUMNS if each.values([run for row in rows for run in row["runs"]])]
    lines = ["| training | images | learning rate | " + " | ".join(column.heading for column in columns) + " |",
             "|---" * (len(columns) + 3) + "|"]
    for row in rows:
        cells = [column.text(column.values(row["runs"])) for column in columns]
        lines.append(f"| {row['name']} | {row['images']:,} | {row['lr']:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--identities", type=int, default=400, help="of the pack, if it is drawn")
    parser.add_argument("--images", type=int, default=10, help="of an identity")
    parser.add_argument("--pairs", type=int, default=2000, help="of its verification set")
    parser.add_argument("--data", type=Path, metavar="PACK")
    parser.add_argument("--unseen", type=Path, metavar="PACK", help="of identities that are in no training set")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, nargs="+", default=[0.1])
    parser.add_argument("--pretraining-lr", type=float, default=0.1)
    parser.add_argument("--pool-rate", type=float, default=0.1, help="a pool has room for a batch")
    parser.add_argument("--network", default="tiny")
    parser.add_argument("--embedding-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--scale", type=float, default=32.0)
    parser.add_argument("--margin-list", type=float, nargs=3, default=[1.0, 0.0, 0.35])
    parser.add_argument("--seeds", type=int, default=1, help="runs of each training")
    parser.add_argument("--work", type=Path, default=Path("work_dirs/fine_tuning"))
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.set_defaults(long_tail=False, wrong_labels=0.0, split=0.0, val_targets=None)  # of `accuracy.World`
    arguments = parser.parse_args()
    try:
        trainings = Trainings(arguments)
        rows = trainings.table()
    except F2CError as error:
        sys.exit(f"{parser.prog}: {error}")
    print(markdown(rows))
    if arguments.json:
        setting = {name: getattr(arguments, name) for name in ("epochs", "lr", "seeds", *SETTINGS)}
        report = comparison.provenance() | {"setting": setting | trainings.world.setting(), "rows": rows}
        with written_whole(arguments.json) as file:
            file.write((json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())


if __name__ == "__main__":
    main()
