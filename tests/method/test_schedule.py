"""How scale and margin run over a training."""

import pytest

from f2c_plugin.errors import ConfigError
from f2c_plugin.method.margin import Margin
from f2c_plugin.method.schedule import Schedule

FULL = Margin(64.0, angular=0.5, filter_threshold=0.3)


def test_the_ramp_grows_from_a_small_scale_and_no_margin_to_the_configured_ones_at_70_percent():
    ramp = Schedule.resident(FULL, total_steps=1000)
    assert ramp.margin_at(0) == Margin(8.0, angular=0.0, filter_threshold=0.3)
    assert ramp.margin_at(350) == Margin(36.0, angular=0.25, filter_threshold=0.3)
    assert ramp.margin_at(700) == ramp.margin_at(999) == FULL


def test_the_ramp_of_a_pretrained_net_ends_at_30_percent():
    ramp = Schedule.named("resident", FULL, 1000, pretrained=True)
    assert ramp.margin_at(0).scale == 8.0 and ramp.margin_at(150).angular == 0.25 and ramp.margin_at(300) == FULL
    assert ramp.margin_at(299) != FULL


@pytest.mark.parametrize("step", [0, 5, 99])
def test_the_paper_has_scale_margin_and_momentum_in_full_from_the_first_step(step):
    paper = Schedule.paper(FULL, 0.99)
    assert paper.margin_at(step) == FULL and paper.momentum == 0.99


def test_the_rate_of_the_class_weights_falls_linearly_to_0_and_stays_there():
    schedule = Schedule.resident(FULL, 100)
    assert [schedule.slot_rate_at(step) for step in (0, 25, 50, 100, 120)] == [1.0, 0.75, 0.5, 0.0, 0.0]


def test_a_configured_scale_below_the_ramps_start_is_never_exceeded():
    ramp = Schedule.resident(Margin(4.0, additive=0.2), total_steps=10)
    assert [ramp.margin_at(step).scale for step in range(10)] == [4.0] * 10


def test_an_unknown_recipe_is_refused_with_those_there_are():
    assert Schedule.named("resident", FULL, 100, 0.9) == Schedule.resident(FULL, 100, momentum=0.9)
    assert Schedule.named("paper", FULL, 100, 0.9) == Schedule.paper(FULL, 0.9)
    with pytest.raises(ConfigError, match="recipe='fast': must be 'resident', 'paper' or 'dcq'"):
        Schedule.named("fast", FULL, 100)
