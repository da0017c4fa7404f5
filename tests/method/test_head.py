"""The whole head against the slow pool and the slow loss, on one rank and over gloo."""

import pytest
import torch
from torch import distributed, nn

from f2c_plugin.errors import InputError
from f2c_plugin.method import pool_softmax
from f2c_plugin.method.head import F2CHead
from f2c_plugin.method.margin import Margin
from f2c_plugin.method.pool import DynamicClassPool
from f2c_plugin.method.schedule import Schedule
from f2c_plugin.trainer.rendezvous import process_group
from f2c_plugin.utils.distributed import WHOLE, Shard
from tests.reference.head import SlowHead
from tests.runs import on_ranks

MARGIN = Margin(scale=16.0, angular=0.3)
ADAFACE = Margin(scale=16.0, additive=0.3, adaptive=True)
NUM_IDENTITIES, NUM_SLOTS, BATCH, STEPS = 30, 12, 12, 20


def make_net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.PReLU(), nn.Dropout(0.2),
                         nn.Linear(16, 6)).double()


def make_head(net, symmetric=True, gradient_acc=1, num_slots=NUM_SLOTS, shard=WHOLE, margin=MARGIN):
    pool = DynamicClassPool(num_slots, NUM_IDENTITIES, 6, shard=shard).double()
    return F2CHead(net, pool, Schedule.paper(margin, 0.9), symmetric, 3, gradient_acc).double()


def batches(steps=STEPS, batch=BATCH, seed=0):
    """Halves that share identities, as the dual loader's do, and random ones beside."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        pairs = torch.randperm(NUM_IDENTITIES, generator=generator)[:batch // 3]
        rest = torch.randint(NUM_IDENTITIES, (2, batch // 2 - len(pairs)), generator=generator)
        labels = torch.cat([pairs, rest[0], pairs, rest[1]])
        yield torch.randn(batch, 3, 2, 2, dtype=torch.float64, generator=generator), labels


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("gradient_acc, margin", [(1, MARGIN), (3, MARGIN), (1, ADAFACE)], ids=["1", "3", "AdaFace"])
@pytest.mark.parametrize("recorded", [False, True])
def test_twenty_steps_equal_the_slow_reference(symmetric, gradient_acc, margin, recorded, request):
    called = request.getfixturevalue("as_recorded") if recorded else []
    net = make_net()
    head = make_head(net, symmetric, gradient_acc, margin=margin)
    gallery = make_net().train()
    gallery[4].p = 0.0
    slow = SlowHead(head, gallery)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, 0.9)
    for step, (images, labels) in enumerate(batches()):
        embeddings = net(images)
        assert len(embeddings) == (BATCH if symmetric else BATCH // 2)
        loss = head(embeddings, labels)
        follow = step > 0 and step % gradient_acc == 0
        expected = slow.step(net, images, embeddings, labels, symmetric, follow)
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-9)
        gradient, = torch.autograd.grad(loss, embeddings, retain_graph=True)
        expected_gradient, = torch.autograd.grad(expected, embeddings, retain_graph=True)
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-9)
        torch.testing.assert_close(head.pool.rows, slow.pool.rows, rtol=0, atol=1e-9)
        loss.backward()
        if (step + 1) % gradient_acc == 0:
            optimizer.step()
            optimizer.zero_grad()
    by_recency = head.pool.slot_identity[head.pool.last_used.argsort()]
    assert by_recency[by_recency >= 0].tolist() == list(slow.pool.slots)
    assert len(called) == STEPS * recorded and len(set(called)) <= 1


def test_verification_between_steps_leaves_no_trace():
    net = make_net()
    net[4].p = 0.0
    head = make_head(net)
    (images, labels), (others, _) = list(batches(2))
    embeddings = net(images)
    net.eval()(others)
    net.train()
    loss = head(embeddings, labels)
    assert torch.isfinite(loss)
    undisturbed = make_net()
    undisturbed[4].p = 0.0
    other_head = make_head(undisturbed)
    assert torch.equal(loss, other_head(undisturbed(images), labels))
    with pytest.raises(InputError, match="has seen no images"):
        head(embeddings, labels)


def test_bad_batches_are_refused_with_what_was_found():
    net = make_net()
    head = make_head(net)
    images, labels = next(batches())
    with pytest.raises(ValueError, match="a batch of 1 images"):
        net(images[:1])
    with pytest.raises(ValueError, match="11 images and 11 labels"):
        head(net(images[:11]), labels[:11])
    with pytest.raises(ValueError, match="6 embeddings for 12 images with symmetric=True"):
        head(net(images)[:6], labels)
    with pytest.raises(ValueError, match="labels from 0 to 30, but num_identities .* is 30"):
        head(net(images), torch.arange(BATCH) * 30 // (BATCH - 1))


def test_the_probe_net_is_no_part_of_the_head_and_the_head_has_nothing_to_train():
    head = make_head(make_net())
    assert {name.split(".")[0] for name in head.state_dict()} == {"gallery", "pool", "_extra_state"}
    assert not any(parameter.requires_grad for parameter in head.parameters())
    assert all(isinstance(value, torch.Tensor) for value in head.state_dict().values())


def test_a_head_resumed_from_its_state_goes_on_bit_for_bit():
    net = make_net()
    head = make_head(net)
    steps = list(batches())
    for images, labels in steps[:10]:
        head(net(images), labels)
    net_again = make_net()
    net_again.load_state_dict(net.state_dict())
    again = make_head(net_again)
    again.load_state_dict(head.state_dict())
    for images, labels in steps[10:]:
        rng = torch.get_rng_state()
        expected = head(net(images), labels)
        torch.set_rng_state(rng)  # dropout
        assert torch.equal(again(net_again(images), labels), expected)


def test_one_image_that_is_not_finite_costs_one_step_not_the_pool():
    net = make_net()
    head = make_head(net)
    steps = list(batches(4))
    for i, (images, labels) in enumerate(steps):
        if i == 1:
            images[0, 0, 0, 0] = float("inf")
        loss = head(net(images), labels)
        head.pool.validate()
        assert loss.isfinite() == (i != 1)
        assert (head.statistics.not_finite > 0) == (i == 1)
        assert head.statistics.finite == (i != 1)


@pytest.mark.parametrize("half", [0, 1])
def test_gallery_features_that_are_not_finite_are_counted_in_either_half(half):
    net = make_plain_net()
    head = make_head(net)
    images, labels = next(batches())
    images[BATCH // 2 * half + 1, 0, 0, 0] = torch.nan
    head(net(images), labels)
    assert head.statistics.not_finite == 1


def test_the_gallery_net_follows_once_for_a_step_however_often_the_backbone_runs():
    net = make_plain_net()
    head = make_head(net)
    (images, labels), (others, _) = list(batches(2))
    head(net(images), labels)
    move(net)
    net(others)
    followed = [parameter.clone() for parameter in head.gallery.parameters()]
    net(others)
    assert all(map(torch.equal, followed, head.gallery.parameters()))


def test_the_statistics_count_evictions_and_pool_hits():
    net = make_net()
    head = make_head(net)
    images, _ = next(batches())
    halves = [torch.arange(6), torch.arange(6, 12), torch.arange(12, 18)]
    head(net(images), torch.cat([halves[0], halves[0]]))
    assert head.statistics.pool_hit_rate == 1 and head.statistics.evictions == 0 and head.pool.fill() == 0.5
    head(net(images), torch.cat([halves[1], halves[2]]))
    assert head.statistics.pool_hit_rate == 0 and head.statistics.evictions == 0
    assert torch.isnan(head.statistics.positive_cosine) and 0 <= head.statistics.hard_negative_cosine <= 1
    head(net(images), torch.cat([halves[2], halves[1]]))
    assert head.statistics.pool_hit_rate == 0.5 and head.statistics.evictions == 6


def test_mixed_precision_stays_close_to_full_precision():
    images, labels = next(batches())
    images = images.float()
    losses = []
    for autocast in False, True:
        net = make_net().float().eval()
        head = make_head(net).float()
        head.autocast = autocast
        net.train()[4].p = 0.0
        loss = head(net(images), labels)
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in net.parameters())
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def run_rank(rank, folder):
    """Train one rank over gloo and leave its pool after every step in ``folder``."""
    with process_group():
        net = make_net()
        backbone = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)
        head = make_head(backbone)
        optimizer = torch.optim.SGD(net.parameters(), 0.05)
        trained, by_rule = [], []
        for images, labels in batches(seed=rank, batch=8):
            loss = head(backbone(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            trained.append({name: buffer.clone() for name, buffer in head.pool.named_buffers()})
        # The same again with a probe net that moves by a rule, for one process to repeat it.
        net = make_plain_net()
        backbone = nn.parallel.DistributedDataParallel(net)
        head = make_head(backbone)
        for images, labels in batches(seed=rank, batch=8):
            head(backbone(images), labels)
            move(net)
            by_rule.append({name: buffer.clone() for name, buffer in head.pool.named_buffers()})
        torch.save((trained, by_rule), f"{folder}/{rank}.pt")


def make_plain_net():
    """Without BatchNorm, an embedding does not depend on who else is in the batch."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 16, bias=False), nn.PReLU(), nn.Linear(16, 6)).double()


def move(net):
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.1).add_(0.01)


def test_two_ranks_keep_equal_pools_and_those_of_one_rank_fed_the_gathered_batches(tmp_path):
    on_ranks(run_rank, (tmp_path,), 2)
    (trained_0, by_rule_0), (trained_1, by_rule_1) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for step_0, step_1 in zip(trained_0 + by_rule_0, trained_1 + by_rule_1, strict=True):
        assert all(torch.equal(step_0[name], step_1[name]) for name in step_0)
    assert not torch.equal(trained_0[0]["rows"], trained_0[-1]["rows"])

    net = make_plain_net()
    head = make_head(net)
    both = zip(batches(seed=0, batch=8), batches(seed=1, batch=8), strict=True)
    for ranks, expected in zip(both, by_rule_0, strict=True):
        images, labels = (torch.cat([part.chunk(2)[half] for half in (0, 1) for part in parts])
                          for parts in zip(*ranks, strict=True))
        head(net(images), labels)
        move(net)
        for name, buffer in head.pool.named_buffers():
            torch.testing.assert_close(buffer, expected[name], rtol=0, atol=1e-12)


def run_sharded_rank(rank, world_size, symmetric, folder):
    """The same batches through a replicated and a sharded pool, whose sizes do not divide evenly."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    torch.set_num_threads(1)
    heads = [make_head(make_net().eval(), symmetric, num_slots=17, shard=shard) for shard in (WHOLE, Shard(rank, world_size))]
    for images, labels in batches(8, seed=rank, batch=8):
        results = []
        for head in heads:
            net = head.probe_net
            net.train()[4].p = 0.0
            embeddings = net(images)
            loss = head(embeddings, labels)
            gradient, = torch.autograd.grad(loss, embeddings)
            results.append((loss, gradient, *vars(head.statistics).values()))
            head.pool.validate()
        for replicated, sharded in zip(*results, strict=True):
            torch.testing.assert_close(torch.as_tensor(sharded), torch.as_tensor(replicated), rtol=0, atol=1e-9,
                                       equal_nan=True)
    replicated, sharded = (head.state_dict() for head in heads)
    assert heads[1].pool.rows.size(1) in (17 // world_size, 17 // world_size + 1)
    for name, value in replicated.items():
        torch.testing.assert_close(sharded[name], value, rtol=0, atol=1e-12)
    if rank == 0:
        torch.save(sharded, f"{folder}/state.pt")
    distributed.destroy_process_group()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_sharded_pool_gives_the_loss_and_gradient_of_the_replicated_one_and_resumes_on_any_number_of_ranks(
        tmp_path, world_size, symmetric):
    on_ranks(run_sharded_rank, (world_size, symmetric, tmp_path), world_size)
    state = torch.load(tmp_path / "state.pt")
    assert state["pool.rows"].shape == (2, 17, 6)
    for others in 1, 2, 4:
        shards = [make_head(make_net(), num_slots=17, shard=Shard(rank, others)) for rank in range(others)]
        for shard in shards:
            shard.load_state_dict(state)
        assert torch.equal(torch.cat([shard.pool.rows for shard in shards], dim=1), state["pool.rows"])


def test_a_scaler_skips_the_step_of_a_batch_that_is_not_finite_and_goes_on():
    net = make_net().float()
    head = make_head(net).float()
    head.autocast = True
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i, (images, labels) in enumerate(batches(4)):
        images = images.float()
        if i == 1:
            images[3, 0, 0, 0] = float("nan")
        before = [parameter.clone() for parameter in net.parameters()]
        scaler.scale(head(net(images), labels)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved = any(not torch.equal(*pair) for pair in zip(before, net.parameters(), strict=True))
        assert moved == (i != 1) and scaler.get_scale() == (2.0**10 if i < 1 else 2.0**9)
        assert all(parameter.isfinite().all() for parameter in [*net.parameters(), *head.gallery.parameters()])
        head.pool.validate()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_a_step_never_asks_for_a_value_or_for_a_shape_that_depends_on_one(symmetric, autocast, monkeypatch):
    # On the meta device there are no values: whatever would make the CPU wait for one fails.
    monkeypatch.setitem(pool_softmax.CHUNK_ENTRIES, "meta", 40)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    net = make_net().float()
    head = make_head(net, symmetric).float()
    head.autocast = autocast
    net.to("meta"), head.to("meta")
    for images, labels in batches(3):
        loss = head(net(images.float().to("meta")), labels.to("meta"))
        loss.backward()
    assert loss.is_meta and all(parameter.grad.is_meta for parameter in net.parameters())
