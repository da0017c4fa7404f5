"""Loss terms beside a head: angular distillation, low resolution."""

import math

import pytest
import torch
from torch import nn

from f2c_plugin import Margin, build_head
from f2c_plugin.errors import InputError
from f2c_plugin.method.distillation import Distillation
from f2c_plugin.method.low_resolution import LEVELS, LowResolution, log_exp_distance
from f2c_plugin.method.schedule import Schedule
from f2c_plugin.trainer.full_fc import FullFC
from f2c_plugin.utils.resolution import at_resolution

NUM_IDENTITIES, BATCH, SIZE, PIXELS = 9, 64, 6, 112


class Net(nn.Module):
    """Embeddings of faces that depend on their fine detail; remembers what it has seen."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.convolution, self.linear, self.seen = nn.Conv2d(3, 4, 3, stride=8), nn.Linear(4, SIZE), []

    def forward(self, images):
        if self.training:
            self.seen.append(images.detach())
        return self.linear(torch.relu(self.convolution(images)).mean((2, 3)))


def batch(seed=0):
    torch.manual_seed(seed)
    return torch.rand(BATCH, 3, PIXELS, PIXELS) * 2 - 1, torch.randint(NUM_IDENTITIES, (BATCH,))


def make_head(kind, net):
    margin = Margin(16.0, additive=0.2)
    if kind == "softmax":
        torch.manual_seed(1)
        return FullFC(SIZE, NUM_IDENTITIES, Schedule(margin))
    return build_head(net, NUM_IDENTITIES, 10, embedding_size=SIZE, margin=margin, pool_rate=1.0, recipe=kind, hook=True)


@pytest.mark.parametrize("kind", ["resident", "paper", "softmax"])
def test_distillation_adds_the_squared_distance_of_the_angles_to_any_heads_loss(kind):
    (images, labels), teacher = batch(), Net(5)
    alone, taught = Net(), Net()
    head, other = make_head(kind, alone), make_head(kind, taught)
    Distillation(teacher).put("distillation", taught, other)
    embeddings, student = alone(images), taught(images)
    loss, with_term = head(embeddings, labels), other(student, labels)
    expected = 0.0
    for x, y in zip(embeddings, teacher(images), strict=True):
        expected = expected + 7 * (1 - x @ y / (x.norm() * y.norm())) ** 2 / BATCH
    torch.testing.assert_close(with_term - loss, expected.detach() + 0 * loss, rtol=1e-4, atol=1e-5)
    gradient, = torch.autograd.grad(with_term, student)
    own, = torch.autograd.grad(loss, embeddings, retain_graph=True)
    of_term, = torch.autograd.grad(expected, embeddings)
    torch.testing.assert_close(gradient, own + of_term, rtol=1e-4, atol=1e-5)
    assert teacher.seen == [] and not any("distillation" in name for name in other.state_dict())


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_log_exp_is_that_of_its_equation_and_does_not_overflow(power):
    torch.manual_seed(0)
    x, y = (torch.randn(5, 8, dtype=torch.float64).requires_grad_() for _ in range(2))
    found = log_exp_distance(x, y, power)
    for a, b, each in zip(x.tolist(), y.tolist(), found.tolist(), strict=True):
        total = sum(math.exp(abs(i - j) ** power) - 1 for i, j in zip(a, b, strict=True))
        assert each == pytest.approx(math.log(1 + total) / (power * 8), rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: log_exp_distance(x, y.detach(), power), x)
    far = torch.full((1, 8), 30.0, requires_grad=True)
    distance = log_exp_distance(far, torch.zeros(1, 8), power).sum()
    gradient, = torch.autograd.grad(distance, far)
    assert distance.isfinite() and gradient.isfinite().all() and (gradient > 0).all()
    assert log_exp_distance(x, x, power).abs().max() == 0


@pytest.mark.parametrize("kind", ["resident", "softmax"])
def test_a_share_of_the_images_is_small_for_the_probe_net_and_sharp_for_the_gallery_net(kind):
    net = Net()
    head = make_head(kind, net)
    term = LowResolution(net, 0.5, lambda: head.steps, momentum=0.9)
    term.put("low_resolution", net, head)
    images, labels = batch()
    embeddings = net(images)
    seen = net.seen[0]
    small = (seen != images).flatten(1).any(1)
    assert 0.3 < small.float().mean() < 0.7
    resolutions = []
    for image, sharp in zip(seen[small], images[small], strict=True):
        found = [pixels for pixels in range(7, 57) if torch.equal(image, at_resolution(sharp[None], pixels)[0])]
        resolutions.append(found[0])
    assert len(set(resolutions)) == len(LEVELS)  # one of each level in a step
    assert all(any(least <= each < end for each in resolutions) for least, end in LEVELS)

    loss = head(embeddings, labels)
    alone = make_head(kind, Net())(embeddings.detach(), labels)
    torch.testing.assert_close(loss - alone, log_exp_distance(embeddings, term.gallery(images)).mean(), rtol=1e-3, atol=1e-5)
    loss.backward()
    with torch.no_grad():
        net.linear.bias += 1
    before = term.gallery.net.linear.bias.clone()
    net(images)
    torch.testing.assert_close(term.gallery.net.linear.bias, before + 0.1)
    assert not torch.equal(net.seen[-1], seen)  # another draw
    assert "low_resolution.gallery.net.linear.bias" in head.state_dict()


def test_the_same_step_draws_the_same_images_and_another_rank_others():
    images, _ = batch()
    net = Net()
    draws = [LowResolution(net, 0.5, step.__int__, seed=(0, 5, rank)).see(images)[0]
             for step, rank in [(3, 0), (3, 0), (4, 0), (3, 1)]]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[3])


def test_a_head_that_is_called_without_its_images_says_so():
    net = Net()
    head = make_head("softmax", net)
    Distillation(Net(5)).put("distillation", net, head)
    images, labels = batch()
    with pytest.raises(InputError, match="distillation: 0 images for 64 embeddings: call the backbone in training mode"):
        head(net.eval()(images), labels)
