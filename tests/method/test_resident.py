"""Resident classes against a slow reference, on one rank and over gloo."""

import math
import os
import pickle
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.nn.functional import normalize

from f2c_plugin import Margin, SFace, build_head
from f2c_plugin.errors import ConfigError, InputError
from f2c_plugin.method import pool_softmax
from f2c_plugin.method.kept_weights import KeptWeights
from f2c_plugin.utils.tensors import rounded_at_random
from tests.reference.resident import SlowResident
from tests.runs import on_ranks

NUM_IDENTITIES, NUM_SLOTS, BATCH, STEPS, SIZE = 40, 14, 12, 30, 6
MARGINS = {"CosFace": Margin(16.0, additive=0.3), "ArcFace": Margin(16.0, angular=0.4),
           "filtered": Margin(16.0, additive=0.2, filter_threshold=0.3), "AdaFace": Margin(16.0, additive=0.3, adaptive=True),
           "SFace": SFace(16.0, 0.9, 1.2), "SFace, filtered": SFace(16.0, 0.9, 1.4, filter_threshold=0.3)}


def make_head(margin=MARGINS["CosFace"], **keys):
    torch.manual_seed(3)
    keys = dict(embedding_size=SIZE, margin=margin, num_slots=NUM_SLOTS, pool_dtype=torch.float64) | keys
    head = build_head(nn.Linear(3, SIZE).double(), NUM_IDENTITIES, STEPS, **keys)
    head.pool.rows.copy_(normalize(head.pool.rows, dim=2))  # drawn in float32
    if head.quality:
        head.quality.double()
    return head


def weights_of(pool):
    return pool.weights_at(torch.arange(pool.num_slots))


def batches(steps=STEPS, batch=BATCH, seed=0):
    """Embeddings and labels; some identities come twice or more in a batch, and some come back after they were evicted."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(NUM_IDENTITIES, SIZE, dtype=torch.float64, generator=generator)
    for _ in range(steps):
        labels = (NUM_IDENTITIES * torch.rand(batch, generator=generator) ** 2).long()
        noise = torch.randn(batch, SIZE, dtype=torch.float64, generator=generator)
        yield (centres[labels] + noise).requires_grad_(), labels


@pytest.mark.parametrize("margin", MARGINS.values(), ids=MARGINS)
@pytest.mark.parametrize("chunk_entries", [3 * BATCH, 1 << 19])
@pytest.mark.parametrize("sub_centers", [1, 3])
def test_steps_equal_the_slow_reference(margin, chunk_entries, sub_centers, monkeypatch):
    monkeypatch.setitem(pool_softmax.CHUNK_ENTRIES, "cpu", chunk_entries)
    head = make_head(margin, sub_centers=sub_centers)
    slow = SlowResident(head.pool)
    came_back, numbers = 0, set()
    for step, (embeddings, labels) in enumerate(batches()):
        came_back += sum(identity in slow.kept and identity not in slow.slots for identity in set(labels.tolist()))
        expected = slow.step(embeddings, labels, head.schedule.margin_at(step), head.schedule.slot_rate_at(step))
        loss = head(embeddings, labels)
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
        gradient, = torch.autograd.grad(loss, embeddings)
        expected_gradient, = torch.autograd.grad(expected, embeddings)
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-10)
        torch.testing.assert_close(weights_of(head.pool), slow.table(), rtol=0, atol=1e-10)
        head.pool.validate()
        numbers |= {len(weight) for weight in slow.weights}
    assert came_back > STEPS and numbers == set(range(1, sub_centers + 1))
    by_recency = head.pool.slot_identity[head.pool.last_used.argsort()]
    assert by_recency[by_recency >= 0].tolist() == list(slow.slots)


def run_rank(rank, world_size, folder, margin, sub_centers, state):
    """Half of each batch on each of two ranks; loads ``state`` if given, and goes on with the batches from there."""
    distributed.init_process_group("gloo", f"file://{folder}/rendezvous{state is not None}", world_size=world_size, rank=rank)
    head = make_head(MARGINS[margin], sub_centers=sub_centers)
    if state is not None:
        head.load_state_dict(state)
    results = []
    for embeddings, labels in list(batches())[head.steps:head.steps + STEPS // 2]:
        own = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
        loss = head(embeddings[own], labels[own])
        gradient, = torch.autograd.grad(loss, embeddings)
        results.append((loss.detach(), gradient[own]))
        head.pool.validate()
    torch.save((results, head.state_dict()), folder / f"rank{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.parametrize("world_size, margin, sub_centers", [(2, "CosFace", 1), (3, "AdaFace", 1), (2, "SFace", 2)])
def test_ranks_that_share_the_slots_equal_one_rank_and_a_state_loads_on_any_number_of_them(tmp_path, world_size, margin,
                                                                                            sub_centers):
    alone = make_head(MARGINS[margin], sub_centers=sub_centers)
    expected = [(loss := alone(*batch), torch.autograd.grad(loss, batch[0])[0]) for batch in batches()]
    state = None
    for half in range(2):
        on_ranks(run_rank, (world_size, tmp_path, margin, sub_centers, state), world_size)
        ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(world_size)]
        for step in range(STEPS // 2):
            loss, gradient = expected[half * STEPS // 2 + step]
            torch.testing.assert_close(torch.stack([results[step][0] for results, _ in ranks]).mean(), loss, rtol=0, atol=1e-10)
            gradients = torch.cat([results[step][1] for results, _ in ranks]) / world_size
            torch.testing.assert_close(gradients, gradient, rtol=0, atol=1e-10)
        state = ranks[0][1]
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=1e-10)
    assert ranks[1][1]["pool.kept.rows"].size(1) < NUM_IDENTITIES == state["pool.kept.rows"].size(1)


@pytest.mark.parametrize("margin", MARGINS.values(), ids=MARGINS)
def test_a_head_resumed_from_its_state_goes_on_bit_for_bit(margin):
    steps = list(batches())
    head = make_head(margin)
    for batch in steps[:15]:
        head(*batch)
    again = make_head(margin, seed=5)
    again.load_state_dict(head.state_dict())
    for batch in steps[15:]:
        assert torch.equal(again(*batch), head(*batch))


def test_weights_in_a_file_are_those_in_main_memory_and_leave_no_file_behind(tmp_path):
    in_memory, in_file = make_head(), make_head(kept_weights=tmp_path)
    for batch in batches():
        assert torch.equal(in_memory(*batch), in_file(*batch))
    assert in_file.pool.kept.rows.any() and torch.equal(in_file.pool.kept.rows, in_memory.pool.kept.rows)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_room_for_the_weights_is_refused_at_the_start():
    with pytest.raises(OSError, match="/dev/full|Not a directory|No space"):
        make_head(kept_weights=Path("/dev/full"))


def test_kept_weights_stay_on_the_cpu_and_in_their_type():
    head = make_head(pool_dtype=torch.float32).to(torch.float16)
    assert head.pool.rows.dtype == torch.float16 and head.pool.kept.rows.dtype == torch.float32
    assert head.to("meta").pool.kept.rows.device.type == "cpu"


def test_a_copy_of_a_head_has_kept_weights_of_its_own():
    head = make_head()
    for batch in batches(8):
        head(*batch)
    kept = head.pool.kept
    saved = kept.rows.clone()
    copies = deepcopy(head).pool.kept, pickle.loads(pickle.dumps(kept))
    kept.rows.zero_()
    assert saved.any() and all(torch.equal(copy.rows, saved) for copy in copies)


@pytest.mark.parametrize("length", [0.1, 1, 1e5])
def test_half_precision_holds_the_logits_of_class_weights_of_any_length(length):
    precise, half = make_head(Margin(64.0, additive=0.3)), make_head(Margin(64.0, additive=0.3))
    for head in (precise, half):
        head.pool.lengths.rows *= length
    half.autocast = True
    with torch.autocast("cpu", torch.float16):
        for embeddings, labels in batches(3):
            expected, loss = precise(embeddings, labels), half(embeddings, labels)
            torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
            gradient, expected_gradient = (torch.autograd.grad(each, embeddings)[0] for each in (loss, expected))
            torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=2e-2)
            longest = weights_of(precise.pool).abs().max().item()
            torch.testing.assert_close(weights_of(half.pool), weights_of(precise.pool), rtol=0, atol=2e-2 * longest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pools_in_fewer_bits_learn_what_a_precise_one_learns(dtype):
    precise, rounded = make_head(), make_head(pool_dtype=dtype)
    differences = []
    for embeddings, labels in batches():
        expected, loss = precise(embeddings, labels), rounded(embeddings.float(), labels)
        differences.append(((loss - expected) / expected).item())
    assert rounded.pool.rows.dtype == rounded.pool.kept.rows.dtype == dtype
    assert max(map(abs, differences)) < {torch.float32: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.1}[dtype]


def test_an_embedding_that_is_not_finite_costs_its_step_and_not_the_pool(caplog):
    head = make_head()
    for step, (embeddings, labels) in enumerate(batches(8)):
        with torch.no_grad():
            embeddings[3] = torch.nan if step in (0, 4) else embeddings[3]
        loss = head(embeddings, labels)
        head.pool.validate()
        assert loss.isfinite() == head.statistics.finite.bool() == (step not in (0, 4))
        assert head.statistics.not_finite == (step in (0, 4))


def test_bad_batches_are_refused_with_what_was_found():
    head = make_head()
    (embeddings, labels), = batches(1)
    with pytest.raises(InputError, match="12 embeddings and 11 labels"):
        head(embeddings, labels[1:])
    with pytest.raises(InputError, match="embeddings of 5 numbers for a pool of 6"):
        head(embeddings[:, 1:], labels)
    with pytest.raises(InputError, match="labels from 0 to 40, but num_identities .* is 40"):
        head(embeddings, torch.arange(BATCH) * 40 // (BATCH - 1))
    with pytest.raises(ConfigError, match="a pool of 14 slots, but a gathered batch holds up to 20 identities"):
        head(torch.cat([embeddings, embeddings[:8]]), torch.cat([labels, labels[:8]]))


@pytest.mark.parametrize("margin", MARGINS)
def test_a_step_may_be_repeated_in_the_same_tensors(margin, request):
    expected, found = make_head(MARGINS[margin]), make_head(MARGINS[margin])
    losses = [expected(*batch).item() for batch in batches()]
    called = request.getfixturevalue("as_recorded")
    assert [found(*batch).item() for batch in batches()] == pytest.approx(losses, abs=1e-12)
    filtered = MARGINS[margin].filter_threshold > 0  # such steps are not recorded
    assert len(called) == (0 if filtered else STEPS) and len(set(called)) <= 1


@pytest.mark.parametrize("autocast", [False, True])
def test_logits_that_are_kept_for_the_second_pass_are_those_that_it_makes(autocast, monkeypatch):
    heads = []
    for kept in pool_softmax.KEPT_LOGITS, {}:
        monkeypatch.setattr(pool_softmax, "KEPT_LOGITS", kept)
        head = make_head(pool_dtype=torch.float32, autocast=autocast)
        for step, (embeddings, labels) in enumerate(batches()):
            embeddings = embeddings.detach().float()
            embeddings[step % BATCH] = torch.nan if step == 3 else 1.0
            head(embeddings, labels)
        heads.append(head)
    for name in "rows", "lengths.rows":
        found, expected = (head.pool.get_buffer(name) for head in heads)
        assert torch.equal(found, expected) and found.isfinite().all()


def test_statistics_are_those_of_the_batch():
    head = make_head(num_slots=BATCH)
    (embeddings, _), (others, _) = batches(2)
    head(embeddings, torch.arange(BATCH))
    assert (head.statistics.pool_hit_rate, head.statistics.evictions) == (0, 0)
    assert head.statistics.positive_cosine.isnan()
    labels = torch.cat([torch.arange(9), torch.tensor([20, 20, 21])])
    weights = normalize(head.pool.rows[0].clone(), dim=1)
    slots = head.pool.lookup(torch.arange(9))
    head(others, labels)
    assert (head.statistics.pool_hit_rate, head.statistics.evictions) == (0.75, 2)
    cosine = (normalize(others) @ weights.T).detach()
    second = normalize(others[10], dim=0) @ normalize(others[9], dim=0)  # of an identity whose first image is in the batch
    expected = torch.cat([cosine[torch.arange(9), slots], second[None]]).mean()
    torch.testing.assert_close(head.statistics.positive_cosine, expected.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_at_random_keeps_what_the_type_holds_and_is_right_on_average(dtype):
    torch.manual_seed(0)
    exact = torch.tensor([1.0, 0.5, -0.25, 0.0, 3.0]).to(dtype)
    assert all(torch.equal(rounded_at_random(exact.float(), dtype), exact) for _ in range(20))
    values = torch.tensor([0.1, -0.3, 1.7, 0.001])
    rounded = rounded_at_random(values.expand(100_000, -1), dtype).float()
    step = {torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype] * values.abs()
    assert ((rounded - values).abs() <= step).all()
    assert ((rounded.mean(0) - values).abs() < 0.02 * step).all()
    assert (rounded.std(0) > 0).all()


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="NOT TESTED: this system does not say what memory is taken")
def test_main_memory_is_taken_as_weights_come():
    kept = KeptWeights(200_000, 512)  # 400 MB
    identities = torch.arange(0, 200_000, 500)
    weights = torch.ones(len(identities), 512)
    before = resident_bytes()
    kept.write(identities, weights)
    assert torch.equal(kept.rows[0, identities], weights)
    assert resident_bytes() - before < 20 << 20  # 400 weights; in huge pages it would be all of it


def test_images_of_which_the_gallery_net_makes_the_largest_losses_have_none():
    """With a share that grows with the margin; their class weights do not learn from them either."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, SIZE)).double()
    head = build_head(net, NUM_IDENTITIES, STEPS, embedding_size=SIZE, margin=MARGINS["CosFace"], num_slots=NUM_SLOTS,
                      pool_dtype=torch.float64, forget_rate=0.5, momentum=0.9, hook=True)
    head.pool.rows.copy_(normalize(head.pool.rows, dim=2))
    gallery, forgotten = deepcopy(net), []
    for step, (_, labels) in enumerate(batches()):
        images = torch.randn(BATCH, 3, 2, 2, dtype=torch.float64)
        if step:
            with torch.no_grad():
                for mine, theirs in zip(gallery.parameters(), net.parameters(), strict=True):
                    mine.copy_(0.9 * mine + 0.1 * theirs)
        margin, rate = head.schedule.margin_at(step), head.schedule.slot_rate_at(step)
        judge = SlowResident(head.pool)
        judge.slots = dict.fromkeys(head.pool.slot_identity[head.pool.last_used.argsort()].tolist())
        judge.slots = {identity: head.pool.lookup(torch.tensor([identity])).item() for identity in judge.slots if identity >= 0}
        judge.free = [slot for slot in range(NUM_SLOTS) if slot not in judge.slots.values()]
        judge.kept = {identity: row[None] for identity, row in enumerate(head.pool.kept.rows[0]) if row.any()}
        learner = deepcopy(judge)
        embeddings = net(images)
        losses = judge.losses(gallery(images.flip(-1)).detach(), labels, margin, normalize(embeddings).detach())
        counted = torch.stack(losses).argsort()[:math.ceil((1 - 0.5 * min(1, step / (0.7 * STEPS))) * BATCH - 1e-9)]
        own = learner.losses(embeddings, labels, margin, normalize(embeddings).detach())
        expected = torch.stack(own)[counted].mean()
        loss = head(embeddings, labels)
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
        learner.learn(expected, rate)
        torch.testing.assert_close(weights_of(head.pool), learner.table(), rtol=0, atol=1e-10)
        gradient, = torch.autograd.grad(loss, embeddings, retain_graph=True)
        forgotten.append((gradient == 0).all(1).sum().item())
        net.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter -= 0.05 * parameter.grad
    assert forgotten[0] <= 3 and min(forgotten[-9:]) >= BATCH // 2  # beside first images, of which the loss has no gradient
    assert head.nets.keys() == {"probe", "gallery"}
