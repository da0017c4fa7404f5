"""The head in training loops of others: what works, and what the errors say."""

import inspect
import re
import textwrap
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import f2c_plugin
from f2c_plugin import F2CHead, Margin, build_head
from f2c_plugin.errors import ConfigError, InputError
from f2c_plugin.trainer.rendezvous import process_group
from tests.runs import on_ranks

NUM_IDENTITIES, BATCH, EMBEDDING_SIZE = 30, 12, 6
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def make_net(dtype=torch.float32):
    torch.manual_seed(1)
    layers = nn.Flatten(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.PReLU(), nn.Linear(16, EMBEDDING_SIZE)
    return nn.Sequential(*layers).to(dtype)


def make_head(backbone, **arguments):
    arguments = {"embedding_size": EMBEDDING_SIZE, "margin": Margin(16.0, angular=0.3), "num_slots": 12,
                 "recipe": "paper"} | arguments
    return build_head(backbone, NUM_IDENTITIES, 20, **arguments)


RECIPES = pytest.mark.parametrize("recipe", ["resident", "paper"])


def batches(steps=1, seed=0, dtype=torch.float32):
    """Images and labels; the halves of a batch share identities."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        pairs = torch.randperm(NUM_IDENTITIES, generator=generator)[:4]
        others = torch.randint(NUM_IDENTITIES, (2, 2), generator=generator)
        images = torch.randn(BATCH, 3, 2, 2, generator=generator, dtype=torch.float64)
        yield images.to(dtype), torch.cat([pairs, others[0], pairs, others[1]])


def batch(dtype=torch.float32):
    return next(batches(dtype=dtype))


def train(backbone, head, steps, hook=False, half=False):
    """The loss of every step. With ``half``, the backbone is called with the second half of each batch."""
    optimizer = SGD(backbone.parameters(), 0.05, 0.9)
    losses = []
    for images, labels in steps:
        embeddings = backbone(images.chunk(2)[1] if half else images)
        loss = head(embeddings, labels) if hook else head(embeddings, labels, images=images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_equal_states(*modules):
    first, *others = (module.state_dict() for module in modules)
    for other in others:
        assert first.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in first.items())


# Images by argument or by hook


@pytest.mark.parametrize("symmetric", [True, False])
def test_images_by_argument_and_by_hook_give_the_same_training_bit_for_bit(symmetric):
    explicit_net, hooked_net = make_net(), make_net()
    explicit = make_head(explicit_net, symmetric=symmetric)
    hooked = make_head(hooked_net, symmetric=symmetric, hook=True)
    explicit_losses = train(explicit_net, explicit, batches(8), half=not symmetric)
    hooked_losses = train(hooked_net, hooked, batches(8), hook=True)
    assert explicit_losses == hooked_losses and len(set(explicit_losses)) == 8
    assert_equal_states(explicit_net, hooked_net)
    assert_equal_states(explicit, hooked)
    assert not torch.equal(explicit.gallery.net[1].weight, make_net()[1].weight)  # it has followed


def test_a_head_that_is_not_symmetric_takes_embeddings_of_the_whole_batch_or_of_its_second_half():
    net = make_net()
    whole, half = (make_head(net, symmetric=False) for _ in range(2))
    for images, labels in batches(5):
        embeddings = net(images)
        assert torch.equal(whole(embeddings, labels, images=images), half(embeddings.chunk(2)[1], labels, images=images))
    assert_equal_states(whole, half)
    with pytest.raises(InputError, match="4 embeddings for 12 images with symmetric=False"):
        whole(net(images)[:4], labels, images=images)


def test_images_are_given_either_by_argument_or_by_hook():
    images, labels = batch()
    net = make_net()
    with pytest.raises(InputError, match=r"pass them, head\(embeddings, labels, images=images\)"):
        make_head(net)(net(images), labels)
    head = make_head(net, hook=True)
    with pytest.raises(InputError, match="leave out images=, or build the head with hook=False"):
        head(net(images), labels, images=images)
    net.eval()(images)
    net.train()
    head(net(images), labels)
    net.eval()(images)
    with pytest.raises(InputError, match="call the backbone in training mode before the head, once for each call"):
        head(net(images), labels)


def test_a_backbone_has_one_hook_at_a_time():
    net = make_net()
    first = make_head(net, hook=True)
    with pytest.raises(ConfigError, match=r"remove_hook\(\) first, or build both with hook=False"):
        make_head(net, hook=True)
    (images, labels), = batches()
    beside = make_head(net)
    assert torch.equal(beside(net(images), labels, images=images), first(net(images), labels))

    first.remove_hook()
    second = make_head(net, hook=True)
    second(net(images), labels)
    first(net(images), labels, images=images)


def test_a_copy_of_a_backbone_with_a_hook_is_free_of_the_head(monkeypatch):
    def refuse(head, memo):
        raise AssertionError("the head is copied, with its pool")

    monkeypatch.setattr(F2CHead, "__deepcopy__", refuse, raising=False)
    net = make_net()
    head = make_head(net, hook=True)
    copy = deepcopy(net)  # as an average of the weights is, or the gallery net of a second head
    make_head(net)
    copy(batch()[0])
    with pytest.raises(InputError, match="has seen no images"):
        head(copy(batch()[0]), batch()[1])
    assert train(copy, make_head(copy, hook=True), batches(2), hook=True) == train(net, head, batches(2), hook=True)


# What the backbone is called with and returns


class Masked(nn.Module):
    """A net with a second argument, and a mask that is none of its images."""

    def __init__(self):
        super().__init__()
        self.net = make_net()

    def forward(self, images, mask=None, scale=1.0):
        return self.net(images if mask is None else images * mask) * scale


def test_the_hook_finds_the_images_among_the_arguments_of_the_backbone():
    images, labels = batch()
    losses = []
    for call in (lambda net: net(images), lambda net: net(images=images), lambda net: net(images, scale=1.0),
                 lambda net: net(mask=torch.ones(2), images=images)):
        net = Masked()
        head = make_head(net, hook=True)
        losses.append(head(call(net), labels).item())
    assert len(set(losses)) == 1
    with pytest.raises(InputError, match="called with 2 tensors that could be the images: .* hook=False"):
        net(images, torch.ones(BATCH, 1, 2, 2))


class Returning(nn.Module):
    """A net that returns ``pack(embeddings)``."""

    def __init__(self, pack):
        super().__init__()
        self.net, self.pack = make_net(), pack

    def forward(self, images):
        return self.pack(self.net(images))


@RECIPES
@pytest.mark.parametrize("hook", [True, False])
def test_a_backbone_may_return_a_tuple_that_begins_with_the_embeddings(hook, recipe):
    losses = []
    for net in Returning(lambda embeddings: embeddings), Returning(lambda embeddings: (embeddings, embeddings[:, :2])):
        losses.append(train(net, make_head(net, hook=hook, recipe=recipe), batches(4), hook))
    assert losses[0] == losses[1]


@RECIPES
@pytest.mark.parametrize("hook", [True, False])
@pytest.mark.parametrize("pack, found", [
    (lambda embeddings: {"embedding": embeddings, "quality": 1}, "a dict with embedding, quality"),
    (lambda embeddings: embeddings[:, :, None], "a tensor of shape (12, 6, 1)"),
    (lambda embeddings: (), "a tuple"), (lambda embeddings: None, "a NoneType")], ids=["dict", "3d", "empty", "none"])
def test_a_backbone_that_returns_no_embeddings_is_refused_with_what_it_returns(pack, found, hook, recipe):
    net = Returning(pack)
    head = make_head(net, hook=hook, recipe=recipe)
    images, labels = batch()
    with pytest.raises(InputError, match=f"the backbone returns {re.escape(found)}.* wrap the backbone in a module"):
        head(net(images), labels, **({} if hook else {"images": images}))


# Arguments of build_head


@pytest.mark.parametrize("arguments, message", [
    ({"recipe": "steep"}, "recipe='steep': must be 'resident', 'paper' or 'dcq'"),
    ({"num_slots": 0}, "num_slots=0: gives a pool of 0 slots for 30 identities; it needs 1 to 30"),
    ({"num_slots": 31}, "num_slots=31: gives a pool of 31 slots for 30 identities; it needs 1 to 30"),
    ({"num_slots": None, "pool_rate": 0.01}, "pool_rate=0.01: gives a pool of 0 slots for 30 identities"),
    ({"pool_dtype": torch.int64}, "pool_dtype=torch.int64"),
    ({"gradient_acc": 0}, "gradient_acc=0"),
    ({"momentum": 1.5}, "momentum=1.5"),
    ({"num_hard_negatives": -3}, "num_hard_negatives=-3"),
], ids=lambda value: "-".join(value) if isinstance(value, dict) else "")
def test_arguments_that_cannot_work_are_refused_by_name(arguments, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_head(make_net(), **arguments)


def test_a_backbone_without_parameters_is_refused():
    with pytest.raises(ConfigError, match="no parameters"):
        make_head(nn.Flatten(), embedding_size=12)


def test_a_pool_smaller_than_the_identities_of_a_batch_is_refused_with_the_smallest_that_works():
    net = make_net()
    images, labels = batch()
    with pytest.raises(ConfigError, match=r"a pool of 5 slots, .* up to 6 identities: .* at least 6 slots \(pool_rate=0.2\)"):
        make_head(net, num_slots=5)(net(images), labels, images=images)
    make_head(net, num_slots=None, pool_rate=0.2)(net(images), labels, images=images)
    with pytest.raises(ConfigError, match=r"a pool of 6 slots, .* up to 12 identities: .* at least 12 slots \(pool_rate=0.4\)"):
        make_head(net, num_slots=6, recipe="resident")(net(images), labels)


# Batches


BAD_BATCHES = {
    "label too large": (lambda net, images, labels: (net(images), labels % 2 + 29, images), "labels from 29 to 30"),
    "label negative": (lambda net, images, labels: (net(images), -labels, images), r"labels from -\d+ to"),
    "too few labels": (lambda net, images, labels: (net(images), labels[:10], images), "12 (images|embeddings) and 10 labels"),
    "one-hot labels": (lambda net, images, labels: (net(images), torch.eye(30).long()[labels], images),
                       "12 (images|embeddings) and 360 labels"),
    "labels with fractions": (lambda net, images, labels: (net(images), labels + 0.5, images), "labels of torch.float32"),
    "embedding size": (lambda net, images, labels: (torch.randn(BATCH, 7), labels, images),
                       "embeddings of 7 numbers for a pool of 6: set embedding_size"),
    "too few embeddings": (lambda net, images, labels: (net(images)[:10], labels, images),
                           "10 embeddings (for 12 images|and 12 labels)"),
    "empty": (lambda net, images, labels: (torch.empty(0, 6), labels[:0], images[:0]), "0 (images|embeddings) and 0 labels"),
}


@RECIPES
@pytest.mark.parametrize("make, message", BAD_BATCHES.values(), ids=BAD_BATCHES)
def test_a_batch_that_does_not_fit_is_refused_and_leaves_the_pool_as_it_was(make, message, recipe):
    net = make_net()
    head = make_head(net, recipe=recipe)
    train(net, head, batches(2))
    before = deepcopy(head.pool.state_dict())
    embeddings, labels, images = make(net, *batch())
    with pytest.raises(InputError, match=message):
        head(embeddings, labels, images=images)
    assert all(torch.equal(value, before[name]) for name, value in head.pool.state_dict().items()) and head.steps == 2
    train(net, head, batches(2))


def test_only_the_recipe_with_pairs_needs_an_even_batch():
    net = make_net()
    images, labels = (part[:11] for part in batch())
    with pytest.raises(InputError, match="11 images and 11 labels: F²C needs an even batch with a label for each image"):
        make_head(net)(net(images), labels, images=images)
    assert make_head(net, recipe="resident")(net(images), labels).isfinite()


@RECIPES
def test_labels_may_come_as_a_column(recipe):
    net = make_net()
    images, labels = batch()
    row, column = (make_head(net, recipe=recipe)(net(images), shaped, images=images)
                   for shaped in (labels, labels[:, None].int()))
    assert torch.equal(row, column)


# Number formats


@RECIPES
@pytest.mark.parametrize("pool_dtype", DTYPES[1:])
@pytest.mark.parametrize("dtype", DTYPES)
def test_backbone_and_pool_may_have_different_dtypes(dtype, pool_dtype, recipe):
    expected_net = make_net(torch.float64)
    expected_head = make_head(expected_net, pool_dtype=torch.float64, recipe=recipe)
    # In 6 dimensions vectors of signs are alike, and which of them is hardest would be up to the rounding.
    generator = torch.Generator().manual_seed(2968811710)
    drawn = torch.randn(len(expected_head.pool.rows), 1024, EMBEDDING_SIZE, generator=generator)
    rows = nn.functional.normalize(drawn[:, :expected_head.pool.num_slots], dim=2)
    expected_head.pool.rows.copy_(rows)
    expected = train(expected_net, expected_head, batches(4, dtype=torch.float64))
    net = make_net(dtype)
    head = make_head(net, pool_dtype=pool_dtype, recipe=recipe)
    head.pool.rows.copy_(rows)
    losses = train(net, head, batches(4, dtype=dtype))
    exact = dtype in DTYPES[:2] and pool_dtype == torch.float32
    assert losses == pytest.approx(expected, rel=1e-5 if exact else 0.03)
    assert head.pool.rows.dtype == pool_dtype and net[1].weight.grad.dtype == dtype
    head.pool.validate()


class WithoutAutocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = make_net()

    def forward(self, images):
        with torch.autocast("cpu", enabled=False):
            return self.net(images)


@RECIPES
@pytest.mark.parametrize("autocast", [False, True])
def test_only_the_argument_autocast_decides_in_which_type_the_products_with_the_pool_run(autocast, recipe):
    net = WithoutAutocast()
    inside, outside = (make_head(net, autocast=autocast, recipe=recipe) for _ in range(2))
    for images, labels in batches(4):
        embeddings = net(images)
        with torch.autocast("cpu", torch.bfloat16):
            loss = inside(embeddings, labels, images=images)
        assert torch.equal(loss, outside(embeddings, labels, images=images))


# Wrapped backbones


@pytest.fixture
def accelerate():
    try:
        import accelerate
    except ImportError:
        pytest.skip("NOT RUN WITH ACCELERATE: pip install accelerate")
    yield accelerate
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_a_prepared_backbone_is_refused_where_its_copy_would_run_the_original(accelerate):
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    net = make_net()
    head = make_head(net)
    prepared = accelerator.prepare(net)
    with pytest.raises(ConfigError, match="build the head before"):
        make_head(prepared)
    make_head(prepared, recipe="resident")  # makes no copy
    images, labels = batch()
    assert torch.isfinite(head(prepared(images), labels, images=images))


def test_a_backbone_that_accelerate_leaves_as_it_is_works(accelerate):
    net = accelerate.Accelerator(cpu=True).prepare(make_net())
    plain = make_net()
    assert train(net, make_head(net), batches(4)) == train(plain, make_head(plain), batches(4))


def test_a_compiled_backbone_is_refused():
    with pytest.raises(ConfigError, match="build the head before"):
        make_head(torch.compile(make_net()))
    make_head(torch.compile(make_net()), recipe="resident")


def run_rank(rank, folder):
    """Train with the head built on the wrapped backbone or on the net in it, with and without a hook."""
    with process_group():
        found = {}
        for hook in False, True:
            for wrapped_first in False, True:
                net = make_net()
                backbone = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False) if wrapped_first else net
                head = make_head(backbone, hook=hook)
                if not wrapped_first:
                    backbone = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)
                losses = train(backbone, head, batches(6, seed=rank), hook)
                head.pool.validate()
                gallery = {name: parameter.detach() for name, parameter in head.gallery.named_parameters()}
                found[hook, wrapped_first] = losses, head.pool.state_dict(), gallery
        torch.save(found, f"{folder}/{rank}.pt")


def test_on_two_ranks_a_wrapped_backbone_works_by_argument_and_by_hook_and_the_pools_stay_equal(tmp_path):
    on_ranks(run_rank, (tmp_path,), 2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    losses = [losses for rank in ranks for losses, _, _ in rank.values()]
    assert all(each == losses[0] for each in losses[:4]) and all(each == losses[4] for each in losses[4:])
    assert losses[0] != losses[4]  # each rank has its own batches
    states = [state for rank in ranks for _, *states in rank.values() for state in states]
    for i, state in enumerate(states):
        assert all(torch.equal(value, states[i % 2][name]) for name, value in state.items())
    assert ranks[0][False, False][1]["clock"] == 6 * BATCH  # both ranks' halves x, of 6 steps


# The package


def test_the_loop_in_the_docstring_of_the_package_runs_as_written():
    code, = re.findall(r"::\n\n((?:    .*\n)+)", f2c_plugin.__doc__)
    labels = list(range(1300))
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 512), nn.BatchNorm1d(512))
    before = deepcopy(backbone.state_dict())
    dataset = TensorDataset(torch.randn(len(labels), 3, 2, 2), torch.tensor(labels))
    names = dict(labels=labels, dataset=dataset, epochs=2, backbone=backbone, DataLoader=DataLoader, SGD=SGD)
    names |= {name: getattr(f2c_plugin, name) for name in f2c_plugin.__all__}
    exec(textwrap.dedent(code), names)
    assert torch.isfinite(names["loss"]) and names["head"].steps == 2 * len(names["loader"]) == 20
    assert not any(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert "the head has no parameters to train" in f2c_plugin.__doc__.lower()
    assert not any(parameter.requires_grad for parameter in names["head"].parameters())


@pytest.mark.parametrize("name", f2c_plugin.__all__)
def test_every_public_name_has_a_docstring(name):
    documentation = inspect.cleandoc(vars(getattr(f2c_plugin, name)).get("__doc__") or getattr(f2c_plugin, name).__doc__ or "")
    assert len(documentation) > 20 and not documentation.startswith(f"{name}(")  # which a dataclass makes by itself


@RECIPES
def test_the_pool_is_drawn_where_the_backbone_is(recipe):
    """In main memory there may be no room for the pools of all ranks."""
    made = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and "empty" in str(function):
                made.append((result.device.type, result.numel()))
            return result

    with Log():
        make_head(make_net().to("meta"), num_slots=NUM_IDENTITIES, embedding_size=5000, recipe=recipe)
    assert max(numel for device, numel in made if device == "meta") >= NUM_IDENTITIES * 5000
    assert all(numel < NUM_IDENTITIES * 5000 for device, numel in made if device == "cpu")
