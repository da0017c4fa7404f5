"""The gallery net: momentum, BatchNorm by batch, nothing else random."""

import torch
from torch import nn

from f2c_plugin.method.gallery import GalleryNet
from f2c_plugin.utils.tensors import step_towards


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.PReLU(4), nn.Dropout(0.5),
                         nn.Flatten(), nn.Linear(4 * 36, 5), nn.BatchNorm1d(5))


def test_it_starts_as_the_probe_net_and_follows_it_by_the_momentum():
    probe = net()
    gallery = GalleryNet(probe)
    before = [parameter.clone() for parameter in gallery.parameters()]
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.add_(torch.randn_like(parameter))
    gallery.follow(probe, momentum=0.9)
    for old, new, followed in zip(before, gallery.parameters(), probe.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * followed)


def test_in_training_it_uses_batch_statistics_and_no_dropout():
    probe = net()
    gallery = GalleryNet(probe).train()
    images = torch.randn(8, 3, 8, 8)
    embeddings = gallery(images)
    assert torch.equal(embeddings, gallery(images))
    probe.train()[3].p = 0.0
    torch.testing.assert_close(embeddings, probe(images))


def test_in_eval_mode_it_uses_the_running_statistics():
    gallery = GalleryNet(net())
    images = torch.randn(8, 3, 8, 8)
    in_training = gallery.train()(images)
    assert not torch.allclose(gallery.eval()(images), in_training, atol=1e-2)
    torch.testing.assert_close(gallery(images)[:1], gallery(images[:1]))


def test_it_takes_no_gradient():
    gallery = GalleryNet(net())
    assert not gallery(torch.randn(4, 3, 8, 8)).requires_grad
    assert not any(parameter.requires_grad for parameter in gallery.parameters())


def test_following_does_not_depend_on_the_layout_of_either_net():
    own, theirs = torch.randn(4, 3, 3, 3), torch.randn(4, 3, 3, 3)
    expected = 0.9 * own + 0.1 * theirs
    for own_layout in torch.contiguous_format, torch.channels_last:
        for their_layout in torch.contiguous_format, torch.channels_last:
            followed = own.clone(memory_format=own_layout)
            step_towards([followed], [theirs.clone(memory_format=their_layout)], 0.1)
            torch.testing.assert_close(followed, expected)
