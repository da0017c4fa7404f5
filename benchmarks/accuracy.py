"""What heads learn from the same images: F²C in its variants, the full FC layer and Partial FC.

    python benchmarks/accuracy.py                                   # about five minutes on two cores
    python benchmarks/accuracy.py --identities 10000 --passes 1 4 --seeds 3 --lr 0.05 0.1 0.2
    python benchmarks/accuracy.py --data PACK --passes 5 15

Every run is a training by the built-in trainer, from the same initial weights for a seed. Its probe net is verified on the
verification sets of the pack, as arcface_torch does it, and on all pairs of images of identities that are in no training set:
the pack --unseen, or PACK_unseen if there is one. Without --data, packs of synthetic faces are drawn; their unseen pack has
500 people × 10 images, 22,500 of their pairs same.

Prints Markdown tables, means over the seeds with their standard deviations, and writes them with every seed's numbers to --json
and as plots to --plot. How heads are compared: see `comparison.py`. Partial FC is arcface_torch's own file, from ARCFACE_TORCH
or the cache that `f2c-plugin fetch-host` fills.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import comparison
import numpy as np
import torch
from comparison import Column, Result, Run, percent
from worlds import spoiled_pack, unseen

from f2c_plugin.config import TrainConfig
from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.data.loader import DualLoader
from f2c_plugin.errors import F2CError
from f2c_plugin.evaluation.onnx_export import load_net
from f2c_plugin.evaluation.verification import VerificationSet, embed
from f2c_plugin.synthetic.dataset import power_law, write_dataset
from f2c_plugin.trainer import build
from f2c_plugin.trainer.checkpoint import pack_digest
from f2c_plugin.trainer.loop import train
from f2c_plugin.trainer.rendezvous import process_group

UNSEEN = 500, 10  # people of a drawn unseen pack, and images of each
VERIFIED = 4  # times a run


def drawn(arguments: argparse.Namespace) -> Path:
    """A pack of synthetic faces with an unseen pack beside it; drawn unless it is there."""
    tail = "_long-tail" if arguments.long_tail else ""
    data = Path("data") / f"synthetic_{arguments.identities}x{arguments.images}{tail}_{arguments.pairs}-pairs"
    if not (data / "train.rec").is_file():
        images = power_law(arguments.identities, arguments.images) if arguments.long_tail else arguments.images
        write_dataset(data, arguments.identities, images, arguments.pairs)
    if not (unseen(data) / "train.rec").is_file():
        write_dataset(unseen(data), *UNSEEN, num_pairs=2, seed=1)  # another seed draws other people
    return data


class World:
    """A training pack, its verification sets and the unseen pack."""

    def __init__(self, arguments: argparse.Namespace):
        origin = arguments.data or drawn(arguments)
        beside = unseen(origin)
        self.unseen = arguments.unseen or (beside if (beside / "train.rec").is_file() else None)
        spoils = arguments.wrong_labels or arguments.split
        self.data = spoiled_pack(origin, arguments.wrong_labels, arguments.split) if spoils else origin
        self.dataset = RecordDataset(self.data)
        found = sorted(file.stem for file in self.data.glob("*.bin"))
        self.val_targets = found if arguments.val_targets is None else arguments.val_targets

    def setting(self) -> Result:
        """What identifies it."""
        index = self.dataset.index
        return {"data": self.data.name, "pack": pack_digest(index), "images": len(index), "identities": len(index.numbers),
                "unseen": self.unseen and pack_digest(RecordDataset(self.unseen).index),
                "pairs": {name: len(VerificationSet(self.data / f"{name}.bin").same) for name in self.val_targets}}


def train_one(arguments: argparse.Namespace, world: World, run: Run, folder: Path) -> Result:
    """Train in this process, and measure the net."""
    cfg = comparison.config(
        arguments, run, world.dataset.num_classes, rec=str(world.data), network=arguments.network, fp16=arguments.fp16,
        num_workers=1, val_targets=world.val_targets, verbose=-(-run.steps // VERIFIED), output=str(folder))

    build_loader = build.build_loader

    def whole_run(cfg: TrainConfig, *others: Any) -> DualLoader:
        """The loader of the head: the config counts the images of the run, but the loader is that of the pack."""
        loader = build_loader(TrainConfig(cfg | dict(num_image=len(world.dataset))), *others)
        loader.dual_sampler.num_steps = run.steps
        return loader

    with process_group(), mock.patch.object(build, "build_loader", whole_run):
        report = train(cfg)
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    result: Result = {f"accuracy_{name}": found["accuracy"] for name, found in report["verification_sets"].items()}
    if world.unseen:
        dataset = RecordDataset(world.unseen)
        faces, identity = dataset.faces(np.arange(len(dataset)))
        net = load_net(folder / "model.pt").to("cuda" if torch.cuda.is_available() else "cpu")
        found = embed(net, faces, pixels=arguments.pixels)
        embeddings = torch.nn.functional.normalize(found.sum(1)).float()
        result |= comparison.pair_metrics(embeddings, identity.numpy())
    for name in world.val_targets[:1]:
        verified = [entry for entry in history if f"{name}/accuracy" in entry]
        result["curve"] = [(entry["images"], entry[f"{name}/accuracy"]) for entry in verified]
        result["gallery_accuracy"] = verified[-1].get(f"{name}/gallery_accuracy")
    return result | {"classes": comparison.classes_in_a_step(cfg), "peak_mb": report["peak_mb"],
                     "images_per_s": report["images_seen"] / report["seconds"]}


def columns(world: World) -> list[Column]:
    """The columns of the tables."""
    accuracies = [Column(f"accuracy_{name}", f"accuracy, {name}", percent) for name in world.val_targets]
    return [*comparison.SETTING_COLUMNS, *accuracies, *comparison.PAIR_COLUMNS,
            Column("gallery_accuracy", "accuracy of the gallery net", percent), comparison.SPEED_COLUMN,
            Column("peak_mb", "peak MB", comparison.median)]


def plot(rows: dict[str, Any], path: Path, name: str) -> None:
    """Accuracy against images seen, and against memory; every seed by itself."""
    from f2c_plugin.tools.plotting import pyplot

    plt = pyplot()
    figure, (curves, cost) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for number, (variant, row) in enumerate(rows.items()):
        for seed, each in enumerate(row["runs"]):
            images, accuracy = np.array(each["curve"]).T
            style = dict(color=f"C{number}", label=None if seed else variant, alpha=0.8)
            curves.plot(images / 1000, accuracy, "o-", markersize=4, **style)
            cost.plot(each["peak_mb"], accuracy[-1], "o", **style)
    curves.set(xlabel="thousand images seen", ylabel=f"accuracy, {name}")
    cost.set(xlabel="peak memory of the training, MB", ylabel=f"accuracy, {name}")
    for axis in curves, cost:
        axis.grid(alpha=0.3)
    curves.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def make_parser(description: str) -> argparse.ArgumentParser:
    """The options of comparisons on packs."""
    parser = comparison.parser(description)
    parser.set_defaults(passes=[3.0])
    parser.add_argument("--data", type=Path, metavar="PACK", help="to train on; without it, synthetic faces are drawn")
    parser.add_argument("--unseen", type=Path, metavar="PACK", help="of identities that are in no training set")
    parser.add_argument("--pixels", type=int, help="resolution of the unseen images; by default as they are")
    parser.add_argument("--val-targets", nargs="*", metavar="NAME", help="verification sets; by default all that the pack has")
    parser.add_argument("--pairs", type=int, default=6000, help="of the verification set, if it is drawn")
    parser.add_argument("--network", default="tiny", help="backbone")
    parser.add_argument("--fp16", action="store_true", help="mixed precision, as config.fp16")
    return parser


def compared_on(world: World, arguments: argparse.Namespace, variants: dict[str, comparison.Keys]) -> comparison.Comparison:
    """The comparison of variants on a world."""
    setting = comparison.setting_of(arguments) | {"network": arguments.network} | world.setting()
    # Without these, the setting is that of results from before there were such options.
    setting |= {name: value for name in ("pixels", "fp16") if (value := getattr(arguments, name))}
    return comparison.Comparison(arguments, variants, setting, len(world.dataset),
                                 lambda run, folder: train_one(arguments, world, run, folder))


def main() -> None:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="of the first table and verification set")
    arguments, variants = comparison.parsed(parser)
    try:
        world = World(arguments)
        if not (world.val_targets or world.unseen):
            parser.error(f"--data {arguments.data}: has no verification set, so --unseen is needed")
        compared = compared_on(world, arguments, variants)
        if arguments.child:
            return compared.child(arguments.child)
        tables = comparison.main(compared, columns(world), keep_empty=comparison.PAIR_COLUMNS)
    except F2CError as error:
        sys.exit(f"{parser.prog}: {error}")
    if arguments.plot and world.val_targets:
        plot(tables[0]["rows"], arguments.plot, world.val_targets[0])


if __name__ == "__main__":
    main()
