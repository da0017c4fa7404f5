"""How scale and margin run over a training."""

import pytest

from f2c_plugin.loss import Margin
from f2c_plugin.recipe import Recipe

FULL = Margin(64.0, angular=0.5, filter_threshold=0.3)


def test_the_ramp_grows_from_a_small_scale_and_no_margin_to_the_configured_ones_at_70_percent():
    ramp = Recipe("ramp", FULL, total_steps=1000)
    assert ramp.margin_at(0) == Margin(8.0, angular=0.0, filter_threshold=0.3)
    assert ramp.margin_at(350) == Margin(36.0, angular=0.25, filter_threshold=0.3)
    assert ramp.margin_at(700) == ramp.margin_at(999) == FULL


def test_the_ramp_averages_the_losses_and_the_paper_sums_them():
    assert Recipe("ramp", FULL, 10).loss_weight(4) == 0.25
    assert Recipe("paper", FULL, 10).loss_weight(4) == 1.0


def test_under_the_ramp_the_momentum_grows_to_the_configured_one_whatever_the_length_of_the_run():
    ramp = Recipe("ramp", FULL, 10**6)
    momenta = [ramp.momentum_at(step, 0.99) for step in range(2000)]
    assert momenta[0] == 0.1 and momenta[90] == 0.91 and momenta == sorted(momenta) and momenta[-1] == 0.99
    assert ramp.momentum_at(0, 0.05) == 0.05


@pytest.mark.parametrize("step", [0, 5, 99])
def test_the_paper_has_scale_margin_and_momentum_in_full_from_the_first_step_and_hard_negatives(step):
    paper = Recipe("paper", FULL, 100)
    assert paper.margin_at(step) == FULL and paper.momentum_at(step, 0.99) == 0.99
    assert not paper.twins and Recipe("ramp", FULL, 100).twins


def test_a_configured_scale_below_the_ramps_start_is_never_exceeded():
    ramp = Recipe("ramp", Margin(4.0, additive=0.2), total_steps=10)
    assert [ramp.margin_at(step).scale for step in range(10)] == [4.0] * 10
