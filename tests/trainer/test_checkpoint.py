"""Checkpoints: resuming bit for bit, on other numbers of ranks, after signals, damaged files and full disks."""

import os
import random
import re
import shutil
import signal
import struct
import subprocess
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from f2c_plugin.config_files import load_config
from f2c_plugin.errors import CheckpointError, TrainingDiverged
from f2c_plugin.synthetic.dataset import write_dataset
from f2c_plugin.trainer.checkpoint import Checkpoints
from f2c_plugin.trainer.logger import TrainingLog
from f2c_plugin.trainer.loop import train as run_training
from f2c_plugin.trainer.rendezvous import process_group
from f2c_plugin.trainer.signals import Stopped
from f2c_plugin.utils.distributed import Shard
from f2c_plugin.utils.safe_load import load_states
from tests.runs import IDENTITIES, IMAGES, history, losses, on_ranks, refusal, run, run_on, start

POOLS = [{}, dict(f2c_recipe="paper"), dict(f2c_recipe="paper", f2c_shard_pool=True)]


def checkpoints(folder="out"):
    return sorted(Path(folder).glob("checkpoint_*.pt"))


def equal(a, b):
    """Whether two states are the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("ranks, keys", [
    (1, {}), (1, dict(head="softmax")), (1, dict(gradient_acc=2)), (1, dict(fp16=True)), (1, dict(optimizer="adamw", lr=1e-3)),
    (1, dict(num_workers=1)), (1, dict(f2c_recipe="paper", f2c_symmetric=False)), (2, {}),
    (2, dict(f2c_recipe="paper", f2c_shard_pool=True)), (2, dict(head="softmax", fp16=True))], ids=str)
def test_a_run_resumed_in_the_middle_of_an_epoch_goes_on_bit_for_bit(config, ranks, keys):
    keys = dict(batch_size=12 // ranks, num_epoch=4, frequent=1, val_targets=[], f2c_save_every=17) | keys
    run_on(ranks, config(**keys))
    whole, model, (middle, end) = losses(), torch.load("out/model.pt"), checkpoints()
    assert len(whole) == 40
    final = load_states(end)
    end.unlink()  # as if the run had been killed before it
    run_on(ranks, config(resume=True, **keys))
    assert load_states(middle)["step"] in (34, 36) and losses() == whole  # the last steps have come again
    assert equal(torch.load("out/model.pt"), model)
    again = load_states(checkpoints()[-1])
    differ = {name for name in final if not equal(final[name], again[name])}
    assert differ <= {"seconds", "settings"}


@pytest.mark.parametrize("keys, steps", [(dict(save_all_states=True), [12, 20]), (dict(f2c_save_every=7), [15, 20])])
def test_what_is_due_within_a_step_of_the_optimizer_is_saved_after_it(config, keys, steps):
    run(config(num_epoch=2, gradient_acc=3, val_targets=[], **keys))
    assert [load_states(file)["step"] for file in checkpoints()] == steps


def run_with_a_signal(path, monkeypatch, number, step):
    """Run, and send a signal to this process while it trains the given step."""
    def update(self, now, *arguments, original=TrainingLog.update):
        if now == step:
            os.kill(os.getpid(), number)
        original(self, now, *arguments)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingLog, "update", update)
        run(path)


def test_sigterm_saves_and_stops_and_sigusr1_saves_and_goes_on(config, monkeypatch):
    keys = dict(frequent=1, val_targets=[], num_epoch=3)
    run(config(output="whole", **keys))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="stopped by a signal after step 13, which is saved"):
        run_with_a_signal(config(**keys), monkeypatch, signal.SIGTERM, 13)
    assert signal.getsignal(signal.SIGTERM) == before
    run_with_a_signal(config(resume=True, **keys), monkeypatch, signal.SIGUSR1, 17)
    assert [load_states(file)["step"] for file in checkpoints()] == [13, 17]
    assert losses() == losses("whole") and equal(torch.load("out/model.pt"), torch.load("whole/model.pt"))


def test_a_signal_to_one_of_two_ranks_stops_both_at_the_same_step(config):
    """SIGTERM to torchrun reaches each rank at its own time; here it reaches one."""
    keys = dict(batch_size=6, num_epoch=400, frequent=1, val_targets=[])
    process = start(config(**keys), ranks=2)
    while not Path("out/history.jsonl").is_file() or len(losses()) < 3:
        assert process.poll() is None, process.communicate()
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[1]), signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode and printed.count("stopped by a signal after step") == 2
    assert load_states(checkpoints()[-1])["step"] == max(losses()) // 12


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_process_group_leaves_the_loader_workers_at_work(config, ranks, number):
    """torchrun, Slurm, systemd and Ctrl-C signal every process of a group; workers that died first took the ranks with them."""
    process = start(config(batch_size=12 // ranks, num_epoch=400, frequent=1, val_targets=[], num_workers=2), ranks,
                    start_new_session=True)
    try:
        while not Path("out/history.jsonl").is_file() or len(losses()) < 3:
            assert process.poll() is None, process.communicate()
        if ranks == 1:  # torchrun itself would end
            os.killpg(process.pid, signal.SIGUSR1)
            while not checkpoints():
                assert process.poll() is None, process.communicate()
        os.killpg(process.pid, number)
        printed, _ = process.communicate(timeout=120)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == (128 + number if ranks == 1 else 1) and "DataLoader worker" not in printed, printed
    if number == signal.SIGTERM:
        assert printed.count("stopped by a signal after step") == ranks, printed
        assert load_states(checkpoints()[-1])["step"] == max(losses()) // 12
    else:
        assert "f2c_plugin.train: interrupted" in printed, printed
        assert ranks > 1 or "KeyboardInterrupt" not in printed, printed  # torchrun and dying workers print tracebacks


class Sized:
    """Pickles as a call that makes a terabyte."""

    def __reduce__(self):
        return bytearray, (1 << 40,)


@pytest.mark.parametrize("states, message", [
    ({"a": [torch.zeros(1).expand(1 << 31)]}, "a tensor of shape (2147483648,) stands for more than the file holds"),
    ({"a": ({0: torch.zeros(1).expand(1 << 25, 1 << 25)},)}, "stands for more than the file holds"),
    ({"a": torch.zeros(1 << 30, device="meta")}, "holds torch._utils _rebuild_meta_tensor_no_storage, which states"),
    ({"a": torch.sparse_coo_tensor([[5]], [1.0], (1 << 40,), check_invariants=True)},
     "holds torch._utils _rebuild_sparse_tensor, which states"),
    ({"a": Sized()}, "holds __builtin__ bytearray, which states of a training do not")],
    ids=["stride 0", "strides 0", "meta", "sparse", "bytearray"])
def test_a_small_file_that_stands_for_much_is_refused_before_it_takes_memory(tmp_path, states, message):
    torch.save(states, tmp_path / "checkpoint.pt")
    assert (tmp_path / "checkpoint.pt").stat().st_size < 5000
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_states(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize("before, after, keys", [(1, 2, POOLS[0]), (2, 1, POOLS[0]), (2, 3, POOLS[0]), (1, 2, POOLS[1]),
                                                 (2, 3, POOLS[2])], ids=str)
def test_a_run_goes_on_with_another_number_of_ranks(config, before, after, keys):
    keys = keys | dict(batch_size=4, num_epoch=2, frequent=1, val_targets=[], f2c_save_every=5)
    run_on(before, config(**keys))
    for file in checkpoints()[1:]:
        file.unlink()
    saved = load_states(checkpoints()[0])
    run_on(after, config(resume=True, **keys))
    end = load_states(checkpoints()[-1])
    # What is lost of the schedule is less than a global batch; of the data, nothing.
    assert 0 <= 240 - end["images"] < 4 * after + 4 * before
    assert end["origin"][1:] == saved["position"][1:] and end["head"]["_extra_state"] == end["step"]
    rates = [entry["learning_rate"] for entry in history() if "loss" in entry]
    assert rates == sorted(rates, reverse=True)


def test_the_passes_go_on_where_a_checkpoint_says_if_pairs_have_become_fewer(config):
    """Up to version 0.2, identities with one image came in pairs, too."""
    keys = dict(num_epoch=1, val_targets=[], f2c_save_every=5)
    run(config(**keys))
    middle, end = checkpoints()
    position = load_states(end)["position"]
    saved = torch.load(middle)
    saved["position"] = [5, saved["position"][1] + 2, saved["position"][2] - 4]
    torch.save(saved, middle)
    end.unlink()
    run(config(resume=True, **keys))
    again = load_states(checkpoints()[-1])
    assert again["origin"] == saved["position"]
    assert 2 * again["position"][1] + again["position"][2] == 2 * position[1] + position[2]


def load_on_a_rank(rank, config_path, folder):
    """What every part has loaded, written down by rank 0."""
    def keep(self, begin=Checkpoints.begin):
        begin(self)
        states = {name: part.state_dict() for name, part in self.parts.items()}
        torch.save(states, f"{folder}/loaded_{rank}.pt")
        raise KeyboardInterrupt
    Checkpoints.begin = keep
    with pytest.raises(KeyboardInterrupt), process_group():
        run_training(load_config(config_path))


@pytest.mark.parametrize("keys", POOLS, ids=str)
def test_pool_gallery_and_optimizer_are_whole_on_every_rank_of_another_number(config, tmp_path, keys):
    path = config(batch_size=4, num_epoch=1, val_targets=[], f2c_save_every=100, **keys)
    run_on(2, path)
    Path(path).write_text(Path(path).read_text() + "\nconfig.resume = True")
    saved = load_states(checkpoints()[0])
    for world_size in 1, 3:
        on_ranks(load_on_a_rank, (path, tmp_path), world_size)
        for rank in range(world_size):
            loaded = torch.load(tmp_path / f"loaded_{rank}.pt")
            assert equal(loaded["backbone"], saved["backbone"])
            assert equal(loaded["optimizer"]["state"], saved["optimizer"]["state"])
            head = {name: saved["head"][name] for name in saved["head"] if name != "_extra_state"}
            if rank and "pool.kept.rows" in head:  # a rank's own
                head["pool.kept.rows"] = head["pool.kept.rows"][:, slice(*Shard(rank, world_size).range_of(IDENTITIES))]
            assert equal({name: loaded["head"][name] for name in head}, head)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1000])


def changed(path):
    """A bit in the middle of its largest part; what lies between the parts means nothing."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        part = max(archive.infolist(), key=lambda entry: entry.file_size)
    start = part.header_offset + 30 + sum(struct.unpack_from("<HH", content, part.header_offset + 26))
    content[start + part.file_size // 2] ^= 1
    path.write_bytes(content)


def not_finite(path):
    saved = torch.load(path)
    saved["head"]["pool.kept.rows"][:, -1] = torch.nan
    torch.save(saved, path)


def momentum_not_finite(path):
    saved = torch.load(path)
    saved["optimizer"]["state"][0]["momentum_buffer"] *= torch.inf
    torch.save(saved, path)


def foreign(path):
    torch.save({"epoch": 1}, path)


def packed(path):
    content = path.read_bytes()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", content + bytes(1 << 24))


@pytest.mark.parametrize("damage", [cut_short, changed, not_finite, momentum_not_finite, foreign, packed,
                                    lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"PK\3\4 no archive")])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(config, damage, caplog):
    keys = dict(num_epoch=1, val_targets=[], f2c_save_every=4)
    run(config(**keys))
    first, last = checkpoints()
    damage(last)
    with caplog.at_level("INFO"):
        run(config(resume=True, **keys))
    assert f"{last}" in caplog.text and "the one before it is taken" in caplog.text and f"going on from {first}" in caplog.text
    assert load_states(last)["step"] == 10
    for file in first, last:
        damage(file)
    assert "resume=True, but there is no whole checkpoint in out" in refusal(config(resume=True, **keys))
    assert checkpoints() == [first, last]  # nothing is removed


def test_damaged_checkpoints_of_higher_numbers_cost_no_good_one_and_go_once_two_newer_ones_are_good(config, monkeypatch):
    keys = dict(val_targets=[], f2c_save_every=4)
    run(config(num_epoch=1, **keys))
    damaged = [Path(f"out/checkpoint_{12 * step:012d}.pt") for step in (14, 16, 500)]  # the second will be written again
    for file in damaged:
        file.write_bytes(b"PK\3\4 no archive")
    seen = []

    def save(self, *arguments, original=Checkpoints.save):
        original(self, *arguments)
        seen.append([int(file.stem[-12:]) // 12 for file in checkpoints()])
    monkeypatch.setattr(Checkpoints, "save", save)
    run(config(num_epoch=2, resume="auto", **keys))
    assert seen == [[10, 12, 14, 16, 500], [12, 14, 16, 500], [16, 20, 500]]
    assert [load_states(file)["step"] for file in checkpoints()[:2]] == [16, 20]
    run(config(num_epoch=3, resume="auto", **keys))
    assert seen[3:] == [[20, 24, 500], [24, 28, 500], [28, 30, 500]]


def test_a_copy_under_a_higher_number_is_not_taken_for_a_newer_checkpoint(config, caplog):
    keys = dict(val_targets=[], f2c_save_every=4)
    run(config(num_epoch=1, **keys))
    shutil.copy(checkpoints()[-1], "out/checkpoint_000000000999.pt")
    Path("out/checkpoint_000000000998.pt").symlink_to(checkpoints()[0].name)
    run(config(num_epoch=2, resume="auto", **keys))
    for name in "999", "998":
        assert f"checkpoint_000000000{name}.pt: a checkpoint after " in caplog.text
    assert [load_states(file)["step"] for file in checkpoints()[:2]] == [16, 20]


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_in_the_way_of_a_result_is_found_before_training_and_of_a_checkpoint_is_named(config, make):
    keys = dict(num_epoch=1, val_targets=[])
    Path("out").mkdir()
    names = ["history.jsonl", "model.onnx", "model.pt", "report.json"]
    for name in names:
        make(f"out/{name}")
    message = refusal(config(**keys))
    assert all(f"out/{name}" in message for name in names) and "not a file, and not replaced by one: move it away" in message
    assert sorted(os.listdir("out")) == [".lock", *names]
    shutil.rmtree("out")
    Path("out").mkdir()
    make("out/checkpoint_000000000120.pt")
    message = refusal(config(f2c_save_every=4, resume="auto", **keys))
    assert "120.pt: cannot be written: Not a file" in message and "move it away and go on from checkpoint_" in message


def test_states_that_are_not_finite_are_not_saved(config, monkeypatch):
    keys = dict(num_epoch=1, val_targets=[], f2c_save_every=4)

    def spoil_and_save(self, step, seconds, save=Checkpoints.save):
        if step == 8:
            moments = self.parts["optimizer"].state_dict()["state"]
            moments[0]["momentum_buffer"][0] = moments[3]["momentum_buffer"][0] = torch.nan
        save(self, step, seconds)
    monkeypatch.setattr(Checkpoints, "save", spoil_and_save)
    with pytest.raises(TrainingDiverged, match=r"not finite after step 8: optimizer.state.0.momentum_buffer, optimizer.state.3"
                       r".*: .*lower lr .*go on from checkpoint_000000000048.pt, which is whole, with resume=True"):
        run(config(**keys))
    assert [load_states(file)["step"] for file in checkpoints()] == [4]


def test_a_new_training_does_not_replace_the_checkpoints_of_another(config):
    run(config(num_epoch=1, val_targets=[], save_all_states=True))
    assert "resume=False, but out holds checkpoints of an earlier training" in refusal(config())
    run(config(num_epoch=1, val_targets=[], resume="auto"))
    run(config(num_epoch=1, val_targets=[], resume="auto", output="new"))


def test_resuming_another_training_is_refused_with_what_has_changed_and_smaller_changes_are_reported(config, caplog):
    run(config(val_targets=[], num_epoch=1, save_all_states=True))
    run(config(val_targets=[], num_epoch=2, resume=True, lr=0.01, batch_size=10))
    assert "lr was 0.05 and is now 0.01" in caplog.text and "batch_size was 12 and is now 10" in caplog.text
    assert history()[-1]["images"] == 240 and history()[-1]["learning_rate"] < 0.01
    message = refusal(config(resume=True, embedding_size=16, f2c_pool_rate=0.9, batch_size=10))
    assert "embedding_size was 32 and is now 16" in message and "f2c_pool_rate was 1.0 and is now 0.9" in message


def test_settings_are_compared_by_value_and_a_key_that_is_not_set_has_its_default(config, caplog):
    keys = dict(val_targets=[], f2c_save_every=5)
    run(config(num_epoch=1, f2c_momentum=0.99, **keys))
    path = checkpoints()[-1]
    saved = torch.load(path)
    del saved["settings"]["optimizer"]
    torch.save(saved, path)
    run(config(num_epoch=1, resume=True, margin_list=[1, 0, 0.2], optimizer="sgd", f2c_symmetric=True, **keys))
    assert " and is now " not in caplog.text
    run(config(num_epoch=1, resume=True, margin_list=(1.0, 0.0, 0.3), **keys))
    assert "margin_list was [1.0, 0.0, 0.2] and is now [1.0, 0.0, 0.3]" in caplog.text
    del saved["settings"]["margin_list"], saved["settings"]["f2c_pool_rate"], saved["pack"]  # the first and the last as in 0.2
    torch.save(saved, path)
    message = refusal(config(num_epoch=1, resume=True, **keys))
    assert "another training: f2c_pool_rate was 0.1 and is now 1.0; set" in message
    assert "margin_list was None" not in caplog.text


def test_another_pack_of_as_many_images_is_refused_and_a_copy_is_not(config, faces, tmp_path):
    keys = dict(num_epoch=1, val_targets=[], save_all_states=True)
    run(config(**keys))
    shutil.copytree(faces, tmp_path / "copy")
    run(config(resume=True, rec="copy", **keys))
    write_dataset(tmp_path / "other", IDENTITIES, IMAGES, num_pairs=10, seed=1, processes=1)
    message = refusal(config(resume=True, rec="other", **keys))
    assert "belongs to another training: rec='other' is another pack: its images or identities differ; set them back" in message


def test_mixed_precision_can_be_switched_on_for_the_rest_of_a_training(config, caplog):
    run(config(num_epoch=1, val_targets=[], save_all_states=True))
    run(config(num_epoch=2, val_targets=[], resume=True, fp16=True))
    assert "fp16 was False and is now True" in caplog.text and history()[-1]["images"] == 240


def test_only_the_trainers_own_half_written_files_are_removed(config):
    Path("out").mkdir()
    ours = [f"{name}.0123abcd.partial" for name in ("checkpoint_000000000048.pt", "model.pt", "history.jsonl", "report.json",
                                                    "synth_scores.npz", "gallery_synth_scores.npz")]
    theirs = ["notes.partial", "x.pt.partial", "x.pt.0123abcd.partial", "model.pt.partial", "model.pt.old.partial",
              "checkpoint_best.pt.0123abcd.partial"]
    for name in (*ours, *theirs):
        Path("out", name).write_bytes(b"half")
    run(config(num_epoch=1, val_targets=[]))
    assert sorted(path.name for path in Path("out").glob("*.partial")) == sorted(theirs)


def test_random_states_are_kept(config):
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    from f2c_plugin.trainer.checkpoint import _random_state, _set_random_state
    torch.randn(3), np.random.randn(3), random.gauss(0, 1)
    torch.save(_random_state(), "state.pt")
    drawn = torch.rand(4).tolist(), np.random.randn(4).tolist(), [random.gauss(0, 1) for _ in range(4)]
    _set_random_state(torch.load("state.pt", weights_only=True))
    assert drawn == (torch.rand(4).tolist(), np.random.randn(4).tolist(), [random.gauss(0, 1) for _ in range(4)])


def as_root():
    return os.geteuid() == 0


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 12 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("A FULL DISK IS NOT TESTED: mounting a tmpfs is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", folder])


def test_a_disk_too_small_is_refused_before_training_and_one_that_fills_up_keeps_the_last_checkpoint(config, small_disk):
    keys = dict(num_epoch=1, val_targets=[], f2c_save_every=4, output=str(small_disk / "out"))
    message = refusal(config(network="r18", **keys))
    assert "checkpoints need about" in message and "MB are free: make room, or choose another output" in message

    path = config(embedding_size=4, **keys)

    def save_when_full(self, step, seconds, save=Checkpoints.save):
        if step == 8:
            try:
                with open(small_disk / "rest", "wb", buffering=0) as file:
                    while True:
                        file.write(bytes(4096))
            except OSError:
                pass
        save(self, step, seconds)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_when_full)
        with pytest.raises(CheckpointError, match="cannot be written: No space left.*checkpoint_000000000048.pt, which is"):
            run(path)
    assert not list((small_disk / "out").glob("*.partial"))
    assert load_states(checkpoints(small_disk / "out")[-1])["step"] == 4
    (small_disk / "rest").unlink()
    run(config(embedding_size=4, resume=True, **keys))
    assert load_states(checkpoints(small_disk / "out")[-1])["step"] == 10

    # There is room for less than three checkpoints, but two are there already.
    size = checkpoints(small_disk / "out")[-1].stat().st_size
    (small_disk / "rest").write_bytes(bytes(shutil.disk_usage(small_disk).free - int(2.5 * size)))
    run(config(embedding_size=4, resume=True, **keys | dict(num_epoch=2)))
    assert load_states(checkpoints(small_disk / "out")[-1])["step"] == 20


def test_an_output_folder_that_cannot_be_written_is_refused_before_training(config, tmp_path):
    folder = tmp_path / "read-only"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], capture_output=True).returncode:
        folder.chmod(0o500)
        if os.access(folder, os.W_OK):
            pytest.skip("A READ-ONLY FOLDER IS NOT TESTED: mounting one is not allowed here, and root writes into any other")
    try:
        assert "read-only/out" in refusal(config(output=str(folder / "out")))
    finally:
        subprocess.run(["umount", "-l", folder], capture_output=True)
