"""The dual loader: its batches, with and without workers."""

import subprocess
import sys

import pytest
import torch

from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.data.loader import DualLoader
from f2c_plugin.data.sampler import DualSampler
from f2c_plugin.errors import RecordError
from tests.conftest import FIXTURES

CPU = torch.device("cpu")


def make_loader(num_workers=0, root=FIXTURES / "insightface", epoch=0):
    dataset = RecordDataset(root)
    loader = DualLoader(dataset, DualSampler(dataset.index, 6, 4, 2 / 3, seed=3), CPU, num_workers)
    loader.sampler.set_epoch(epoch)
    return loader


def test_batches_follow_the_sampler_and_are_normalised_as_in_arcface_torch_and_partly_mirrored():
    loader = make_loader()
    mirrored = 0
    batches = [loader.sampler.batch(step) for step in loader.sampler.steps]
    for (images, labels), positions in zip(loader, batches, strict=True):
        assert images.shape == (6, 3, 112, 112) and images.dtype == torch.float32
        assert images.min() >= -1 and images.max() <= 1 and labels.dtype == torch.int64
        assert labels.tolist() == loader.sampler.index.identity[positions].tolist()
        for image, position in zip(images, positions, strict=True):
            face = torch.from_numpy(loader.dataset.dataset.face(position)).permute(2, 0, 1).float()
            plain = (face / 255 - 0.5) / 0.5
            assert torch.equal(image, plain) or torch.equal(image, plain.flip(2))
            mirrored += torch.equal(image, plain.flip(2))
    assert 4 <= mirrored <= 20


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_yield_the_batches_of_one_process(num_workers):
    for (images, labels), (expected, expected_labels) in zip(make_loader(num_workers), make_loader(), strict=True):
        assert torch.equal(images, expected) and torch.equal(labels, expected_labels)


def test_an_epoch_is_repeatable_and_differs_from_the_next():
    first = [images for images, _ in make_loader()]
    assert all(map(torch.equal, first, (images for images, _ in make_loader())))
    assert not all(map(torch.equal, first, (images for images, _ in make_loader(epoch=1))))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_started_in_the_middle_yields_the_rest_of_the_full_epoch(num_workers):
    whole = list(make_loader(num_workers, epoch=2))
    loader = make_loader(num_workers)
    loader.sampler.set_epoch(2, first_step=1)
    assert len(loader) == 3
    rest = list(loader)
    assert len(rest) == 3 and len(loader) == 4  # the next epoch is a whole one
    for (images, labels), (expected, expected_labels) in zip(rest, whole[1:], strict=True):
        assert torch.equal(images, expected) and torch.equal(labels, expected_labels)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_image_stops_the_epoch_and_the_error_names_pack_record_and_identity(pack, num_workers):
    folder = pack("insightface")
    content = bytearray((folder / "train.rec").read_bytes())
    offsets = [int(line.split()[1]) for line in (folder / "train.idx").read_text().splitlines()]
    content[offsets[5] + 100:offsets[5] + 1000] = bytes(900)  # record 5, an image of identity 2
    (folder / "train.rec").write_bytes(content)
    with pytest.raises(RecordError, match=r"train.rec: record 5 \(identity 2\) cannot be decoded"):
        for _ in range(5):
            list(make_loader(num_workers, folder))


@pytest.mark.parametrize("end", ["", "raise KeyboardInterrupt", "raise SystemExit(7)",
                                 "import gc; ring = [iterator]; ring.append(ring); del iterator, ring; gc.collect()"])
def test_a_process_ends_however_its_loader_ends(end):
    """Its workers ignore the SIGTERM that multiprocessing would end them with."""
    script = ("import sys, torch; from f2c_plugin import DualLoader, DualSampler, RecordDataset\n"
              "dataset = RecordDataset(sys.argv[1]); sampler = DualSampler(dataset.index, 4, 2, 0.5, 0, 0, 1)\n"
              f"iterator = iter(DualLoader(dataset, sampler, torch.device('cpu'), num_workers=2)); next(iterator)\n{end}")
    run = subprocess.run([sys.executable, "-c", script, str(FIXTURES / "insightface")], capture_output=True, text=True,
                         timeout=600)
    assert run.returncode == {"raise KeyboardInterrupt": -2, "raise SystemExit(7)": 7}.get(end, 0), run.stderr


def test_workers_end_when_their_process_is_killed():
    script = ("import os, signal, sys, torch; from f2c_plugin import DualLoader, DualSampler, RecordDataset\n"
              "from f2c_plugin.data import loader\n"
              "parent, start = os.getpid(), loader._start_worker\n"
              "def killed(number):\n"  # before PyTorch looks who the parent is
              "    print(os.getpid(), flush=True); os.kill(parent, signal.SIGKILL)\n"
              "    while os.getppid() == parent: pass\n"
              "    start(number)\n"
              "loader._start_worker = killed\n"
              "dataset = RecordDataset(sys.argv[1]); sampler = DualSampler(dataset.index, 4, 2, 0.5, 0, 0, 1)\n"
              "next(iter(DualLoader(dataset, sampler, torch.device('cpu'), num_workers=1)))\n")
    run = subprocess.Popen([sys.executable, "-c", script, str(FIXTURES / "insightface")], stdout=subprocess.PIPE, text=True)
    printed, _ = run.communicate(timeout=300)  # the worker holds the pipe open while it lives
    assert run.returncode == -9 and printed.strip().isdigit()
