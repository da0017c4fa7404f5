"""DCQ against a plain reading of its paper, on one rank and over gloo; its queue; its trainings."""

import pytest
import torch
from torch import distributed, nn

from f2c_plugin import Margin, SFace, build_head
from f2c_plugin.errors import ConfigError, PoolStateError
from f2c_plugin.method.dcq import ClassQueue
from tests.reference.dcq import SlowDCQ
from tests.runs import on_ranks

NUM_IDENTITIES, QUEUE, BATCH, STEPS, SIZE = 9, 14, 12, 12, 6
COSFACE = Margin(50.0, additive=0.3)


def make_head(net, margin=COSFACE, hook=False, queue_size=QUEUE, gallery_images=1):
    head = build_head(net, NUM_IDENTITIES, STEPS, embedding_size=SIZE, margin=margin, recipe="dcq", queue_size=queue_size,
                      gallery_images=gallery_images, pool_dtype=torch.float64, momentum=0.9, hook=hook)
    head.pool.rows.copy_(nn.functional.normalize(head.pool.rows, dim=2))  # drawn in float32
    return head


def make_net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, SIZE)).double()


def batches():
    """Images (BATCH, …) and labels; identities repeat in a batch and stay in the queue."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        labels = torch.randint(NUM_IDENTITIES, (BATCH // 2,), generator=generator).repeat(2)
        yield torch.randn(BATCH, 3, 2, 2, dtype=torch.float64, generator=generator), labels


@pytest.mark.parametrize("margin, gallery_images", [(COSFACE, 1), (Margin(50.0, angular=0.4), 1), (SFace(64.0, 0.9, 1.2), 1),
                                                    (COSFACE, 2), (COSFACE, 3), (COSFACE, 100)], ids=str)
def test_steps_equal_a_plain_reading_of_the_paper(margin, gallery_images):
    net, gallery = make_net(), make_net()
    head = make_head(net, margin, gallery_images=gallery_images)
    slow = SlowDCQ(head.pool, gallery_images)
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    for step, (images, labels) in enumerate(batches()):
        if step:  # momentum encoder
            with torch.no_grad():
                for mine, theirs in zip(gallery.parameters(), net.parameters(), strict=True):
                    mine.copy_(0.9 * mine + 0.1 * theirs)
        (x, y), (_, label_y) = images.chunk(2), labels.chunk(2)
        probes = net(y)
        loss = head(probes, labels, images=images)
        expected = slow.step(probes, label_y, gallery(x).detach(), margin)
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(*(torch.autograd.grad(each, probes, retain_graph=True) for each in (loss, expected)),
                                   rtol=0, atol=1e-9)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        order = head.pool.last_used.argsort()  # the oldest first
        torch.testing.assert_close(head.pool.rows[0, order], torch.stack([row for _, row in slow.entries]), rtol=0, atol=1e-9)
        assert head.pool.slot_identity[order].tolist() == [identity for identity, _ in slow.entries]
        head.pool.validate()
    assert len(set(head.pool.slot_identity.tolist())) < QUEUE  # an identity has several places


def test_images_without_a_partner_enter_the_queue_and_have_no_loss():
    net = make_net()
    head, other = make_head(net), make_head(net)
    images, labels = next(batches())
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2, 6, 7, 8])
    half = net(images.chunk(2)[1])
    loss = head(half, labels, images=images)
    paired = torch.cat([images[:3], images[6:9]])
    torch.testing.assert_close(loss, other(half[:3], labels[[0, 1, 2, 6, 7, 8]], images=paired))
    assert (torch.autograd.grad(loss, half)[0][3:] == 0).all()
    assert head.pool.slot_identity[:6].tolist() == [0, 1, 2, 3, 4, 5]


def run_rank(rank, folder):
    distributed.init_process_group("gloo", f"file://{folder}/rendezvous", world_size=2, rank=rank)
    net = make_net()
    head = make_head(net)
    results = []
    for images, labels in batches():
        own = torch.arange(BATCH).view(2, 2, -1)[:, rank].flatten()  # of each half, this rank's
        probes = net(images[own].chunk(2)[1])
        loss = head(probes, labels[own], images=images[own])
        results.append((loss.detach(), torch.autograd.grad(loss, probes)[0]))
    torch.save((results, head.state_dict()), f"{folder}/rank{rank}.pt")
    distributed.destroy_process_group()


def test_two_ranks_equal_one(tmp_path):
    net = make_net()
    alone = make_head(net)
    expected = []
    for images, labels in batches():
        probes = net(images.chunk(2)[1])
        loss = alone(probes, labels, images=images)
        expected.append((loss.detach(), torch.autograd.grad(loss, probes)[0]))
    on_ranks(run_rank, (tmp_path,), 2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for step, (loss, gradient) in enumerate(expected):
        torch.testing.assert_close(sum(results[step][0] for results, _ in ranks) / 2, loss, rtol=0, atol=1e-10)
        gradients = torch.cat([results[step][1] for results, _ in ranks]) / 2
        torch.testing.assert_close(gradients, gradient, rtol=0, atol=1e-10)
    for _, state in ranks:
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=0, atol=1e-10)


def test_a_weight_that_is_not_finite_leaves_what_was_there():
    queue = ClassQueue(4, NUM_IDENTITIES, SIZE)
    before = queue.rows.clone()
    weights = torch.eye(SIZE)[:3]
    weights[1, 2] = torch.nan
    left, not_finite = queue.enqueue(torch.tensor([5, 6, 7]), weights)
    assert (left, not_finite) == (0, 1) and queue.slot_identity.tolist() == [5, -1, 7, -1]
    assert torch.equal(queue.rows[0, 1], before[0, 1]) and torch.equal(queue.rows[0, 2], weights[2])
    queue.validate()
    left, _ = queue.enqueue(torch.tensor([1, 2, 3]), torch.eye(SIZE)[:3])  # from place 3 round to 1
    assert left == 1 and queue.slot_identity.tolist() == [2, 3, 7, 1]
    queue.validate()


def test_a_batch_larger_than_the_queue_and_a_damaged_queue_are_refused():
    net = make_net()
    head = make_head(net, queue_size=5)
    images, labels = next(batches())
    with pytest.raises(ConfigError, match="f2c_queue_size=5: a gathered batch brings 6 class weights: raise it"):
        head(net(images.chunk(2)[1]), labels, images=images)
    state = make_head(net, queue_size=5).state_dict()
    state["pool.slot_identity"][0] = NUM_IDENTITIES
    with pytest.raises(PoolStateError, match="identities of slots are numbers from 0 to num_identities"):
        head.load_state_dict(state)
