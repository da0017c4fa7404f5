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


@pytest.mark.parametrize("step", [0, 5, 99])
def test_the_paper_has_scale_and_margin_in_full_from_the_first_step(step):
    assert Recipe("paper", FULL, 100).margin_at(step) == FULL


def test_a_configured_scale_below_the_ramps_start_is_never_exceeded():
    ramp = Recipe("ramp", Margin(4.0, additive=0.2), total_steps=10)
    assert [ramp.margin_at(step).scale for step in range(10)] == [4.0] * 10
