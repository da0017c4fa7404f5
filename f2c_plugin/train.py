"""Train from an arcface_torch config file, on CPU or GPU: the built-in trainer's command.

    python -m f2c_plugin.train CONFIG
    torchrun --nproc_per_node=N -m f2c_plugin.train CONFIG

``config.head`` is the name of an installed head ("f2c_dcp"), or "softmax" for the full FC layer.
Into ``config.output`` go training.log, TensorBoard scalars, history.jsonl, model.pt, model.onnx,
verification scores and report.json, and checkpoints. SIGUSR1 saves one; SIGTERM saves one and stops.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

from f2c_plugin.config import load_config
from f2c_plugin.errors import F2CError
from f2c_plugin.trainer.check import check
from f2c_plugin.trainer.logger import init_logging
from f2c_plugin.trainer.loop import train
from f2c_plugin.trainer.rendezvous import process_group
from f2c_plugin.trainer.signals import Stopped


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m f2c_plugin.train", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("config", help="path of a config file, or the name of one that comes with the package")
    try:
        cfg = load_config(parser.parse_args(arguments).config)
        check(cfg, int(os.environ.get("WORLD_SIZE", 1)))
        if int(os.environ.get("RANK", 0)) == 0:
            init_logging(Path(cfg.output), cfg.resume)
        with process_group():
            train(cfg)
    except (F2CError, OSError) as error:
        sys.exit(f"f2c_plugin.train: {error}")
    except Stopped as stopped:
        print(f"f2c_plugin.train: {stopped}", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except KeyboardInterrupt:
        sys.exit("f2c_plugin.train: interrupted. Where there are checkpoints (f2c_save_every, save_all_states), resume=True "
                 "goes on from the last")


if __name__ == "__main__":
    main()
