"""What is learnt from a part of a pack: the images that `f2c-plugin thin` keeps, as many at random, and all.

    python benchmarks/thinning.py                                   # synthetic faces, a few minutes
    python benchmarks/thinning.py --copies 0.5 --seeds 3            # half of the images are nearly another of their identity
    python benchmarks/thinning.py --data PACK --model model.pt

The images to keep are chosen by --model; without it, by a net that the first head has learnt from the whole pack with a seed of
its own. Every run sees as many images as --passes over the whole pack, so images of a part are seen more often. Of random
images each identity keeps one, as of chosen ones. Otherwise, see `accuracy.py` and `comparison.py`.
"""

import argparse
import hashlib
import sys
from pathlib import Path

import comparison
import numpy as np
from accuracy import World, columns, compared_on, make_parser
from comparison import Result, Run
from worlds import with_copies

from f2c_plugin.data.recordio import Int64s
from f2c_plugin.data.writer import new_pack
from f2c_plugin.errors import F2CError
from f2c_plugin.tools.repack import write_kept
from f2c_plugin.tools.thin import thin
from f2c_plugin.trainer.checkpoint import pack_digest

ALL, THINNED, RANDOM = "all images", "chosen", "at random"
OWN_SEED = 1000  # of the net that chooses


def at_random(identity: Int64s, keep: float, rng: np.random.Generator) -> np.ndarray:
    """Images to keep, bool (n,): one of each identity, and of the others so many that the share is kept."""
    order = rng.permutation(len(identity))
    _, first = np.unique(identity[order], return_index=True)
    kept = np.zeros(len(identity), bool)
    kept[order[first]] = True
    kept[rng.permutation(np.flatnonzero(~kept))[:round(keep * len(identity)) - len(first)]] = True
    return kept


def packs(arguments: argparse.Namespace, world: World, model: Path) -> dict[str, Path]:
    """The pack and its two parts, made unless they are there."""
    source, digest = world.data, pack_digest(world.dataset.index)[:8]
    by = hashlib.sha256(model.read_bytes()).hexdigest()[:8]
    of = f"{source.name}_{digest}_{arguments.keep:g}"
    made = {ALL: source, THINNED: arguments.work / f"{of}_by_{by}", RANDOM: arguments.work / f"{of}_at-random"}
    for name in THINNED, RANDOM:
        if name == THINNED and not made[name].is_dir():
            thin(source, model, made[name], arguments.keep)
        elif not made[name].is_dir():
            kept = at_random(world.dataset.index.identity.astype(np.int64), arguments.keep, np.random.default_rng(0))
            with new_pack(made[name], ("property", "identities.tsv", "train.idx", "train.rec")) as folder:
                write_kept(source, folder, kept, np.arange(len(world.dataset.index.numbers)))
        for file in source.glob("*.bin"):
            (made[name] / file.name).write_bytes(file.read_bytes())
    return made


def main() -> None:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--keep", type=float, default=0.6, help="share of the images")
    parser.add_argument("--copies", type=float, default=0.0, metavar="SHARE",
                        help="of the images, each replaced by another of its identity that is moved by a pixel")
    parser.add_argument("--model", type=Path, help="that chooses")
    parser.set_defaults(jobs=0, variants=["F²C 10 %"], pool_rate=[0.1], equal=["images"])
    arguments, variants = comparison.parsed(parser)
    passes = arguments.passes
    tables: list[Result] = [{"passes": each, "equal": "images", "rows": {}} for each in passes]
    try:
        world = World(arguments)
        arguments.unseen = world.unseen
        arguments.data = with_copies(world.data, arguments.copies) if arguments.copies else world.data
        world = World(arguments)
        whole, steps = compared_on(world, arguments, variants), len(world.dataset) // arguments.batch_size
        run = Run(next(iter(variants)), round(passes[0] * steps), arguments.lr[0], OWN_SEED)
        if not arguments.model:
            whole.results([run])
        model = arguments.model or whole.folder(run) / "model.pt"
        for name, pack in packs(arguments, world, model).items():
            arguments.data = pack
            part = World(arguments)
            arguments.passes = [each * steps / (len(part.dataset) // arguments.batch_size) for each in passes]
            for table, found in zip(tables, compared_on(part, arguments, variants).tables(), strict=True):
                table["rows"] |= {f"{variant}, {name}": row for variant, row in found["rows"].items()}
    except (F2CError, OSError) as error:
        sys.exit(f"{parser.prog}: {error}")
    comparison.report(whole, tables, columns(world))


if __name__ == "__main__":
    main()
