"""What heads learn from the same images: F²C in its variants, the full FC layer and Partial FC.

    python benchmarks/accuracy.py                                   # about five minutes on two cores
    python benchmarks/accuracy.py --identities 10000 --steps 1562 --seeds 3 --lr 0.1 0.2 --variants all

Every run is a training by the built-in trainer on the same synthetic faces, from the same initial
weights for a seed, with as many images, and its probe net is verified on people that are in no training
set: accuracy as arcface_torch has it, on --pairs pairs; TAR and AUC on all pairs of 5,000 images of 500
people, 22,500 of them same. Each run is in a process of its own, --jobs at a time; those that are
finished in --work are not repeated.
Of several learning rates, each variant has its own: the one with which it is best on the first seed.
Prints a Markdown table, means over the seeds with their standard deviations, and writes it as JSON
with --json FILE and as plots with --plot FILE. Partial FC is arcface_torch's own file, from ARCFACE_TORCH or
the cache that `f2c-plugin fetch-host` fills.
"""

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from head_step import arcface_torch_modules

from f2c_plugin.arcface_torch import patching
from f2c_plugin.arcface_torch.entry_points import f2c_dcp
from f2c_plugin.build import margin_from
from f2c_plugin.config import DEFAULTS, TrainConfig
from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.data.from_config import steps_per_epoch
from f2c_plugin.evaluation.onnx_export import load_net
from f2c_plugin.evaluation.verification import embed, tar_at_far
from f2c_plugin.method.schedule import Schedule
from f2c_plugin.synthetic.dataset import write_dataset
from f2c_plugin.trainer import build
from f2c_plugin.trainer.loop import train
from f2c_plugin.trainer.rendezvous import process_group


def f2c(schedule=None, **keys):
    """Config keys of a variant of F²C, and a function that changes its Schedule."""
    return dict(head="f2c_dcp" if schedule is None else "f2c_changed", schedule=schedule) | keys


def changed(**fields):
    return lambda schedule: dataclasses.replace(schedule, **fields)


VARIANTS = {
    "full FC": dict(head="softmax"),
    "full FC, with the ramp": dict(head="softmax_ramp"),
    "Partial FC 0.1": dict(head="partial_fc", sample_rate=0.1),
    "Partial FC 0.1, with the ramp": dict(head="partial_fc_ramp", sample_rate=0.1),
    "F²C 100 %": f2c(f2c_pool_rate=1.0),
    "F²C 10 %": f2c(),
    "F²C 1 %": f2c(f2c_pool_rate=0.01),
    "F²C 10 %, as published": f2c(f2c_recipe="paper"),
    "F²C 10 %, not symmetric": f2c(f2c_symmetric=False),
    "F²C 10 %, identity-based only": f2c(f2c_identity_rate=1.0),
    "F²C 10 %, instance-based only": f2c(f2c_identity_rate=0.0),
    "F²C 10 %, one row": f2c(changed(second_row=False)),
    "F²C 10 %, hard negatives instead of own-image keys": f2c(changed(own_image_keys=False)),
    "F²C 10 %, nothing learnt outside the pool": f2c(changed(outside_weight=0.0)),
    "F²C 10 %, scale in full from the start": f2c(changed(start_scale=1e6)),
    "F²C 10 %, ramp over 40 %": f2c(lambda schedule: changed(ramp_steps=schedule.ramp_steps * 4 / 7)(schedule)),
    "F²C 10 %, momentum in full from the start": f2c(changed(momentum_start=1.0)),
    "F²C 10 %, hard negatives, momentum in full": f2c(changed(own_image_keys=False, momentum_start=1.0)),
    "F²C 10 %, momentum 0.9": f2c(f2c_momentum=0.9),
    "F²C 10 %, momentum 0.999": f2c(f2c_momentum=0.999),
}
UNSEEN = 500, 10  # people and images of each that TAR and AUC are measured on
VERIFIED = 4  # times a run
FEW = ["full FC, with the ramp", "F²C 100 %", "F²C 10 %"]
COLUMNS = {"lr": "learning rate", "accuracy": "accuracy", "tar_1e-3": "TAR at FAR 1e-3", "tar_1e-4": "TAR at FAR 1e-4",
           "auc": "AUC", "gallery_accuracy": "accuracy of the gallery net", "images_per_s": "images/s", "peak_mb": "peak MB"}


def partial_fc(cfg, backbone, margin_loss):
    """Head factory of arcface_torch's Partial FC."""
    losses, partial_fc_v2 = arcface_torch_modules(patching.known_checkout())
    margin = losses.CombinedMarginLoss(margin_loss.s, margin_loss.m1, margin_loss.m2, margin_loss.m3)
    return partial_fc_v2.PartialFC_V2(margin, cfg.embedding_size, cfg.num_classes, cfg.sample_rate, cfg.fp16)


def softmax_ramp(cfg, backbone, margin_loss):
    """Head factory of the full FC layer with the scale and margin of F²C's recipe."""
    head = build.softmax(cfg, backbone, margin_loss)
    at_every_step(head, cfg, head.margin, lambda margin: setattr(head, "margin", margin))
    return head


def partial_fc_ramp(cfg, backbone, margin_loss):
    """Head factory of Partial FC with the scale and margin of F²C's recipe."""
    head = partial_fc(cfg, backbone, margin_loss)  # its margin is ``margin_softmax``

    def set_margin(margin):
        head.margin_softmax.s, head.margin_softmax.m2, head.margin_softmax.m3 = margin.scale, margin.angular, margin.additive
    at_every_step(head, cfg, margin_from(margin_loss), set_margin)
    return head


def at_every_step(head, cfg, margin, set_margin):
    """Before every step, hand ``set_margin`` the Margin that the ramp has for it."""
    schedule = Schedule.ramp(margin, cfg.num_epoch * steps_per_epoch(cfg, 1))
    steps = itertools.count()
    head.register_forward_pre_hook(lambda *_: set_margin(schedule.margin_at(next(steps))))


def config(arguments, keys, seed, lr, output):
    steps = arguments.identities * arguments.images // arguments.batch_size  # of an epoch
    epochs = max(1, round(arguments.steps / steps))
    keys = dict(rec=str(arguments.data), num_classes=arguments.identities, num_image=arguments.identities * arguments.images,
                network=arguments.network, embedding_size=arguments.embedding_size, batch_size=arguments.batch_size,
                num_epoch=epochs, lr=lr, margin_list=tuple(arguments.margin_list), scale=arguments.scale, seed=seed,
                val_targets=["synth"], verbose=-(-steps * epochs // VERIFIED), num_workers=1, output=str(output)) | keys
    return TrainConfig(DEFAULTS | keys)


def run(arguments, variant, seed, lr, output):
    """Train one variant in this process and write what it measured."""
    keys = dict(VARIANTS[variant])
    change = keys.pop("schedule", None)

    def f2c_changed(cfg, backbone, margin_loss):
        head = f2c_dcp(cfg, backbone, margin_loss)
        head.schedule = change(head.schedule)
        return head
    f2c_changed.sampler = f2c_dcp.sampler
    build.BUILT_IN_HEADS |= dict(partial_fc=partial_fc, partial_fc_ramp=partial_fc_ramp, softmax_ramp=softmax_ramp,
                                 f2c_changed=f2c_changed)
    output.mkdir(parents=True, exist_ok=True)
    with process_group():
        report = train(config(arguments, keys, seed, lr, output))
    history = [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]
    verified = [entry for entry in history if "synth/accuracy" in entry]
    result = {"accuracy": report["verification"]["accuracy"],
              **of_all_pairs(load_net(output / "model.pt"), RecordDataset(unseen(arguments.data))),
              "images_per_s": report["images_seen"] / report["seconds"],
              "peak_mb": report["peak_mb"],
              "curve": [(entry["images"], entry["synth/accuracy"]) for entry in verified]}
    if "synth/gallery_accuracy" in verified[-1]:
        result["gallery_accuracy"] = verified[-1]["synth/gallery_accuracy"]
    (output / "result.json").write_text(json.dumps(result))


def unseen(data):
    """Folder of the people that TAR and AUC are measured on."""
    return data.with_name(data.name + "_unseen")


def of_all_pairs(net, dataset):
    """TAR at fixed FAR, and AUC, over all pairs of the images of a pack."""
    faces, identity = dataset.faces(np.arange(len(dataset)))
    embeddings = torch.nn.functional.normalize(embed(net, faces).sum(1)).float()
    first, second = np.triu_indices(len(faces), 1)
    scores, same = (embeddings @ embeddings.T).numpy()[first, second], (identity[first] == identity[second]).numpy()
    return {"tar_1e-3": tar_at_far(scores, same, 1e-3), "tar_1e-4": tar_at_far(scores, same, 1e-4), "auc": auc(scores, same)}


def auc(scores, same):
    """Probability that a same pair scores above a different one."""
    ranks = np.empty(len(scores))
    ranks[np.argsort(scores)] = np.arange(len(scores))
    positives, negatives = same.sum(), (~same).sum()
    return float((ranks[same].sum() - positives * (positives - 1) / 2) / (positives * negatives))


def table(results):
    lines = ["| head | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for variant, runs in results.items():
        cells = []
        for name in COLUMNS:
            values = [each[name] for each in runs if name in each]
            if not values:
                cells.append("")
            elif name == "lr":
                cells.append(f"{values[0]:g}")
            elif name in ("images_per_s", "peak_mb"):
                cells.append(f"{np.median(values):,.0f}")
            else:
                spread = f" ± {100 * np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
                cells.append(f"{100 * np.mean(values):.2f} %{spread}")
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results, path):
    """Accuracy against images seen, and against memory; every seed by itself."""
    from f2c_plugin.tools.plotting import pyplot

    plt = pyplot()
    figure, (curves, cost) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for number, (variant, runs) in enumerate(results.items()):
        for seed, each in enumerate(runs):
            images, accuracy = np.array(each["curve"]).T
            style = dict(color=f"C{number}", label=None if seed else variant, alpha=0.8)
            curves.plot(images / 1000, accuracy, "o-", markersize=4, **style)
            cost.plot(each["peak_mb"], accuracy[-1], "o", **style)
    curves.set(xlabel="thousand images seen", ylabel="accuracy on unseen identities")
    cost.set(xlabel="peak memory of the training, MB", ylabel="accuracy on unseen identities")
    for axis in curves, cost:
        axis.grid(alpha=0.3)
    curves.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--identities", type=int, default=1000)
    parser.add_argument("--images", type=int, default=20, help="of an identity")
    parser.add_argument("--pairs", type=int, default=6000, help="of unseen identities, to verify with")
    parser.add_argument("--steps", type=int, default=468, help="rounded to whole epochs")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--variants", nargs="+", default=FEW, help=f"of {', '.join(VARIANTS)}; or all".replace("%", "%%"))
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--network", default="tiny")
    parser.add_argument("--embedding-size", type=int, default=128)
    parser.add_argument("--lr", type=float, nargs="+", default=[0.1])
    parser.add_argument("--scale", type=float, default=32.0)
    parser.add_argument("--margin-list", type=float, nargs=3, default=[1.0, 0.0, 0.35])
    parser.add_argument("--data", type=Path, help="a pack with synth.bin; drawn if missing")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; give each its cores by OMP_NUM_THREADS")
    parser.add_argument("--work", type=Path, default=Path("work_dirs/accuracy"))
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--child", nargs=4, metavar=("VARIANT", "SEED", "LR", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.data = arguments.data or Path("data") / f"accuracy_{arguments.identities}"
    if arguments.child:
        variant, seed, lr, folder = arguments.child
        return run(arguments, variant, int(seed), float(lr), Path(folder))
    variants = list(VARIANTS) if arguments.variants == ["all"] else arguments.variants
    for variant in variants:
        if variant not in VARIANTS:
            parser.error(f"--variants {variant}: must be of {', '.join(VARIANTS)}")
    if needing := [variant for variant in variants if variant.startswith("Partial FC")]:
        try:
            patching.known_checkout()
        except patching.CheckoutError:
            print("without Partial FC: set ARCFACE_TORCH or run `f2c-plugin fetch-host`", file=sys.stderr)
            variants = [variant for variant in variants if variant not in needing]
    if not (arguments.data / "train.rec").is_file():
        write_dataset(arguments.data, arguments.identities, arguments.images, arguments.pairs)
    if not (unseen(arguments.data) / "train.rec").is_file():
        write_dataset(unseen(arguments.data), *UNSEEN, num_pairs=2, seed=1)  # another seed draws other people

    # The setting is in the folder's name, so that no run of another is taken for one of these.
    setting = {name: str(getattr(arguments, name)) for name in ("identities", "images", "pairs", "steps", "batch_size",
                                                               "network", "embedding_size", "scale", "margin_list", "data")}

    def result(variant, seed, lr):
        name = "_".join([*setting.values(), variant, str(lr), str(seed)]).translate(str.maketrans(" (),/%", "------"))
        folder = arguments.work / name
        if not (folder / "result.json").is_file():
            command = [sys.executable, sys.argv[0], *sys.argv[1:], "--child", variant, str(seed), str(lr), str(folder)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{variant}, seed {seed}, failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        found = json.loads((folder / "result.json").read_text()) | {"lr": lr}
        print(f"{variant}, lr {lr}, seed {seed}: accuracy {found['accuracy']:.2%}, TAR at FAR 1e-3 {found['tar_1e-3']:.2%}",
              file=sys.stderr)
        return found

    with ThreadPoolExecutor(arguments.jobs) as pool:
        tried = list(itertools.product(variants, arguments.lr))
        first = list(zip(tried, pool.map(lambda run: result(run[0], 0, run[1]), tried), strict=True))
        best = {variant: max((found for (which, _), found in first if which == variant), key=lambda found: found["accuracy"])
                for variant in variants}
        seeds = range(1, arguments.seeds)
        rest = pool.map(lambda run: result(run[0], run[1], best[run[0]]["lr"]), itertools.product(variants, seeds))
        results = {variant: [best[variant], *itertools.islice(rest, len(seeds))] for variant in variants}
        accuracies = {variant: {lr: found["accuracy"] for (which, lr), found in first if which == variant}
                      for variant in variants}
    print(table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(setting | {"seeds": arguments.seeds, "accuracy_by_lr": accuracies,
                                                   "results": results}, indent=1) + "\n")
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
