"""The command ``f2c-plugin``: ``@command`` adds a function and its arguments to ``COMMANDS``.

Each imports its own tools: PyTorch takes seconds, for which nobody who asks for --help should wait, and doctor must run without
onnx.
"""

import json
import os
import signal
import sys
from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction, Namespace
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol

import f2c_plugin
from f2c_plugin.arcface_torch import patching
from f2c_plugin.errors import ExportError, F2CError, InputError
from f2c_plugin.utils.terminal import printed, tolerate_any_terminal

Run = Callable[[Namespace], None]
AddTo = Callable[[ArgumentParser], object]
COMMANDS: dict[str, tuple[Run, Sequence[AddTo]]] = {}


def argument(*flags: str, **options: Any) -> AddTo:
    """An argument, as ``ArgumentParser.add_argument`` takes it."""
    return lambda parser: parser.add_argument(*flags, **options)


def command(*arguments: AddTo) -> Callable[[Run], Run]:
    """Make a function a command. Its docstring is the command's description."""
    def register(run: Run) -> Run:
        COMMANDS[run.__name__.strip("_").replace("_", "-")] = run, arguments
        return run
    return register


JSON = argument("--json", action="store_true", help="print the result as JSON")


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise ArgumentTypeError(f"{text!r} must be a whole number from 0")
    return int(text)


PAIRS = 6000  # of a verification set that is drawn; as in LFW
SEED = argument("--seed", type=_seed, default=0, metavar="N", help="of what is random; default: %(default)s")
NET = argument("--net", default="probe", choices=["probe", "gallery"],
               help="the gallery net is in checkpoints alone, of trainings that have one")
NETWORK = argument("--network", metavar="NAME", help="of the net; needed where a file does not say it and nets of several "
                                                     "packages fit")


class Result(Protocol):
    """What a command has made: a dataclass, or what ``vars`` reads."""

    def report(self) -> str:
        """In lines for people."""
        ...


def _show(args: Namespace, *results: Result) -> None:
    if args.json:
        found = [{name: value for name, value in vars(result).items() if not name.startswith("_")} for result in results]
        print(json.dumps(found if len(found) > 1 else found[0], default=str, indent=2))
    else:
        print(*(result.report() for result in results), sep="\n")


@command(argument("checkout", help="folder of arcface_torch, or of the insightface checkout that contains it"),
         argument("--check", action="store_true", help="show what would change, but change nothing"),
         argument("--reverse", action="store_true", help="restore the checkout"))
def install(args: Namespace) -> None:
    """Patch an arcface_torch checkout and copy the configs into it."""
    checkout = patching.find_checkout(args.checkout)
    changes = patching.plan_reverse(checkout) if args.reverse else patching.plan_install(checkout)
    if not args.check:
        patching.apply(checkout, changes)
    for change in changes:
        verb = "removed" if change.content is None else "written"
        print(f"{change.path} {'would be' if args.check else 'is'} {verb} ({', '.join(change.reasons)})")
    for config in patching.edited_configs(checkout):
        print(f"{config.relative_to(checkout)} stays: it has been edited")
    if not changes:
        print(f"{checkout}: nothing to do, the plugin is {'not installed' if args.reverse else 'installed'}")


@command(argument("--from", dest="source", default=patching.ARCFACE_TORCH_URL, metavar="GIT_URL_OR_PATH",
                  help="repository to clone; default: %(default)s"))
def fetch_host(args: Namespace) -> None:
    """Clone the tested revision of arcface_torch into the cache."""
    print(patching.fetch_checkout(args.source))


@command(argument("--checkout", help="an arcface_torch checkout to examine"),
         argument("--dataset", help="folder of a pack to examine"))
def doctor(args: Namespace) -> None:
    """Show the installed packages and the state of a checkout and a dataset."""
    from f2c_plugin.tools.doctor import examine

    if not examine(args.checkout, args.dataset):
        sys.exit(1)


@command(argument("folder", help="folder of train.rec and train.idx"),
         argument("--plot", metavar="PNG", help="draw the histogram of images per identity"),
         argument("--verify", action="store_true", help="decode every image and list the unusable records"), JSON)
def index(args: Namespace) -> None:
    """Index a pack, so that training starts at once, and summarize it."""
    from f2c_plugin.data.dataset import RecordDataset
    from f2c_plugin.data.index import open_index
    from f2c_plugin.tools import packs
    from f2c_plugin.tools.plotting import require_drawable

    if args.plot:  # not after hours
        require_drawable(args.plot)
    damaged: dict[int, str] = {}
    if args.verify:
        number, damaged = packs.verify(args.folder)
        if not args.json:
            print(*damaged.values(), sep="\n", end="\n" * bool(damaged))
            print(f"{len(damaged)} of {number} records cannot be used" + (":" if damaged else ""), ", ".join(map(str, damaged)))
    open_index(args.folder, progress=True)
    dataset = RecordDataset(args.folder, skip_damaged=True)
    if args.json:
        print(json.dumps(packs.summary(dataset) | ({"damaged": damaged} if args.verify else {}), indent=2))
    else:
        _print_table(packs.describe(dataset))
    if args.plot:
        packs.draw_histogram(dataset, args.plot)
    if damaged:
        sys.exit(1)


@command(argument("folder", help="folder of train.rec and train.idx"),
         argument("--identity", type=int, metavar="N", help="draw the images of identity N"),
         argument("--image", type=int, metavar="N", help="draw the image of record N"),
         argument("--out", default="sheet.png", metavar="PNG", help="file to write; default: %(default)s"))
def inspect(args: Namespace) -> None:
    """Draw a contact sheet of a pack: one identity, one image, or random identities."""
    from f2c_plugin.data.dataset import RecordDataset
    from f2c_plugin.tools import packs

    if args.identity is not None and args.image is not None:
        raise InputError(f"--identity {args.identity} --image {args.image}: a sheet shows one of them")
    packs.draw_sheet(RecordDataset(args.folder, skip_damaged=True), args.out, args.identity, args.image)
    print(args.out)


@command(argument("folder", help="folder of train.rec"), JSON)
def reindex(args: Namespace) -> None:
    """Make the missing train.idx of a pack from its train.rec."""
    from f2c_plugin.tools import packs

    records, path = packs.reindex(args.folder), str(Path(args.folder, "train.idx"))
    print(json.dumps({"out": path, "records": records}, indent=2) if args.json else f"{path}: {records} records")


@command(argument("photos", help="folder of photos, most often with a folder for each person"),
         argument("out", help="folder to write the faces into, JPEGs in the same folders as the photos, and left_out.tsv (what "
                              "was left out and why). Photos whose faces it holds are not done again"),
         argument("--detector", metavar="MODEL",
                  help="YuNet, or an SCRFD of insightface, in ONNX; or a folder with one, as insightface's model packs are; "
                       "default: that of a model pack in ~/.insightface/models"), JSON)
def align(args: Namespace) -> None:
    """Align the faces of photos to arcface_torch's template, in images of 112×112 pixels."""
    from f2c_plugin.tools.align import align as align_faces

    _show(args, align_faces(args.photos, args.out, args.detector))


@command(argument("sources", nargs="+", metavar="source",
                  help="folder with a folder for each identity, whose images may also lie in folders inside; or a list of "
                       "paths and identities, or im2rec's .lst; or .tar files in WebDataset's layout, or a folder of them; "
                       "or a Hugging Face dataset, a folder of save_to_disk or of .parquet files"),
         argument("out", help="folder to write train.rec, train.idx, property, identities.json (number to name) and "
                              "left_out.tsv (what was left out and why) into"),
         argument("--root", metavar="DIR", help="of the paths in a list; default: the list's folder"),
         argument("--label-key", metavar="NAME", help="of the identity: field of .json in tar files, or column of a dataset"),
         argument("--image-key", metavar="NAME", help="of the images: column of a dataset"),
         argument("--resize", action="store_true",
                  help="also take images of other sizes: scale the shorter side to 112 pixels and crop the longer one at the "
                       "centre. Align the faces before; this does not"),
         argument("--quality", type=int, metavar="N",
                  help="store what is not a JPEG as JPEG of this quality, 1 to 100; default: as PNG, which loses nothing, but "
                       "needs Pillow in training"), JSON)
def pack(args: Namespace) -> None:
    """Write a pack from images of 112×112 pixels in folders, a list, tar files or a dataset."""
    from f2c_plugin.tools.pack import pack as pack_images
    from f2c_plugin.tools.pack_sources import source_of

    source = source_of(args.sources, args.root, args.image_key, args.label_key)
    _show(args, pack_images(source, args.out, args.resize, args.quality))


@command(argument("folders", nargs="+", metavar="folder", help="folder of train.rec and train.idx, of two packs or more; of "
                                                               "one alone with --same or --drop-duplicates"),
         argument("out", help="folder to write train.rec, train.idx, property, identities.tsv (new number, pack, old number) "
                              "and duplicates.tsv (images whose bytes come twice) into"),
         argument("--same", metavar="LIST", help="identities that are one: in each line the number of the pack, from 1, the "
                                                 "identity and any name, with tabs between; those with one name become one"),
         argument("--drop-duplicates", action="store_true", help="leave out images that an identity has twice"), JSON)
def merge(args: Namespace) -> None:
    """Write the images of several packs into one."""
    from f2c_plugin.tools import repack

    if len(args.folders) < 2 and not (args.same or args.drop_duplicates):
        raise InputError(f"{args.folders[0]}, {args.out}: two packs or more are merged into a folder; name another pack, "
                         "--same or --drop-duplicates")
    _show(args, repack.merge(args.folders, args.out, args.same, args.drop_duplicates))


@command(argument("folders", nargs="+", metavar="folder", help="folder of train.rec and train.idx, of one pack or more"),
         argument("out", metavar="list", help="file to write, which merge --same takes for the same packs in the same order"),
         argument("--model", required=True, help="an .onnx file, a model.pt, or a checkpoint, to embed the images with"),
         argument("--least", type=float, default=0.6, metavar="COSINE", help="of two identities; default: %(default)s"), JSON)
def duplicates(args: Namespace) -> None:
    """List the identities that may be one person's by the cosine of their centres. Merges nothing."""
    from f2c_plugin.tools.duplicates import find_duplicates

    _show(args, find_duplicates(args.folders, args.model, args.out, args.least))


@command(argument("source", help="folder of train.rec and train.idx"),
         argument("train", help="folder to write the pack to train on into"),
         argument("unseen", help="folder to write the pack to verify with into"),
         argument("--identities", type=int, required=True, metavar="N", help="that are in UNSEEN, and not in TRAIN"),
         argument("--min-images", type=int, default=2, metavar="N", help="that each of them has; default: %(default)s"),
         SEED, JSON)
def split(args: Namespace) -> None:
    """Write a pack as two, with other identities in each."""
    from f2c_plugin.tools import repack

    _show(args, *repack.split(args.source, args.train, args.unseen, args.identities, args.seed, args.min_images))


@command(argument("source", help="folder of train.rec and train.idx"),
         argument("out", help="folder to write train.rec, train.idx, property and identities.tsv into"),
         argument("--min-images", type=int, default=1, metavar="N", help="that an identity has; default: %(default)s"),
         argument("--max-images", type=int, metavar="N", help="that an identity has"),
         argument("--only", metavar="LIST", help="file of identities, one in each line: no others"),
         argument("--without", metavar="LIST", help="file of identities, one in each line: not these"), JSON)
def filter_(args: Namespace) -> None:
    """Write some identities of a pack into another, numbered anew."""
    from f2c_plugin.tools import repack

    _show(args, repack.filtered(args.source, args.out, args.min_images, args.max_images, args.only, args.without))


@command(argument("source", help="folder of train.rec and train.idx"),
         argument("model", help="an .onnx file, a model.pt, or a checkpoint, to embed the images with"),
         argument("out", help="folder to write train.rec, train.idx, property, identities.tsv, clean.html (the report), "
                              "clean.tsv (all that was found) and same.tsv (for merge --same) into"),
         argument("--least", type=float, metavar="COSINE", help="of an image to the dominant centre of its identity; default: "
                                                                "where the cosines separate from those to other identities"),
         argument("--least-same", type=float, metavar="COSINE", help="of two identities that are listed as one person's; "
                                                                     "default: where the halves of an identity separate from "
                                                                     "the nearest other identity"), JSON)
def clean(args: Namespace) -> None:
    """Write a pack without the images that do not show their identity, and list the identities that may be one person's."""
    from f2c_plugin.tools.clean import clean as clean_pack

    _show(args, clean_pack(args.source, args.model, args.out, args.least, args.least_same))


@command(argument("source", help="folder of train.rec and train.idx"),
         argument("model", help="an .onnx file, a model.pt, or a checkpoint, to embed the images with"),
         argument("out", help="folder to write train.rec, train.idx, property and identities.tsv into"),
         argument("--keep", type=float, default=0.6, metavar="SHARE", help="of the images; default: %(default)s"), JSON)
def thin(args: Namespace) -> None:
    """Write a part of a pack that stands for the whole, chosen after Face-NMS."""
    from f2c_plugin.tools.thin import thin as thin_pack

    _show(args, thin_pack(args.source, args.model, args.out, args.keep))


@command(argument("source", help="folder of train.rec and train.idx"),
         argument("labels", help="a list like im2rec's .lst: record number, tab, identity in each line"),
         argument("out", help="folder to write train.rec, train.idx and property into"), JSON)
def convert(args: Namespace) -> None:
    """Write a pack again with the identities of a list, exact also beyond 2**24."""
    from f2c_plugin.tools.convert import convert as convert_pack

    _show(args, convert_pack(args.source, args.labels, args.out))


@command(argument("source", help="folder of train.rec and train.idx"),
         argument("out", help="folder to write into: a folder for each identity, by its number; images by their records'"),
         argument("--skip-damaged", action="store_true", help="leave out records that cannot be used"), JSON)
def unpack(args: Namespace) -> None:
    """Write the images of a pack into folders, as they are stored."""
    from f2c_plugin.tools.unpack import unpack as unpack_pack

    _show(args, unpack_pack(args.source, args.out, args.skip_damaged))


@command(argument("model", help="a model.pt, or a checkpoint of arcface_torch or f2c_plugin.train"),
         argument("out", help="the .onnx file to write"), NET, NETWORK)
def export(args: Namespace) -> None:
    """Write a trained net as ONNX for the insightface package."""
    from f2c_plugin.evaluation.onnx_export import export_checked, load_net
    from f2c_plugin.evaluation.verification import embedding_size

    if os.path.realpath(args.model) == os.path.realpath(args.out):
        raise ExportError(f"{args.out} is the trained model itself and is not overwritten: name another file")
    net = load_net(args.model, args.net, args.network)
    cosine = export_checked(net, args.out)
    print(f"{args.out}: the {args.net} net, {embedding_size(net)}-dimensional embeddings"
          + ("" if cosine is None else f"; smallest cosine to PyTorch: {cosine:.6f}"))


@command(argument("source", help="folder of a pack, or one with a folder of images for each identity"),
         argument("out", help="the .bin file to write"),
         argument("--pairs", type=int, metavar="N",
                  help="to draw, half of them same, of images that can be used. Those met that cannot are listed beside OUT, "
                       f"in a .left_out.tsv; default: {PAIRS}"),
         argument("--seed", type=_seed, metavar="N", help="of the draw; default: 0"),
         argument("--list", metavar="FILE", help="of the pairs: two images and 1 or 0 in each line, tabs between; images are "
                                                 "numbers of records, or paths in the folder. They keep their order, and each "
                                                 "tenth of them, a fold of the accuracy, must have both kinds. Or LFW's "
                                                 "pairs.txt, of whose folds same and different pairs are taken in turn"),
         argument("--resize", action="store_true", help="also take images of other sizes from folders, as pack does"))
def verification_set(args: Namespace) -> None:
    """Write a verification set: pairs of images, the same person's or not."""
    from f2c_plugin.tools import verification_sets

    source = verification_sets.source_of(args.source, args.resize)
    if args.list is None:
        pairs, seed = (default if given is None else given for given, default in ((args.pairs, PAIRS), (args.seed, 0)))
        print(verification_sets.drawn_set(source, args.out, pairs, seed).report())
        return
    for option, value in ("--pairs", args.pairs), ("--seed", args.seed):
        if value is not None:
            raise InputError(f"{option} {value}: is for drawn pairs, but --list {args.list} names them all: give one of both")
    print(verification_sets.listed_set(source, args.out, args.list).report())


@command(argument("model", help="a model.pt, a checkpoint of arcface_torch or f2c_plugin.train, or an .onnx file"),
         argument("sets", nargs="+", metavar="set",
                  help="a verification set, .bin, or the folder of IJB-B, IJB-C or TinyFace"),
         NET, NETWORK,
         argument("--resolutions", nargs="+", type=int, default=[], metavar="PIXELS",
                  help="evaluate .bin sets at these resolutions, too: both images of a pair, and one against a sharp one"),
         argument("--quality", metavar="TSV",
                  help="write how recognizable the images of .bin sets are, and show the errors when the least recognizable "
                       "are rejected"),
         argument("--plot", metavar="PNG", help="draw the ROC; with --quality, the error-reject curve beside it"), JSON)
def evaluate(args: Namespace) -> None:
    """Evaluate a model: accuracy and TAR at FAR on pairs, TAR at FAR on IJB-B and IJB-C, identification on TinyFace."""
    from f2c_plugin.tools import evaluate as tool
    from f2c_plugin.tools.plotting import draw_roc, require_drawable
    from f2c_plugin.trainer.rendezvous import process_group

    if args.quality:
        from f2c_plugin.data.writer import refuse_to_overwrite

        refuse_to_overwrite(Path(args.quality).parent, [Path(args.quality).name])
    if args.plot:  # not after hours
        require_drawable(args.plot)
    with process_group() if "RANK" in os.environ else nullcontext():
        found = tool.evaluate(args.model, args.sets, args.net, args.resolutions, bool(args.quality), args.network,
                              bool(args.plot))
    if not found:  # rank 0 shows it
        return
    print(json.dumps([each.summary() for each in found], indent=2) if args.json else tool.table(found))
    if args.quality:
        tool.write_quality(found, args.quality)
    if args.plot:
        draw_roc({"ROC": tool.scored_pairs(found)}, args.plot, errors=tool.error_curves(found))


def checkpoint_actions(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)
    describing = actions.add_parser("inspect", help="summarize checkpoints")
    describing.add_argument("files", nargs="+", metavar="FILE", help="a checkpoint of arcface_torch or f2c_plugin.train")
    merging = actions.add_parser("merge", help="convert the checkpoints of all ranks to another number of ranks")
    merging.add_argument("folder", help="folder of arcface_torch's checkpoint_gpu_0.pt, checkpoint_gpu_1.pt, …")
    merging.add_argument("out", help="folder to write the new checkpoints into")
    merging.add_argument("--ranks", type=int, required=True, metavar="W", help="the new number of ranks")


@command(checkpoint_actions)
def checkpoint(args: Namespace) -> None:
    """Summarize checkpoints, or convert arcface_torch's to another number of ranks."""
    from f2c_plugin.tools import checkpoints

    if args.action == "merge":
        print(*checkpoints.merge(args.folder, args.out, args.ranks), sep="\n")
    else:
        for path in args.files:
            _print_table(checkpoints.describe(path))


@command(argument("pack", nargs="?", help="folder of train.rec and train.idx, of whose identities it is"),
         argument("--identities", type=int, metavar="N", help="number of identities, without a pack"),
         argument("--gpus", type=int, default=8, metavar="W", help="number of GPUs; default: %(default)s"),
         argument("--network", default="r100", help="a network of the built-in trainer; default: %(default)s"),
         argument("--batch-size", type=int, default=128, help="images per GPU; default: %(default)s"),
         argument("--pool-rate", type=float, default=0.1, help="also the sample rate of Partial FC; default: %(default)s"),
         argument("--pool-dtype", default="float32", help="float32, bfloat16 or float16; default: %(default)s"),
         argument("--recipe", default="resident", help="resident or paper; default: %(default)s"),
         argument("--shard-pool", action="store_true", help="split the pool over the GPUs, with the recipe paper"),
         argument("--embedding-size", type=int, default=512, help="D; default: %(default)s"),
         argument("--queue-size", type=int, default=8192, help="class weights in DCQ's queue; default: %(default)s"),
         argument("--fp16", action=BooleanOptionalAction, default=True, help="mixed precision; default: yes"),
         argument("--gpu-memory", type=float, default=24, metavar="GB", help="of each GPU; default: %(default)s"),
         argument("--plot", metavar="PNG", help="draw memory and time against the number of identities"), JSON)
def plan(args: Namespace) -> None:
    """Estimate memory and time of a training step with F²C, DCQ, Partial FC and the full FC layer."""
    from f2c_plugin.data.dataset import RecordDataset
    from f2c_plugin.tools import plan_step
    from f2c_plugin.tools.plan import Plan
    from f2c_plugin.tools.plotting import require_drawable

    if args.plot:
        require_drawable(args.plot)
    if (args.pack is None) == (args.identities is None):
        raise InputError("name a pack or --identities N, one of them")
    identities = RecordDataset(args.pack, skip_damaged=True).num_classes if args.pack else args.identities
    planned = Plan(identities, args.gpus, args.network, args.batch_size, args.pool_rate, args.pool_dtype, args.recipe,
                   args.shard_pool, args.fp16, args.queue_size, args.embedding_size)
    step = plan_step.StepPlan(planned, args.gpu_memory)
    if args.json:
        print(json.dumps(step.summary(), indent=2))
    else:
        gpus = f"{planned.gpus} GPU{'s' * (planned.gpus > 1)}"
        print(f"{planned.identities:,} identities on {gpus}, batch {planned.batch_size}, embeddings of "
              f"{planned.embedding_size}: the head on each GPU")
        for name, size, source in planned.table():
            print(f"  {name:<34} {size / 2**20:>11,.0f} MB  {source}")
        print(step.report())
        print(step.verdict(), planned.verdict(), sep="\n")
    if args.plot:
        plan_step.draw(step, args.plot)


@command(argument("folders", nargs="+", metavar="folder", help="output folder of arcface_torch or f2c_plugin.train"),
         argument("--out", metavar="DIR", help="folder to write report.html and PNGs into; default: the first folder shown"))
def report(args: Namespace) -> None:
    """Plot training runs and write a page that compares them."""
    from f2c_plugin.tools.report import report as write_report

    print(write_report(args.folders, args.out))


@command(argument("folder", help="folder to write train.rec, train.idx, property, synth.bin and contact_sheet.png into"),
         argument("--identities", type=int, required=True, help="number of identities"),
         argument("--images-per-identity", type=int, default=20, help="default: %(default)s"),
         argument("--long-tail", action="store_true", help="so many on average, but one or two of every second identity"),
         argument("--pairs", type=int, default=6000, help="verification pairs; default: %(default)s, as in LFW"),
         SEED,
         argument("--processes", type=int, help="default: one per CPU"))
def synth(args: Namespace) -> None:
    """Draw a pack of synthetic faces and a verification set."""
    from f2c_plugin.synthetic.dataset import draw_contact_sheet, power_law, write_dataset

    folder = Path(args.folder)
    images = args.images_per_identity
    if args.long_tail:
        images = power_law(args.identities, images, args.seed)
    write_dataset(folder, args.identities, images, args.pairs, args.seed, args.processes)
    try:
        draw_contact_sheet(folder / "contact_sheet.png", min(8, args.identities), seed=args.seed)
    except F2CError as error:
        print(f"no contact_sheet.png: {error}")
    print(f"{folder}: a pack of {args.identities} identities, and synth.bin with pairs of others")


def _print_table(rows: list[tuple[str, str]]) -> None:
    for name, value in rows:
        print(f"{name:<20} {value}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command. Errors that users can fix end the process with one line, and so does Ctrl-C, with exit code 130."""
    tolerate_any_terminal()
    parser = ArgumentParser("f2c-plugin", description="Faster Face Classification (F²C): train on millions of identities.")
    parser.add_argument("--version", action="version", version=f"f2c-plugin {f2c_plugin.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (run, arguments) in COMMANDS.items():
        subparser = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        for add_to in arguments:
            add_to(subparser)
    called = "f2c-plugin"
    with suppress(KeyboardInterrupt):
        try:
            with printed():
                args = parser.parse_args(argv)
                if "" in (sys.argv[1:] if argv is None else argv):  # as a path it would be the folder that the command runs in
                    parser.error(f"{args.command}: an argument is empty: is a variable of the shell not set?")
                called += f" {args.command}"
                run, _ = COMMANDS[args.command]
                return run(args)
        except (F2CError, OSError) as error:
            sys.exit(f"{called}: {error}")
    # Only now are progress bars gone, but not the line that they or "^C" have begun.
    print(f"{chr(10) if sys.stderr.isatty() else ''}{called}: interrupted", file=sys.stderr)
    sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
