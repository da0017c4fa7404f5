"""The command ``f2c-plugin``."""

import argparse
import sys
from pathlib import Path

from f2c_plugin.arcface_torch.patching import HOST_URL


def synth(arguments):
    """Draw a pack of synthetic faces and a verification set."""
    from f2c_plugin.synthetic.dataset import draw_contact_sheet, write_dataset

    folder = Path(arguments.folder)
    write_dataset(folder, arguments.identities, arguments.images_per_identity, arguments.pairs, arguments.seed,
                  arguments.processes)
    try:
        draw_contact_sheet(folder / "contact_sheet.png", min(8, arguments.identities), seed=arguments.seed)
    except ImportError:
        print("no contact_sheet.png: pip install f2c-plugin[plot]")


def install(arguments):
    """Patch an arcface_torch checkout and copy the configs into it."""
    from f2c_plugin.arcface_torch import patching

    host = patching.find_host(arguments.checkout)
    changes = patching.plan_reverse(host) if arguments.reverse else patching.plan_install(host)
    if not arguments.check:
        patching.apply(host, changes)
    for change in changes:
        verb = "removed" if change.content is None else "written"
        print(f"{change.path} {'would be' if arguments.check else 'is'} {verb} ({change.reason})")
    for config in patching.edited_configs(host):
        print(f"{config.relative_to(host)} stays: it has been edited")
    if not changes:
        print(f"{host}: nothing to do, it is {'as it was without' if arguments.reverse else 'ready for'} the plugin")


def fetch_host(arguments):
    """Clone the tested revision of arcface_torch into the project's cache."""
    from f2c_plugin.arcface_torch import patching

    print(patching.fetch_host(arguments.source))


def doctor(arguments):
    """Say what is installed, whether a checkout is patched, and what a dataset holds."""
    from f2c_plugin.tools.doctor import examine

    if not examine(arguments.checkout, arguments.dataset):
        sys.exit(1)


def export(arguments):
    """Write a trained net as ONNX, as the insightface package loads it."""
    from f2c_plugin.errors import ExportError
    from f2c_plugin.evaluation.onnx_export import export_checked, load_net

    if Path(arguments.model).resolve() == Path(arguments.out).resolve():
        raise ExportError(f"{arguments.out} is the trained model itself, and is not overwritten: name another file")
    net = load_net(arguments.model, arguments.net)
    cosine = export_checked(net, arguments.out)
    print(f"{arguments.out}: the {arguments.net} net, embeddings of {len(net.features.weight)}"
          + ("" if cosine is None else f"; smallest cosine to PyTorch's {cosine:.6f}"))


def checkpoint(arguments):
    """Show what checkpoints hold, or turn arcface_torch's into those of another number of ranks."""
    from f2c_plugin.tools import checkpoints

    if arguments.action == "merge":
        for path in checkpoints.merge(arguments.folder, arguments.out, arguments.ranks):
            print(path)
        return
    for path in arguments.files:
        for what, finding in checkpoints.describe(path):
            print(f"{what:<20} {finding}")


def plan(arguments):
    """Say what F²C, Partial FC and the full FC layer need of each GPU's memory."""
    from f2c_plugin.tools import plan as planning

    planned = planning.Plan(arguments.identities, arguments.gpus, arguments.network, arguments.batch_size,
                            arguments.pool_rate, arguments.pool_dtype, arguments.shard_pool)
    print(f"{planned.identities:,} identities on {planned.gpus} GPUs, batch {planned.batch_size}: the head on each GPU")
    for what, size in planned.table():
        print(f"  {what:<34} {size / 2**20:>11,.0f} MB")
    if arguments.plot:
        planning.draw(planned, arguments.plot)


def report(arguments):
    """Draw the pictures of training runs and write a page that compares them."""
    from f2c_plugin.tools.report import report

    print(report(arguments.folders, arguments.out))


def index(arguments):
    """Index a pack, so that training starts at once, and say what it holds."""
    from f2c_plugin.data.dataset import RecordDataset
    from f2c_plugin.data.index import open_index
    from f2c_plugin.tools import packs

    if arguments.verify:
        number, damaged = packs.verify(arguments.folder)
        for error in damaged.values():
            print(error)
        print(f"{len(damaged)} of {number} records cannot be used" + (":" if damaged else ""), ", ".join(map(str, damaged)))
    open_index(arguments.folder, progress=True)
    dataset = RecordDataset(arguments.folder, skip_damaged=True)
    for what, finding in packs.describe(dataset):
        print(f"{what:<20} {finding}")
    if arguments.plot:
        packs.draw_histogram(dataset, arguments.plot)
    if arguments.verify and damaged:
        sys.exit(1)


def inspect(arguments):
    """Draw a contact sheet of a pack: of one identity, one image, or random identities."""
    from f2c_plugin.data.dataset import RecordDataset
    from f2c_plugin.tools.packs import draw_sheet

    draw_sheet(RecordDataset(arguments.folder, skip_damaged=True), arguments.out, arguments.identity, arguments.image)
    print(arguments.out)


def pack(arguments):
    """Write a pack from a folder of images, one folder an identity."""
    from f2c_plugin.tools.packs import pack_folder

    identities, images = pack_folder(arguments.source, arguments.out)
    print(f"{arguments.out}: {images} images of {identities} identities")


def _parser():
    parser = argparse.ArgumentParser("f2c-plugin", description="F²C for arcface_torch.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(function, subcommands=None):
        name = function.__name__.replace("_", "-")
        sub = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        sub.set_defaults(function=function)
        return sub.add_subparsers(dest=subcommands, required=True) if subcommands else sub.add_argument

    add = command(install)
    add("checkout", help="arcface_torch, or the insightface checkout around it")
    add("--check", action="store_true", help="say what would happen, change nothing")
    add("--reverse", action="store_true", help="restore the checkout")

    add = command(fetch_host)
    add("--from", dest="source", default=HOST_URL, metavar="GIT_URL_OR_PATH")

    add = command(doctor)
    add("--checkout", help="an arcface_torch checkout to look at")
    add("--dataset", help="folder of a pack to look at")

    add = command(index)
    add("folder", help="of train.rec and train.idx")
    add("--plot", metavar="PNG", help="draw the histogram of images per identity")
    add("--verify", action="store_true", help="read every record, decode its image, and list those that cannot be used")

    add = command(inspect)
    add("folder", help="of train.rec and train.idx")
    add("--identity", type=int, metavar="N")
    add("--image", type=int, metavar="N", help="record number")
    add("--out", default="sheet.png", metavar="PNG")

    add = command(pack)
    add("source", help="folder with a folder of .jpg or .png files for each identity")
    add("out", help="where train.rec, train.idx and property go")

    add = command(export)
    add("model", help="a model.pt, or a checkpoint of either host")
    add("out", help="the .onnx file to write")
    add("--net", default="probe", choices=["probe", "gallery"], help="the gallery net is in checkpoints only")

    actions = command(checkpoint, subcommands="action")
    inspecting = actions.add_parser("inspect", help="show what checkpoints hold")
    inspecting.add_argument("files", nargs="+", metavar="FILE", help="of arcface_torch or of f2c_plugin.train")
    merging = actions.add_parser("merge", help="turn the checkpoints of all ranks into those of another number of ranks")
    merging.add_argument("folder", help="of checkpoint_gpu_0.pt, checkpoint_gpu_1.pt, …, by arcface_torch")
    merging.add_argument("out", help="where the new ones go")
    merging.add_argument("--ranks", type=int, required=True, metavar="W")

    add = command(plan)
    add("--identities", type=int, required=True, metavar="N")
    add("--gpus", type=int, default=8, metavar="W")
    add("--network", default="r100")
    add("--batch-size", type=int, default=128, help="of a GPU")
    add("--pool-rate", type=float, default=0.1, help="also Partial FC's sample rate")
    add("--pool-dtype", default="float32")
    add("--shard-pool", action="store_true")
    add("--plot", metavar="PNG", help="draw memory against the number of identities")

    add = command(report)
    add("folders", nargs="+", metavar="folder", help="output folder of a run, by arcface_torch or by f2c_plugin.train")
    add("--out", metavar="DIR", help="where report.html and the PNGs go; default: the first folder")

    add = command(synth)
    add("folder", help="where train.rec, train.idx, property, synth.bin and contact_sheet.png go")
    add("--identities", type=int, required=True)
    add("--images-per-identity", type=int, default=20)
    add("--pairs", type=int, default=6000, help="of the verification set; default 6000, as LFW")
    add("--seed", type=int, default=0)
    add("--processes", type=int, help="default: one per CPU")
    return parser


def main(arguments=None):
    arguments = _parser().parse_args(arguments)
    try:
        arguments.function(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"f2c-plugin {arguments.command}: {error}")


if __name__ == "__main__":
    main()
