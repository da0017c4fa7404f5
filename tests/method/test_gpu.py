"""On a real GPU: `make gpu`, or `pytest -m gpu`. With F2C_GPU_TESTS_ON=cpu the same tests run without one."""

import os

import pytest
import torch
from torch import distributed, nn
from torch.nn.functional import normalize

from f2c_plugin import Margin, build_head
from f2c_plugin.method import pool_softmax
from f2c_plugin.method.margin import SFace
from f2c_plugin.tools.plan import Plan
from f2c_plugin.utils import replay
from f2c_plugin.utils.sharded_rows import ShardedRows
from tests.runs import history, run

pytestmark = pytest.mark.gpu
RECIPES = pytest.mark.parametrize("recipe", ["resident", "paper"])
SIZE, BATCH, SLOTS, IDENTITIES = 64, 32, 300, 1000
FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "operators"])
METHODS = pytest.mark.parametrize("keys", [
    dict(recipe="resident", margin=SFace(32.0, 0.9, 1.2)), dict(recipe="paper", margin=SFace(32.0, 0.9, 1.2)),
    dict(recipe="resident", sub_centers=3), dict(recipe="resident", forget_rate=0.3),
    dict(recipe="dcq", queue_size=SLOTS), dict(recipe="dcq", queue_size=SLOTS, gallery_images=4)], ids=str)


@pytest.fixture
def device():
    found = torch.device(os.environ.get("F2C_GPU_TESTS_ON", "cuda"))
    if found.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("NOT TESTED ON A GPU: there is none")
    return found


def make(device, recipe, size=SIZE, slots=SLOTS, identities=IDENTITIES, margin=Margin(32.0, additive=0.2), **keys):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, size)).to(device)
    return net, build_head(net, identities, 100, embedding_size=size, margin=margin, num_slots=slots, recipe=recipe, **keys)


def batches(steps, device, batch=BATCH, identities=IDENTITIES):
    """Halves that share identities; most are evicted before they come back."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        half = torch.randint(identities, (batch // 2,), generator=generator)
        yield torch.randn(batch, 3, 4, 4, generator=generator).to(device), half.repeat(2).to(device)


def losses(net, head, steps):
    """Losses of steps of SGD."""
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    found = []
    for images, labels in steps:
        loss = head(net(images), labels, images=images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found).tolist()


@RECIPES
@FUSED
def test_a_gpu_learns_what_the_cpu_learns(device, recipe, fused):
    found, expected = (losses(*made, batches(40, where)) for where, made in (
        (device, make(device, recipe, fused=fused)), ("cpu", make("cpu", recipe, fused=False))))
    assert found == pytest.approx(expected, rel=1e-3)


@METHODS
def test_a_gpu_learns_by_the_methods_what_the_cpu_learns(device, keys):
    found, expected = (losses(*make(where, **keys), batches(40, where)) for where in (device, "cpu"))
    assert found == pytest.approx(expected, rel=1e-3)


@RECIPES
@FUSED
@pytest.mark.parametrize("autocast, pool_dtype", [(False, "float32"), (True, "float32"), (True, "float16"), (True, "bfloat16")])
def test_a_step_never_makes_the_cpu_wait(device, recipe, fused, autocast, pool_dtype):
    net, head = make(device, recipe, fused=fused, autocast=autocast, pool_dtype=getattr(torch, pool_dtype))
    runs_without_a_wait(net, head, device)


@METHODS
def test_no_method_makes_the_cpu_wait(device, keys):
    runs_without_a_wait(*make(device, **keys, autocast=True, pool_dtype=torch.float16), device)


def runs_without_a_wait(net, head, device):
    steps = list(batches(8, device))
    losses(net, head, steps[:5])  # the first set up libraries, and the fourth is recorded
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        for images, labels in steps[5:]:
            head(net(images), labels, images=images).backward()
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    head.pool.validate()


def two_kinds_of_losses(device, monkeypatch, recipe, **keys):
    """Of steps that are recorded, and of steps that never are; with smaller batches, and after a state was loaded."""
    found = []
    for calls_before in (3, 1 << 30):
        monkeypatch.setattr(replay, "_CALLS_BEFORE", calls_before)
        net, head = make(device, recipe, autocast=device.type == "cuda", pool_dtype=torch.float16, **keys)
        some = losses(net, head, batches(12, device)) + losses(net, head, batches(5, device, BATCH // 2))
        head.load_state_dict(head.state_dict())
        found.append(some + losses(net, head, batches(8, device)))
        if device.type == "cuda":
            assert (head._replay._recording is None) == (calls_before > 3)
    return found


@RECIPES
@pytest.mark.parametrize("margin", [dict(additive=0.2), dict(angular=0.3), dict(additive=0.3, adaptive=True)], ids=str)
def test_recorded_steps_are_those_that_are_not(device, recipe, margin, monkeypatch):
    recorded, others = two_kinds_of_losses(device, monkeypatch, recipe, margin=Margin(32.0, **margin))
    assert recorded == pytest.approx(others, rel=1e-3)


@METHODS
def test_recorded_steps_of_the_methods_are_those_that_are_not(device, keys, monkeypatch):
    recorded, others = two_kinds_of_losses(device, monkeypatch, **keys)
    assert recorded == pytest.approx(others, rel=1e-3)


def test_garbage_does_not_end_a_recording(device):
    """A head that is gone lets go of the main memory that its GPU sees, which is refused while the GPU records."""
    def step(ones, number):
        _ = [[] for _ in range(100_000)]  # enough for the garbage collector to come
        return [ones + number]

    replayed = replay.Replay(step)
    for _ in range(6):
        make(device, "resident")  # garbage at once, which only the collector frees
        found, = replayed([torch.ones(3, device=device)], [1.0], [])
        assert found.tolist() == [2.0] * 3


def _of_two_ranks(rank, store, device, recipe, queue):
    with pytest.MonkeyPatch.context() as monkeypatch:
        distributed.init_process_group("gloo", store=distributed.FileStore(store, 2), rank=rank, world_size=2)
        queue.put(two_kinds_of_losses(device, monkeypatch, recipe, shard_pool=True))
        distributed.destroy_process_group()


@RECIPES
def test_collectives_lie_between_the_parts_of_a_recording(device, recipe, tmp_path):
    """Two ranks on one GPU, which gloo allows."""
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    of_all = str(tmp_path / "store"), device, recipe, queue
    ranks = [context.Process(target=_of_two_ranks, args=(rank, *of_all)) for rank in range(2)]
    for each in ranks:
        each.start()
    found = [queue.get(timeout=120) for _ in ranks]
    for each in ranks:
        each.join()
    for recorded, others in found:
        assert recorded == pytest.approx(others, rel=1e-3)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_fused_kernels_equal_the_operators(device, dtype, tolerance):
    torch.manual_seed(0)
    probes, rows = (normalize(torch.randn(n, 512, device=device)).to(dtype).float() for n in (100, 5001))
    own_slot = torch.randint(5001, (100,), device=device)
    expected = pool_softmax.pool_softmax(probes, rows, None, 16.0, 3, own_slot=own_slot, fused=False)
    found = pool_softmax.pool_softmax(probes, rows.to(dtype), None, 16.0, 3, dtype=dtype, own_slot=own_slot)
    torch.testing.assert_close(found.total, expected.total, rtol=0, atol=tolerance)
    torch.testing.assert_close(found.hardest_cosine, expected.hardest_cosine, rtol=0, atol=tolerance)
    step = found.total, own_slot, -torch.ones(100, device=device), 16.0, 0.5
    lengths = torch.ones(5001, 1, device=device)
    exact, fused = (rows.clone(), lengths.clone()), (rows.to(dtype, copy=True), lengths.clone())
    pool_softmax.learn(*exact, probes, *step, fused=False)
    pool_softmax.learn(*fused, probes, *step, dtype=dtype)
    assert (exact[0] - rows).abs().max() > 0.01
    for new, old in zip(fused, exact, strict=True):
        torch.testing.assert_close(new.float(), old, rtol=0, atol=tolerance)


def test_a_pool_drawn_on_the_gpu_is_that_of_the_cpu(device):
    with device:
        drawn = ShardedRows(2, 3000, 40, seed=3).rows
    assert drawn.device.type == device.type and torch.equal(drawn.cpu(), ShardedRows(2, 3000, 40, seed=3).rows)


def test_class_weights_wait_in_main_memory_and_resume_elsewhere(device):
    net, head = make(device, "resident")
    losses(net, head, batches(60, device))
    state = {name: value.cpu() for name, value in head.state_dict().items() if torch.is_tensor(value)}
    assert (state["pool.kept.rows"][0].norm(dim=1) > 0).sum() > SLOTS  # as many as have been evicted
    _, other = make("cpu", "resident")
    other.load_state_dict(head.state_dict())
    _, back = make(device, "resident")
    back.load_state_dict(other.state_dict())
    for images, labels in batches(5, device):
        embeddings = net(images).detach()
        torch.testing.assert_close(back(embeddings, labels), head(embeddings, labels))
    back.pool.validate()


@RECIPES
def test_memory_is_what_plan_says(device, recipe):
    if device.type != "cuda":
        pytest.skip("the memory of a GPU")
    before = torch.cuda.memory_allocated()
    net, head = make(device, recipe, 512, 200_000, 2_000_000, autocast=True, pool_dtype=torch.float16)
    steps = list(batches(8, device, 128, 2_000_000))
    losses(net, head, steps[:1])  # cuBLAS takes memory for itself
    torch.cuda.reset_peak_memory_stats()
    losses(net, head, steps)
    used = torch.cuda.max_memory_allocated() - before
    plan = Plan(2_000_000, gpus=1, batch_size=128, pool_dtype="float16", recipe=recipe)
    assert used == pytest.approx(plan.f2c(device.type), rel=0.1)


@pytest.mark.parametrize("keys", [
    {}, dict(head="dcq"), dict(head="softmax", softmax_ramp=True, f2c_sub_centers=3), dict(f2c_low_resolution=0.5),
    dict(f2c_forget_rate=0.2, f2c_sub_centers=3), dict(f2c_margin="sface", margin_list=(1.0, 0.9, 1.2)),
    dict(network="mixfacenet_s"), dict(network="vargfacenet"), dict(network="vit_t")], ids=str)
def test_the_built_in_trainer_trains_in_mixed_precision(device, config, keys):
    run(config(fp16=device.type == "cuda", **keys))
    assert len([entry for entry in history() if "loss" in entry]) > 3
