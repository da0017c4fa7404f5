"""The command ``f2c-plugin``.

A command is a function with its arguments in ``@command(...)``. It imports what it needs itself, so that
``--help`` and the other commands start quickly.
"""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import f2c_plugin
from f2c_plugin.arcface_torch.patching import ARCFACE_TORCH_URL
from f2c_plugin.errors import ExportError, F2CError

Run = Callable[[Namespace], None]
AddTo = Callable[[ArgumentParser], object]

COMMANDS: dict[str, tuple[Run, Sequence[AddTo]]] = {}


def argument(*flags: str, **options: object) -> AddTo:
    """An argument, as ``ArgumentParser.add_argument`` takes it."""
    return lambda parser: parser.add_argument(*flags, **options)  # type: ignore[arg-type]


def command(*arguments: AddTo) -> Callable[[Run], Run]:
    """Make a function a command. Its docstring is the command's description."""
    def register(run: Run) -> Run:
        COMMANDS[run.__name__.replace("_", "-")] = run, arguments
        return run
    return register


@command(argument("checkout", help="folder of arcface_torch, or of the insightface checkout that contains it"),
         argument("--check", action="store_true", help="show what would change, but change nothing"),
         argument("--reverse", action="store_true", help="restore the checkout"))
def install(arguments: Namespace) -> None:
    """Patch an arcface_torch checkout and copy the configs into it."""
    from f2c_plugin.arcface_torch import patching

    checkout = patching.find_checkout(arguments.checkout)
    changes = patching.plan_reverse(checkout) if arguments.reverse else patching.plan_install(checkout)
    if not arguments.check:
        patching.apply(checkout, changes)
    for change in changes:
        verb = "removed" if change.content is None else "written"
        print(f"{change.path} {'would be' if arguments.check else 'is'} {verb} ({change.reason})")
    for config in patching.edited_configs(checkout):
        print(f"{config.relative_to(checkout)} stays: it has been edited")
    if not changes:
        print(f"{checkout}: nothing to do, the plugin is {'not installed' if arguments.reverse else 'installed'}")


@command(argument("--from", dest="source", default=ARCFACE_TORCH_URL, metavar="GIT_URL_OR_PATH",
                  help="repository to clone; default: %(default)s"))
def fetch_host(arguments: Namespace) -> None:
    """Clone the tested revision of arcface_torch into the cache."""
    from f2c_plugin.arcface_torch.patching import fetch_checkout

    print(fetch_checkout(arguments.source))


@command(argument("--checkout", help="an arcface_torch checkout to examine"),
         argument("--dataset", help="folder of a pack to examine"))
def doctor(arguments: Namespace) -> None:
    """Show the installed packages and the state of a checkout and a dataset."""
    from f2c_plugin.tools.doctor import examine

    if not examine(arguments.checkout, arguments.dataset):
        sys.exit(1)


@command(argument("folder", help="folder of train.rec and train.idx"),
         argument("--plot", metavar="PNG", help="draw the histogram of images per identity"),
         argument("--verify", action="store_true", help="decode every image and list the unusable records"))
def index(arguments: Namespace) -> None:
    """Index a pack, so that training starts at once, and summarize it."""
    from f2c_plugin.data.dataset import RecordDataset
    from f2c_plugin.data.index import open_index
    from f2c_plugin.tools import packs

    damaged: dict[int, str] = {}
    if arguments.verify:
        number, damaged = packs.verify(arguments.folder)
        for error in damaged.values():
            print(error)
        print(f"{len(damaged)} of {number} records cannot be used" + (":" if damaged else ""), ", ".join(map(str, damaged)))
    open_index(arguments.folder, progress=True)
    dataset = RecordDataset(arguments.folder, skip_damaged=True)
    _print_table(packs.describe(dataset))
    if arguments.plot:
        packs.draw_histogram(dataset, arguments.plot)
    if damaged:
        sys.exit(1)


@command(argument("folder", help="folder of train.rec and train.idx"),
         argument("--identity", type=int, metavar="N", help="draw the images of identity N"),
         argument("--image", type=int, metavar="N", help="draw the image of record N"),
         argument("--out", default="sheet.png", metavar="PNG", help="file to write; default: %(default)s"))
def inspect(arguments: Namespace) -> None:
    """Draw a contact sheet of a pack: one identity, one image, or random identities."""
    from f2c_plugin.data.dataset import RecordDataset
    from f2c_plugin.tools.packs import draw_sheet

    draw_sheet(RecordDataset(arguments.folder, skip_damaged=True), arguments.out, arguments.identity, arguments.image)
    print(arguments.out)


@command(argument("source", help="folder with one folder of .jpg or .png files per identity"),
         argument("out", help="folder to write train.rec, train.idx and property into"))
def pack(arguments: Namespace) -> None:
    """Write a pack from a folder of images, one folder per identity."""
    from f2c_plugin.tools.packs import pack_folder

    identities, images = pack_folder(arguments.source, arguments.out)
    print(f"{arguments.out}: {images} images of {identities} identities")


@command(argument("model", help="a model.pt, or a checkpoint of arcface_torch or f2c_plugin.train"),
         argument("out", help="the .onnx file to write"),
         argument("--net", default="probe", choices=["probe", "gallery"], help="only checkpoints hold the gallery net"))
def export(arguments: Namespace) -> None:
    """Write a trained net as ONNX for the insightface package."""
    from f2c_plugin.evaluation.onnx_export import export_checked, load_net

    if Path(arguments.model).resolve() == Path(arguments.out).resolve():
        raise ExportError(f"{arguments.out} is the trained model itself and is not overwritten: name another file")
    net = load_net(arguments.model, arguments.net)
    cosine = export_checked(net, arguments.out)
    print(f"{arguments.out}: the {arguments.net} net, {len(net.features.weight)}-dimensional embeddings"
          + ("" if cosine is None else f"; smallest cosine to PyTorch: {cosine:.6f}"))


def checkpoint_actions(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)
    describing = actions.add_parser("inspect", help="summarize checkpoints")
    describing.add_argument("files", nargs="+", metavar="FILE", help="a checkpoint of arcface_torch or f2c_plugin.train")
    merging = actions.add_parser("merge", help="convert the checkpoints of all ranks to another number of ranks")
    merging.add_argument("folder", help="folder of arcface_torch's checkpoint_gpu_0.pt, checkpoint_gpu_1.pt, …")
    merging.add_argument("out", help="folder to write the new checkpoints into")
    merging.add_argument("--ranks", type=int, required=True, metavar="W", help="the new number of ranks")


@command(checkpoint_actions)
def checkpoint(arguments: Namespace) -> None:
    """Summarize checkpoints, or convert arcface_torch's to another number of ranks."""
    from f2c_plugin.tools import checkpoints

    if arguments.action == "merge":
        for path in checkpoints.merge(arguments.folder, arguments.out, arguments.ranks):
            print(path)
        return
    for path in arguments.files:
        _print_table(checkpoints.describe(path))


@command(argument("--identities", type=int, required=True, metavar="N"),
         argument("--gpus", type=int, default=8, metavar="W"),
         argument("--network", default="r100"),
         argument("--batch-size", type=int, default=128, help="images per GPU"),
         argument("--pool-rate", type=float, default=0.1, help="also the sample rate of Partial FC"),
         argument("--pool-dtype", default="float32"),
         argument("--shard-pool", action="store_true"),
         argument("--plot", metavar="PNG", help="draw memory against the number of identities"))
def plan(arguments: Namespace) -> None:
    """Estimate the GPU memory of F²C, Partial FC and the full FC layer."""
    from f2c_plugin.tools import plan as planning

    planned = planning.Plan(arguments.identities, arguments.gpus, arguments.network, arguments.batch_size,
                            arguments.pool_rate, arguments.pool_dtype, arguments.shard_pool)
    print(f"{planned.identities:,} identities on {planned.gpus} GPUs, batch {planned.batch_size}: the head on each GPU")
    for name, size in planned.table():
        print(f"  {name:<34} {size / 2**20:>11,.0f} MB")
    print(planned.verdict())
    if arguments.plot:
        planning.draw(planned, arguments.plot)


@command(argument("folders", nargs="+", metavar="folder", help="output folder of arcface_torch or f2c_plugin.train"),
         argument("--out", metavar="DIR", help="folder to write report.html and PNGs into; default: the first folder"))
def report(arguments: Namespace) -> None:
    """Plot training runs and write a page that compares them."""
    from f2c_plugin.tools.report import report

    print(report(arguments.folders, arguments.out))


@command(argument("folder", help="folder to write train.rec, train.idx, property, synth.bin and contact_sheet.png into"),
         argument("--identities", type=int, required=True),
         argument("--images-per-identity", type=int, default=20),
         argument("--pairs", type=int, default=6000, help="verification pairs; default: %(default)s, as in LFW"),
         argument("--seed", type=int, default=0),
         argument("--processes", type=int, help="default: one per CPU"))
def synth(arguments: Namespace) -> None:
    """Draw a pack of synthetic faces and a verification set."""
    from f2c_plugin.synthetic.dataset import draw_contact_sheet, write_dataset

    folder = Path(arguments.folder)
    write_dataset(folder, arguments.identities, arguments.images_per_identity, arguments.pairs, arguments.seed,
                  arguments.processes)
    try:
        draw_contact_sheet(folder / "contact_sheet.png", min(8, arguments.identities), seed=arguments.seed)
    except F2CError as error:
        print(f"no contact_sheet.png: {error}")


def _print_table(rows: list[tuple[str, str]]) -> None:
    for name, value in rows:
        print(f"{name:<20} {value}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command. Errors that users can fix end the process with one line."""
    parser = ArgumentParser("f2c-plugin", description="F²C for arcface_torch.")
    parser.add_argument("--version", action="version", version=f"f2c-plugin {f2c_plugin.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (run, arguments) in COMMANDS.items():
        subparser = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        for add_to in arguments:
            add_to(subparser)
    parsed = parser.parse_args(argv)
    try:
        COMMANDS[parsed.command][0](parsed)
    except (F2CError, OSError) as error:
        sys.exit(f"f2c-plugin {parsed.command}: {error}")


if __name__ == "__main__":
    main()
