"""What heads learn in a world of vectors, where a pass over 200,000 images takes a minute and a million identities fit.

    python benchmarks/vectors.py --identities 10000 --passes 1 8 --seeds 3 --lr 0.05 0.1 0.2 --jobs 2
    python benchmarks/vectors.py --identities 1000000 --images 4 --pool-rate 0.01 \\
        --variants "F²C 1 %" "Partial FC 0.01, with the ramp"

An identity is a vector of 48 numbers. An image of it is 128 numbers, a non-linear mixture of this vector and of 32 others that
mean nothing, with noise. A perceptron of three layers embeds it. Heads, optimizer, learning rate and steps are those of the
built-in trainer, on a GPU where there is one, else on one thread. TAR and AUC are over all pairs of 5,000 images of 500
identities that are in no training set, 22,500 of them same.

Images are drawn once, into files in --work. How heads are compared, and what is printed and written: see `comparison.py`.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import cast

import comparison
import numpy as np
import torch
from comparison import Result, Run
from torch import Tensor, nn
from torch.nn.functional import normalize
from worlds import spoiled

from f2c_plugin.config import F2CConfig
from f2c_plugin.data.from_config import training_device
from f2c_plugin.data.recordio import Int64s
from f2c_plugin.data.sampler import DualSampler
from f2c_plugin.errors import F2CError
from f2c_plugin.models import NETWORKS, Factory
from f2c_plugin.synthetic.dataset import power_law
from f2c_plugin.trainer import build
from f2c_plugin.trainer.loop import build_state, train_step
from f2c_plugin.trainer.rendezvous import process_group
from f2c_plugin.utils.atomic import written_whole

IDENTITY, OTHERS, HIDDEN, IMAGE = 48, 32, 256, 128  # numbers
LAYER = 512
UNSEEN = 500, 10  # identities that are in no training set, and images of each
CHUNK = 100_000  # images that are drawn at once
_MIXING, _TRAINING, _UNSEEN = range(3)  # random streams


class Perceptron(nn.Sequential):
    """From images (B, 128) to embeddings (B, num_features)."""

    def __init__(self, num_features: int):
        def layer(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
        last = nn.Linear(LAYER, num_features), nn.BatchNorm1d(num_features)
        super().__init__(*layer(IMAGE, LAYER), *layer(LAYER, LAYER), *last)


class World:
    """Draws the images of identities.

    Args:
        noise, nuisance: how strong noise and meaningless numbers are.
        seed: of everything in this world.
    """

    def __init__(self, noise: float, nuisance: float, seed: int):
        self.noise, self.nuisance, self.seed = noise, nuisance, seed
        random = self._random(_MIXING)
        self._mix_in = 2 / (IDENTITY + OTHERS) ** 0.5 * torch.randn(IDENTITY + OTHERS, HIDDEN, generator=random)
        self._mix_out = torch.randn(HIDDEN, IMAGE, generator=random) / HIDDEN ** 0.5

    def _random(self, *stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(int(np.random.default_rng([self.seed, *stream]).integers(1 << 62)))

    def _identities(self, stream: int, count: int) -> Tensor:
        return torch.randn(count, IDENTITY, generator=self._random(stream))

    def _draw(self, identities: Tensor, random: torch.Generator) -> Tensor:
        """An image (128,) of each row of identities (n, 48)."""
        others = self.nuisance * torch.randn(len(identities), OTHERS, generator=random)
        clean = torch.tanh(torch.cat([identities, others], 1) @ self._mix_in) @ self._mix_out
        return clean + self.noise * torch.randn(clean.shape, generator=random)

    def write(self, path: Path, labels: Int64s) -> None:
        """Write the images of the training set into a file of NumPy, float16 (n, 128)."""
        identities = self._identities(_TRAINING, int(labels[-1]) + 1)
        with written_whole(path) as file:
            np.lib.format.write_array_header_2_0(file, dict(descr="<f2", fortran_order=False, shape=(len(labels), IMAGE)))
            for start in range(0, len(labels), CHUNK):
                drawn = self._draw(identities[labels[start:start + CHUNK]], self._random(_TRAINING, start))
                file.write(drawn.half().numpy().tobytes())

    def unseen(self) -> tuple[Tensor, np.ndarray]:
        """Images float32 (5000, 128) of identities that are in no training set, and their labels."""
        labels = np.repeat(np.arange(UNSEEN[0]), UNSEEN[1])
        return self._draw(self._identities(_UNSEEN, UNSEEN[0])[labels], self._random(_UNSEEN, 0)), labels


def labels_of(arguments: argparse.Namespace) -> Int64s:
    """The true label of each image of the training set, in ascending order."""
    counts = power_law(arguments.identities, arguments.images) if arguments.long_tail else arguments.images
    return np.repeat(np.arange(arguments.identities), counts)


def train_one(arguments: argparse.Namespace, world: World, images: np.ndarray, labels: Int64s, run: Run) -> Result:
    """Train in this process, and measure the net."""
    NETWORKS["perceptron"] = cast(Factory, lambda num_features, fp16: Perceptron(num_features))
    cfg = comparison.config(arguments, run, int(labels.max()) + 1, network="perceptron")
    is_f2c = cfg.head not in (comparison.FULL_FC, comparison.PARTIAL_FC)
    share_of_pairs = F2CConfig.read(cfg).share_of_pairs if is_f2c else 0.0
    sampler = DualSampler.from_labels(labels, cfg.batch_size, share_of_pairs, cfg.seed, run.steps)
    with process_group():
        build.seed_everything(cfg.seed)
        device = training_device(0)
        state = build_state(cfg, device, run.steps)
        begin = time.perf_counter()
        for batch in sampler:
            train_step(state, torch.from_numpy(images[batch]).to(device).float(), torch.from_numpy(labels[batch]).to(device))
        state.bad_steps.settle()
        seconds = time.perf_counter() - begin
    faces, identity = world.unseen()
    with torch.no_grad():
        found = comparison.pair_metrics(normalize(state.net.eval()(faces.to(device))).cpu(), identity)
    return found | {"classes": comparison.classes_in_a_step(cfg), "images_per_s": run.steps * cfg.batch_size / seconds}


def main() -> None:
    parser = comparison.parser(__doc__ or "")
    parser.set_defaults(batch_size=256, identities=10_000)
    parser.add_argument("--noise", type=float, default=0.45, help="standard deviation")
    parser.add_argument("--nuisance", type=float, default=1.8,
                        help="standard deviation of what means nothing; that of identities is 1")
    parser.add_argument("--world-seed", type=int, default=4, help="worlds differ by a few points")
    arguments, variants = comparison.parsed(parser)
    own = {name: getattr(arguments, name) for name in ("identities", "images", "noise", "nuisance", "world_seed")}
    setting = {"world": "vectors"} | comparison.setting_of(arguments) | own
    try:
        labels = labels_of(arguments)
        world = World(arguments.noise, arguments.nuisance, arguments.world_seed)
        name = "_".join(["vectors", *map(str, own.values()), *(["long-tail"] if arguments.long_tail else [])])
        path = arguments.work / f"{name}.npy"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            world.write(path, labels)
        images = np.load(path, mmap_mode="r")
        labels = spoiled(labels, arguments.wrong_labels, arguments.split, arguments.world_seed)
        compared = comparison.Comparison(arguments, variants, setting, len(labels),
                                         lambda run, _: train_one(arguments, world, images, labels, run), threads=1)
        if arguments.child:
            return compared.child(arguments.child)
        comparison.main(compared, [*comparison.SETTING_COLUMNS, *comparison.PAIR_COLUMNS, comparison.SPEED_COLUMN])
    except F2CError as error:
        sys.exit(f"{parser.prog}: {error}")


if __name__ == "__main__":
    main()
