"""Train from an arcface_torch config file, on CPU or GPU: the built-in trainer's command.

    python -m f2c_plugin.train CONFIG [KEY=VALUE …]
    torchrun --nproc_per_node=N -m f2c_plugin.train CONFIG [KEY=VALUE …]

``config.head`` is the name of an installed head ("f2c_dcp"), or "softmax" for the full FC layer.
Into ``config.output`` go training.log, TensorBoard scalars, history.jsonl, model.pt, model.onnx,
verification scores and report.json, and checkpoints. SIGUSR1 saves one; SIGTERM saves one and stops.

Exit codes:

0: the training has finished, its model is finite and all files are written.
1: an error, on stderr: config, data, checkpoint or disk, a training that has diverged, or another one in the folder.
2: wrong arguments.
130: Ctrl-C (SIGINT).
143: SIGTERM. If it came between the first and the last step, the step that it came in is saved.

torchrun and torch.distributed.launch exit with 1 if a rank does not exit with 0, whose code they print, and if
they are signalled themselves: they hand SIGTERM and SIGINT on to all ranks.
"""

import argparse
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

from f2c_plugin.errors import F2CError
from f2c_plugin.trainer.signals import Stopped, listening
from f2c_plugin.utils.terminal import tolerate_any_terminal


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m f2c_plugin.train", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("config", help="path of a config file, or the name of one that comes with the package")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE",
                        help="a key and its value, which replaces the file's, as lr=0.2")
    # torch.distributed.launch gives it, and sets LOCAL_RANK, too.
    parser.add_argument("--local-rank", "--local_rank", help=argparse.SUPPRESS)
    tolerate_any_terminal()
    try:
        with listening():
            args = parser.parse_args(arguments)
            _train(args.config, args.overrides)
    except (F2CError, OSError) as error:
        sys.exit(f"f2c_plugin.train: {error}")
    except Stopped as stopped:
        print(f"f2c_plugin.train: {stopped}", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would interrupt the end of the loader workers
        print("f2c_plugin.train: interrupted. Where there are checkpoints (f2c_save_every, save_all_states), resume=True goes "
              "on from the last", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _train(config: str, overrides: list[str]) -> None:
    # Signals are heard already: this imports PyTorch, which takes seconds.
    from f2c_plugin.config_files import load_config
    from f2c_plugin.trainer.check import check
    from f2c_plugin.trainer.logger import logging_to
    from f2c_plugin.trainer.loop import train
    from f2c_plugin.trainer.output import sole_user
    from f2c_plugin.trainer.rendezvous import process_group

    cfg = load_config(config, overrides)
    check(cfg, int(os.environ.get("WORLD_SIZE", 1)))
    rank, folder = int(os.environ.get("RANK", 0)), Path(cfg.output)
    with sole_user(folder, rank), logging_to(folder, cfg.resume) if rank == 0 else nullcontext(), process_group():
        train(cfg)


if __name__ == "__main__":
    main()
