"""AdaFace's margin against its authors' numbers and a slow reference; the quality of images that it follows."""

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from f2c_plugin import Margin, build_head
from f2c_plugin.build import margin_from
from f2c_plugin.errors import ConfigError
from f2c_plugin.method.margin import ImageQuality
from f2c_plugin.method.schedule import Schedule
from f2c_plugin.trainer.full_fc import FullFC
from tests.method.test_loss import CombinedMarginLoss
from tests.reference.margin import SlowQuality, slow_target

ADAFACE = Margin(64.0, additive=0.4, adaptive=True)


def test_logits_are_those_of_the_authors_code():
    """What head.py of github.com/mk-minchul/AdaFace gives with t_alpha 0.01, from a mean of 22 and a deviation of 2."""
    cosine = torch.tensor([0.9, 0.5, 0.0, -0.5, 0.97, 0.8])
    quality = ImageQuality()
    quality.mean.fill_(22)
    quality.std.fill_(2)
    q = quality(torch.tensor([20.0, 24.0, 22.0, 10.0, 40.0, 27.0])[:, None])
    authors = torch.tensor([36.197609, 5.034950, -25.600002, -51.057713, 12.799969, 14.636780])
    torch.testing.assert_close(64 * ADAFACE.target(cosine, q), authors, rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.stack([quality.mean, quality.std]), torch.tensor([22.0183, 2.0781]), rtol=0, atol=1e-4)


def test_the_target_is_that_of_the_angle_and_its_gradient_the_exact_derivative():
    cosine = torch.linspace(-0.99, 0.99, 67, dtype=torch.float64).repeat(5).requires_grad_()
    quality = torch.tensor([-1, -0.4, 0, 0.7, 1], dtype=torch.float64).repeat_interleave(67)
    target = ADAFACE.target(cosine, quality)
    expected = torch.stack([slow_target(c, ADAFACE, q) for c, q in zip(cosine, quality.tolist(), strict=True)])
    torch.testing.assert_close(target, expected)
    gradient, = torch.autograd.grad(target.sum(), cosine)
    torch.testing.assert_close(gradient, *torch.autograd.grad(expected.sum(), cosine))
    assert (gradient == 0).any()  # closer to its class than the margin of a good image


def test_average_quality_is_cosface_and_the_worst_is_arcface():
    cosine = torch.linspace(-0.9, 0.9, 19)
    assert torch.equal(ADAFACE.target(cosine, torch.tensor(0.0)), Margin(64.0, additive=0.4).target(cosine))
    torch.testing.assert_close(ADAFACE.target(cosine, torch.tensor(-1.0)), Margin(64.0, angular=0.4).target(cosine))


def test_the_ramp_grows_the_margin_from_nothing():
    schedule = Schedule.resident(ADAFACE, 100)
    assert schedule.margin_at(35) == Margin(36.0, additive=0.2, adaptive=True) and schedule.margin_at(70) == ADAFACE
    cosine = torch.tensor([-0.3, 0.8])
    assert torch.equal(schedule.margin_at(0).target(cosine, torch.tensor([-1.0, 1.0])), cosine)


def test_the_full_fc_layer_takes_it_with_exact_gradients():
    torch.manual_seed(0)
    head = FullFC(6, 9, Schedule(ADAFACE)).double()
    slow = SlowQuality()
    for _ in range(5):
        embeddings = (3 * torch.randn(8, 6, dtype=torch.float64)).requires_grad_()
        labels = torch.randint(9, (8,))
        cosine = normalize(embeddings) @ normalize(head.weight).T
        own = [slow_target(row[label], ADAFACE, quality)
               for row, label, quality in zip(cosine, labels.tolist(), slow(embeddings), strict=True)]
        expected = cross_entropy(64 * cosine.scatter(1, labels[:, None], torch.stack(own)[:, None]), labels)
        loss = head(embeddings, labels)
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
        for of in embeddings, head.weight:
            torch.testing.assert_close(*(torch.autograd.grad(each, of, retain_graph=True) for each in (loss, expected)))
    assert head.state_dict().keys() == {"weight", "quality.mean", "quality.std"}


def test_embeddings_that_are_not_finite_are_not_counted():
    torch.manual_seed(0)
    embeddings = 5 * torch.randn(2, 8, 4)
    spoiled, clean = ImageQuality(), ImageQuality()
    bad = embeddings[0].clone()
    bad[2, 1], bad[5, 0], bad[6, 3] = torch.nan, torch.inf, 1e30  # the last has no length in float32
    quality = spoiled(bad)
    good = [0, 1, 3, 4, 7]
    assert torch.equal(quality[good], clean(bad[good])) and torch.equal(spoiled.std, clean.std)
    before = spoiled.mean.clone(), spoiled.std.clone()
    spoiled(bad[[2, 5]])
    assert before == (spoiled.mean, spoiled.std)
    nothing_yet = ImageQuality()
    nothing_yet(bad[[2, 5]])
    assert torch.equal(nothing_yet(embeddings[1]), ImageQuality()(embeddings[1]))


def test_a_batch_of_one_image_and_lengths_out_of_range_give_numbers():
    quality = ImageQuality()
    assert quality(torch.ones(1, 4)).isfinite().all()
    assert quality(torch.tensor([[1e6], [0.0]])).tolist() == [1.0, -1.0]
    torch.testing.assert_close(quality.mean, torch.tensor(0.99 * 2 + 0.01 * 50.0005))
    of_100 = 0.333 * 25 / 35.3563  # counts as 100 beside 50: mean 75, deviation 35.3553
    torch.testing.assert_close(ImageQuality()(torch.tensor([[1e6], [50.0]])), torch.tensor([of_100, -of_100]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_measure_lengths_in_float32(dtype):
    embeddings = (100 * torch.randn(16, 512, generator=torch.Generator().manual_seed(0)) / 23).to(dtype)
    with torch.autocast("cpu", dtype):
        quality = ImageQuality()(embeddings)
    assert quality.dtype == torch.float32 and torch.equal(quality, ImageQuality()(embeddings.float()))


def test_config_and_library_name_it_and_refuse_it_without_an_m():
    assert margin_from(CombinedMarginLoss(1.0, 0.0, 0.4), "adaface") == Margin(64, 0, 0.4, 0.25, adaptive=True)
    for wrong in (1.0, 0.5, 0.0), (1.0, 0.5, 0.4):
        with pytest.raises(ConfigError, match=r"f2c_margin='adaface': .* margin_list=\(1.0, 0.5, 0.\d\): set margin_list="):
            margin_from(CombinedMarginLoss(*wrong), "adaface")
    for margin in Margin(64.0, adaptive=True), Margin(64.0, 0.5, 0.4, adaptive=True):
        with pytest.raises(ConfigError, match=r"margin=Margin\(.*: must be one with additive above 0 and without angular"):
            build_head(torch.nn.Linear(3, 4), 9, 10, embedding_size=4, margin=margin)
