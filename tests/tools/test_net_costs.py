"""What is counted of nets, against real ones."""

import pytest
import torch
from torch import nn

from f2c_plugin.errors import ConfigError
from f2c_plugin.models import get_model, networks
from f2c_plugin.tools.net_costs import count


def test_state_and_products_are_those_of_the_net():
    net, products = get_model("r18", 512), []
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(lambda m, _, out: products.append(next(m.parameters())[0].numel() * out.numel()))
    with torch.no_grad():
        net(torch.randn(2, 3, 112, 112))
    costs = count("r18", 512, 2, fp16=False)
    assert costs.forward_flops == 2 * sum(products)
    # Backward: by weights and by inputs, but for the images.
    assert costs.flops == 3 * costs.forward_flops - 2 * products[0]
    assert costs.parameters == sum(tensor.nbytes for tensor in net.state_dict().values())
    assert costs.gradients == sum(each.nbytes for each in net.parameters()) - 4 * 512  # the last scale is fixed
    assert costs.images == 4 * 2 * 3 * 112 * 112


@pytest.mark.parametrize("network", ["r18", "mbf", "mixfacenet_s", "vargfacenet", "small", "vit_t_dp005_mask0"])
def test_the_peak_is_what_autograd_saves_of_real_tensors_and_little_more(network):
    net = get_model(network, 512)
    state = {each.untyped_storage().data_ptr() for each in net.state_dict().values()}
    saved = {}

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in state:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = torch.randn(8, 3, 112, 112)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        embeddings = net(images)
    del saved[images.untyped_storage().data_ptr()]
    assert embeddings.requires_grad
    peak = count(network, 512, 8, fp16=False).peak
    first_gradient = max(each.nbytes for each in net.parameters())  # the last layer's, which comes while all of it is there
    assert sum(saved.values()) < peak < 1.1 * sum(saved.values()) + first_gradient


@pytest.mark.parametrize("network", [pytest.param(name, marks=pytest.mark.long) if name == "r2060" else name
                                     for name in networks()])  # of a thousand blocks, which take a minute and a half
def test_the_backward_pass_of_every_net_takes_twice_what_forward_takes(network):
    costs = count(network, 512, 2, fp16=True)
    with_checkpoints = network.startswith(("vit_b", "vit_l", "vit_h", "r2060"))  # forward once more
    assert costs.flops / costs.forward_flops == pytest.approx(4 if with_checkpoints else 3, rel=0.05)


def test_mixed_precision_halves_what_grows_with_the_batch():
    half, full = (count("small", 512, 256, fp16).peak - count("small", 512, 128, fp16).peak for fp16 in (True, False))
    assert 0.45 < half / full < 0.65


def test_a_batch_that_a_net_refuses_is_an_error():
    with pytest.raises(ConfigError, match="--network small: cannot be counted with a batch of 1: Expected more than 1 value"):
        count("small", 512, 1, fp16=False)
