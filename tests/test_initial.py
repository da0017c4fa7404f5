"""Trainings that start from pretrained nets and class weights."""

import logging
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from f2c_plugin.arcface_torch.entry_points import f2c_dcp
from f2c_plugin.config import TrainConfig
from f2c_plugin.config_files import load_config
from f2c_plugin.errors import ConfigError
from f2c_plugin.initial import initialize
from f2c_plugin.method.margin import Margin
from f2c_plugin.method.resident import ResidentPool
from f2c_plugin.method.resident_head import ResidentHead
from f2c_plugin.method.schedule import Schedule
from f2c_plugin.models import get_model
from f2c_plugin.synthetic.dataset import write_dataset
from f2c_plugin.trainer.build import margin_loss
from f2c_plugin.trainer.check import check
from f2c_plugin.trainer.full_fc import FullFC
from f2c_plugin.trainer.loop import build_state
from f2c_plugin.trainer.rendezvous import process_group
from f2c_plugin.utils.distributed import Shard
from f2c_plugin.utils.safe_load import load_states
from tests.runs import IDENTITIES, refusal, run
from tests.trainer.test_checkpoint import checkpoints
from tests.trainer.test_numbers import spoil_images

SIZE = 32  # of the embeddings


@pytest.fixture(scope="module")
def net():
    """A net that has seen images."""
    torch.manual_seed(7)
    net = get_model("tiny", SIZE)
    net(torch.randn(8, 3, 112, 112))
    return net


@pytest.fixture
def model(net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "pretrained.pt")
    return "pretrained.pt"


def parameters(state, net):
    return {name: state[name] for name, _ in net.named_parameters()}


def same(states, others):
    return states.keys() == others.keys() and all(torch.equal(value, others[name]) for name, value in states.items())


def start(path):
    """Nets and head of a config before the first batch."""
    cfg = load_config(path)
    with process_group():
        state = build_state(cfg, torch.device("cpu"), 10)
        initialize(cfg, state.backbone, state.head, resumed=False)
    return state


def weights_of(head):
    """{identity: class weight} of a head before the first batch."""
    if isinstance(head, FullFC):
        return dict(enumerate(head.weight.detach()))
    return {identity: row for identity, row in enumerate(head.pool.kept.rows[0]) if row.any()}


def arcface_torch(folder, net, weight, ranks, step=10):
    """Write the checkpoints of arcface_torch with Partial FC on so many ranks. Returns the first."""
    folder.mkdir(exist_ok=True)
    for rank, part in enumerate(weight.tensor_split(ranks)):
        torch.save({"epoch": 1, "global_step": step, "state_dict_backbone": net.state_dict(),
                    "state_dict_softmax_fc": {"weight": part.clone()}, "state_lr_scheduler": {},
                    "state_optimizer": {"state": {}, "param_groups": [{"params": [0, 1]}]}},
                   folder / f"checkpoint_gpu_{rank}.pt")
    return str(folder / "checkpoint_gpu_0.pt")


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A pack of eight identities, as keys of a config whose pool has room for four."""
    folder = tmp_path_factory.mktemp("few")
    write_dataset(folder, 8, 10, num_pairs=2, processes=1)
    return dict(rec=str(folder), num_classes=8, num_image=80, batch_size=4, f2c_pool_rate=0.5, val_targets=[], num_epoch=1,
                save_all_states=True)


@pytest.mark.parametrize("ddp", [False, True])
@pytest.mark.parametrize("file", ["model.pt", "checkpoint of arcface_torch"])
def test_a_training_starts_from_the_net_in_a_file_and_the_log_says_what_was_taken(config, net, model, file, ddp, caplog,
                                                                                  tmp_path):
    caplog.set_level(logging.INFO)
    saved, left = nn.DataParallel(net) if ddp else net, "nothing"
    torch.save(saved.state_dict(), model)
    if file != "model.pt":
        model = arcface_torch(tmp_path / "before", saved, torch.randn(5, 7), 2)
        left = "epoch, global_step, state_dict_softmax_fc, state_lr_scheduler, state_optimizer"
    assert same(start(config(f2c_init=model)).net.state_dict(), net.state_dict())
    assert caplog.messages[-1] == f"f2c_init={model!r}: taken: backbone ({len(net.state_dict())} tensors); left: {left}"


@pytest.mark.parametrize("head", ["f2c_dcp", "softmax"])
def test_the_ramp_is_shorter_from_a_pretrained_net(config, model, head):
    schedules = [start(config(head=head, softmax_ramp=True, f2c_init=file)).head.schedule for file in (model, None)]
    assert [schedule.ramp_steps for schedule in schedules] == [0.3 * 20, 0.7 * 20]


def test_a_gallery_net_starts_from_the_same_states_as_the_probe_net(config, net, model):
    state = start(config(f2c_init=model, f2c_recipe="paper"))
    assert same(state.head.nets["gallery"].net.state_dict(), net.state_dict())


def test_steps_that_are_not_finite_leave_a_pretrained_net_as_it_was(config, net, model, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    spoil_images(monkeypatch, range(10), torch.nan)
    run(config(f2c_init=model, num_epoch=1, val_targets=[]))
    saved = torch.load("out/model.pt")
    assert all(torch.equal(saved[name], value) for name, value in net.state_dict().items() if value.is_floating_point())
    assert caplog.text.count("taken: backbone") == 1


def test_a_training_that_resumes_does_not_load_it_again(config, net, model, caplog):
    caplog.set_level(logging.INFO)
    keys = dict(f2c_init=model, save_all_states=True, val_targets=[], resume="auto")
    run(config(**keys, num_epoch=1))
    assert any("taken: backbone" in message for message in caplog.messages)
    caplog.clear()
    trained = torch.load("out/model.pt")
    assert not same(parameters(trained, net), dict(net.named_parameters()))
    Path(model).unlink()
    path = config(**keys | dict(num_epoch=2, lr=1e-30))
    check(load_config(path))
    run(path)
    assert same(parameters(torch.load("out/model.pt"), net), parameters(trained, net))
    assert f"f2c_init={model!r} is not loaded: the training goes on from its own checkpoint" in caplog.messages


def test_the_factory_loads_it_for_arcface_torch_unless_that_resumes(config, net, model):
    cfg = load_config(config(f2c_init=model))
    for resume in True, False:
        backbone = get_model("tiny", SIZE)
        f2c_dcp(TrainConfig(cfg | dict(resume=resume)), backbone, margin_loss(cfg))
        assert same(backbone.state_dict(), net.state_dict()) is not resume


@pytest.mark.parametrize("change, message", {
    "another net": (dict(network="small"), r"does not fit network='small' with embedding_size=32: it lacks layers\..* and \d+ "
                                           r"more; it holds in another form: .*: set both to what the file was trained with"),
    "embeddings": (dict(embedding_size=16), r"embedding_size=16: it holds in another form: fc.weight \(32 × \d+ numbers "
                                            r"instead of 16 × \d+ numbers\), "),
    "extra": (lambda net: net | {"head.weight": torch.zeros(2)}, "it holds what the net has not: head.weight: set both"),
    "missing": (lambda net: {name: value for name, value in net.items() if name != "fc.bias"}, "it lacks fc.bias: set both"),
    "whole numbers": (lambda net: net | {"fc.bias": net["fc.bias"].long()},
                      r"fc.bias \(32 whole numbers instead of 32 numbers\)"),
    "no tensor": (lambda net: net | {"fc.bias": [0.0]}, r"fc.bias \(a list instead of 32 numbers\)"),
    "NaN": (lambda net: net | {"fc.bias": net["fc.bias"] * torch.nan},
            "pretrained.pt': fc.bias not finite: choose another file"),
    "something else": (lambda net: {"net": net, 5: 1}, "it lacks .* and .* more; it holds what the net has not: net, 5"),
    "empty": (lambda net: {}, r"it lacks .* and \d+ more: set both"),
    "no file": (dict(f2c_init="nowhere.pt"), "f2c_init: nowhere.pt: no such file"),
    "a broken checkpoint": (lambda net: {"state_dict_backbone": net, "epoch": 1},
                            "f2c_init: pretrained.pt: not a whole checkpoint"),
    "classes of a model.pt": (dict(f2c_init_classes=True), "f2c_init_classes=True, but f2c_init='pretrained.pt' holds no class "
                                                           "weights: set it to False, or f2c_init to a checkpoint of "),
    "classes of nothing": (dict(f2c_init=None, f2c_init_classes=True), "f2c_init_classes=True: needs a checkpoint"),
}.values(), ids=lambda value: value[:40] if isinstance(value, str) else "")
def test_what_does_not_fit_is_refused_before_the_training(config, net, model, change, message):
    keys = dict(f2c_init=model)
    if callable(change):
        torch.save(change(dict(net.state_dict())), model)
    else:
        keys |= change
    assert re.search(message, refusal(config(**keys))), refusal(config(**keys))
    assert not Path("out/model.pt").exists()


def test_class_weights_of_a_training_go_on_in_one_with_more_identities(config, few, caplog):
    caplog.set_level(logging.INFO)
    run(config(**few, output="before"))
    file = checkpoints("before")[-1]
    whole = load_states(file)
    saved = whole["head"]
    in_pool = dict(zip(saved["pool.slot_identity"].tolist(), (saved["pool.rows"] * saved["pool.lengths.rows"])[0], strict=True))
    before = dict(enumerate(saved["pool.kept.rows"][0])) | in_pool
    assert len(in_pool) == 4 and len(before) == 8 and all(row.any() for row in before.values())

    keys = dict(f2c_init=str(file), f2c_init_classes=True, f2c_pool_rate=0.75, batch_size=4)
    state = start(config(**keys))
    head = state.head
    assert same(state.net.state_dict(), whole["backbone"]) and same(weights_of(head), before)
    pool = head.pool
    assert (pool.num_slots, pool.num_identities, pool.clock) == (9, IDENTITIES, 0) and not pool.fill()
    assert "tensors), class weights of 8 identities; left: images, " in caplog.text

    # Old identities go on; new ones begin with their first image.
    arrival = pool.admit(torch.tensor([3, 9, 3, 7]), nn.functional.normalize(torch.randn(4, SIZE)))
    assert arrival.is_first.tolist() == [False, True, False, False]
    torch.testing.assert_close(pool.weights_at(pool.lookup(torch.tensor([3, 7]))), torch.stack([before[3], before[7]]))

    weight = start(config(**keys, head="softmax")).head.weight.detach()
    assert torch.equal(weight[:8], torch.stack([before[identity] for identity in range(8)]))
    assert 0.005 < weight[8:].std() < 0.02  # new columns, as they are without


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_class_weights_of_partial_fc_on_any_number_of_ranks_are_taken(config, net, tmp_path, ranks, dtype):
    weight = torch.randn(7, SIZE)
    state = start(config(f2c_init=arcface_torch(tmp_path / "pfc", net, weight, ranks), f2c_init_classes=True,
                         f2c_pool_dtype=dtype, f2c_kept_weights="file"))
    assert same(weights_of(state.head), dict(enumerate(weight.to(getattr(torch, dtype)))))
    assert same(state.net.state_dict(), net.state_dict())


def test_class_weights_of_full_fc_are_taken(config, few):
    run(config(**few, head="softmax", output="before"))
    file = checkpoints("before")[-1]
    head = start(config(f2c_init=str(file), f2c_init_classes=True)).head
    assert same(weights_of(head), dict(enumerate(load_states(file)["head"]["weight"])))


@pytest.mark.parametrize("keys", [dict(head="softmax", num_classes=36), dict(head="softmax"), {}], ids=str)
def test_class_weights_of_sub_centres_are_refused(config, few, keys):
    """Those of a full FC layer are rows that look like those of three times as many identities."""
    head = {name: value for name, value in keys.items() if name == "head"}
    run(config(**few, **head, f2c_sub_centers=3, output="before"))
    before = str(checkpoints("before")[-1])
    with pytest.raises(ConfigError, match=r"has 3 class weights of each identity \(f2c_sub_centers\), which cannot"):
        start(config(f2c_init=before, f2c_init_classes=True, **keys))
    start(config(f2c_init=before, **keys))


def test_identities_that_never_came_begin_with_their_first_image(config, net, tmp_path):
    weight = torch.randn(7, SIZE)
    weight[4] = 0
    head = start(config(f2c_init=arcface_torch(tmp_path / "pfc", net, weight, 1), f2c_init_classes=True)).head
    assert weights_of(head).keys() == {0, 1, 2, 3, 5, 6}


def test_ranks_split_the_class_weights_of_other_ranks(net, tmp_path):
    weight = torch.randn(30, SIZE)
    cfg = dict(f2c_init=arcface_torch(tmp_path / "pfc", net, weight, 3), f2c_init_classes=True, num_classes=50,
               embedding_size=SIZE, network="tiny")
    kept = []
    for rank in range(2):
        backbone = get_model("tiny", SIZE)
        pool = ResidentPool(20, 50, SIZE, shard=Shard(rank, 2))
        initialize(cfg, backbone, ResidentHead(backbone, pool, Schedule(Margin(16.0))), resumed=False)
        assert same(backbone.state_dict(), net.state_dict()) and pool.kept.rows.size(1) == 25
        kept.append(pool.kept.rows[0])
    assert torch.equal(torch.cat(kept)[:30], weight) and not torch.cat(kept)[30:].any()


@pytest.mark.parametrize("keys, message", {
    "fewer identities": (dict(num_classes=6), "holds class weights of 7 identities × 32, for num_classes=6 and "
                                              "embedding_size=32: its identities must be the first of the pack: set "),
    "a head without class weights": (dict(f2c_recipe="paper"), "this head has no class weights of its own: set it to False"),
}.values(), ids=lambda value: value[:40] if isinstance(value, str) else "")
def test_class_weights_that_cannot_be_used_are_refused(config, net, tmp_path, keys, message):
    keys = dict(f2c_init=arcface_torch(tmp_path / "pfc", net, torch.randn(7, SIZE), 2), f2c_init_classes=True) | keys
    with pytest.raises(ConfigError, match=message):
        start(config(**keys))


def drop_rank(folder, net):
    (folder / "checkpoint_gpu_0.pt").unlink()


def of_another_step(folder, net):
    (folder / "checkpoint_gpu_0.pt").rename(folder / "kept")
    arcface_torch(folder, net, torch.randn(7, SIZE), 1, step=11)
    (folder / "checkpoint_gpu_0.pt").rename(folder / "checkpoint_gpu_1.pt")
    (folder / "kept").rename(folder / "checkpoint_gpu_0.pt")


def changed(**entries):
    def change(folder, net):
        path = folder / "checkpoint_gpu_1.pt"
        saved = torch.load(path)
        torch.save(saved | dict(state_dict_softmax_fc=entries), path)
    return change


@pytest.mark.parametrize("change, message", {
    "lost": (drop_rank, "f2c_init: .*: lacks checkpoint_gpu_0.pt: the files of all ranks"),
    "renamed": (lambda folder, net: (folder / "checkpoint_gpu_1.pt").rename(folder / "mine.pt"),
                r"f2c_init: .*mine.pt: is not named checkpoint_gpu_<rank>.pt, so the files of the other ranks"),
    "of another step": (of_another_step, "checkpoint_gpu_1.pt: is from step 11, but checkpoint_gpu_0.pt is from step 10"),
    "of another size": (changed(weight=torch.randn(3, 16)), "holds no class weights"),
    "of no layer": (changed(bias=torch.randn(3)), "holds no class weights"),
    "whole numbers": (changed(weight=torch.ones(3, SIZE, dtype=torch.int64)), "holds no class weights"),
    "NaN": (changed(weight=torch.full((3, SIZE), torch.nan)), "holds class weights that are not finite: choose another file"),
}.values(), ids=lambda value: value[:40] if isinstance(value, str) else "")
def test_files_of_ranks_that_do_not_make_a_whole_are_refused(config, net, tmp_path, change, message):
    file = Path(arcface_torch(tmp_path / "pfc", net, torch.randn(7, SIZE), 2)).with_name("checkpoint_gpu_1.pt")
    change(tmp_path / "pfc", net)
    file = file if file.exists() else file.with_name("mine.pt")
    with pytest.raises(ConfigError, match=message):
        start(config(f2c_init=str(file), f2c_init_classes=True))


SLOTS = {"pool.kept.rows": torch.randn(1, 7, SIZE), "pool.rows": torch.randn(1, 2, SIZE),
         "pool.lengths.rows": torch.tensor([[[0.5], [2.0]]]), "pool.slot_identity": torch.tensor([0, -1])}


@pytest.mark.parametrize("change", [
    {}, {"pool.slot_identity": torch.tensor([7, 0])}, {"pool.slot_identity": torch.tensor([0])},
    {"pool.slot_identity": torch.tensor([0.0, 1.0])}, {"pool.rows": torch.randn(1, 2, 8)}, {"pool.rows": torch.randn(2, SIZE)},
    {"pool.kept.rows": torch.randn(0, 7, SIZE)}, {"pool.kept.rows": None}, {"pool.lengths.rows": None},
    {"pool.lengths.rows": torch.ones(1, 3, 1)}, {"pool.lengths.rows": torch.ones(1, 2, 2)}], ids=range(11))
def test_a_pool_whose_parts_do_not_fit_each_other_is_refused(config, net, tmp_path, change):
    file = arcface_torch(tmp_path / "pfc", net, torch.randn(7, SIZE), 1)
    torch.save(torch.load(file) | dict(state_dict_softmax_fc=SLOTS | change), file)
    path = config(f2c_init=file, f2c_init_classes=True)
    if change:
        with pytest.raises(ConfigError, match="holds no class weights"):
            start(path)
    else:
        found = weights_of(start(path).head)
        assert len(found) == 7 and torch.equal(found[0], 0.5 * SLOTS["pool.rows"][0, 0])
        assert torch.equal(found[6], SLOTS["pool.kept.rows"][0, 6])
