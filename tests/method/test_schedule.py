"""How scale and margin run over a training."""

import pytest

from f2c_plugin.errors import ConfigError
from f2c_plugin.method.margin import Margin
from f2c_plugin.method.schedule import Schedule

FULL = Margin(64.0, angular=0.5, filter_threshold=0.3)


def test_the_ramp_grows_from_a_small_scale_and_no_margin_to_the_configured_ones_at_70_percent():
    ramp = Schedule.ramp(FULL, total_steps=1000)
    assert ramp.margin_at(0) == Margin(8.0, angular=0.0, filter_threshold=0.3)
    assert ramp.margin_at(350) == Margin(36.0, angular=0.25, filter_threshold=0.3)
    assert ramp.margin_at(700) == ramp.margin_at(999) == FULL


def test_the_ramp_averages_the_losses_and_the_paper_sums_them():
    assert Schedule.ramp(FULL, 10).loss_weight(4) == 0.25
    assert Schedule.paper(FULL).loss_weight(4) == 1.0


def test_under_the_ramp_the_momentum_grows_to_the_configured_one_whatever_the_length_of_the_run():
    ramp = Schedule.ramp(FULL, 10**6)
    momenta = [ramp.momentum_at(step) for step in range(2000)]
    assert momenta[0] == 0.1 and momenta[90] == 0.91 and momenta == sorted(momenta) and momenta[-1] == 0.99
    assert Schedule.ramp(FULL, 10**6, momentum=0.05).momentum_at(0) == 0.05


@pytest.mark.parametrize("step", [0, 5, 99])
def test_the_paper_has_scale_margin_and_momentum_in_full_from_the_first_step_and_hard_negatives(step):
    paper = Schedule.paper(FULL, 0.99)
    assert paper.margin_at(step) == FULL and paper.momentum_at(step) == 0.99
    assert not paper.own_image_keys and Schedule.ramp(FULL, 100).own_image_keys


def test_a_configured_scale_below_the_ramps_start_is_never_exceeded():
    ramp = Schedule.ramp(Margin(4.0, additive=0.2), total_steps=10)
    assert [ramp.margin_at(step).scale for step in range(10)] == [4.0] * 10


def test_an_unknown_recipe_is_refused_with_those_there_are():
    assert Schedule.named("ramp", FULL, 100, 0.9) == Schedule.ramp(FULL, 100, 0.9)
    assert Schedule.named("paper", FULL, 100, 0.9) == Schedule.paper(FULL, 0.9)
    with pytest.raises(ConfigError, match="recipe='fast': must be 'ramp' or 'paper'"):
        Schedule.named("fast", FULL, 100)
