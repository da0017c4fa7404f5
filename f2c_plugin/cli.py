"""The command ``f2c-plugin``."""

import argparse
import sys
from pathlib import Path


def synth(arguments):
    """Draw a pack of synthetic faces and a verification set."""
    from f2c_plugin.tools.synth import draw_contact_sheet, write_dataset

    folder = Path(arguments.folder)
    write_dataset(folder, arguments.identities, arguments.images_per_identity, arguments.pairs, arguments.seed,
                  arguments.processes)
    try:
        draw_contact_sheet(folder / "contact_sheet.png", min(8, arguments.identities), seed=arguments.seed)
    except ImportError:
        print("no contact_sheet.png: pip install f2c-plugin[plot]")


def _parser():
    parser = argparse.ArgumentParser("f2c-plugin", description="F²C for arcface_torch.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(function, name=None):
        sub = commands.add_parser(name or function.__name__, help=function.__doc__, description=function.__doc__)
        sub.set_defaults(function=function)
        return sub.add_argument

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
