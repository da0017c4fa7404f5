"""How scale, margin, momentum and the weight of the losses change during a training (``config.f2c_recipe``)."""

from dataclasses import dataclass

from f2c_plugin.errors import ConfigError
from f2c_plugin.method.margin import Margin


@dataclass(frozen=True)
class Schedule:
    """Margin, momentum and loss weight of every step.

    ``Schedule.ramp`` (ours): the scale grows linearly from 8 and the margin from 0 to the configured
    ones over the first 70 % of the run. With the full scale from the first step, probe and gallery
    features, which start out nearly equal for everyone, take long to separate. The gallery net's
    momentum grows from 0.1 to the configured one, so that it leaves its random weights behind as
    soon as the probe net does. Losses are averaged over views and half-steps. A probe whose
    identity is not in the pool takes the gallery feature of its own image as target.

    ``Schedule.paper``: scale, margin and momentum in full from the first step, losses summed; probes
    whose identity is not in the pool are pushed off their hardest negatives.

    Attributes:
        margin, momentum: the configured ones.
        ramp_steps: steps until scale and margin reach the configured ones; 0 is from the start.
        start_scale: the scale of the first step.
        momentum_start: after t steps the momentum is at most (1 + t) / (momentum_start + t).
        average_losses: whether losses are averaged over views and half-steps, or summed.
        own_image_keys: whether probes whose identity is not in the pool take the gallery feature of
            their own image as target.
        outside_weight: weight of the loss of these probes.
        second_row: whether the second view of the pool shows row 1 of the slots that have two keys.
    """

    margin: Margin
    momentum: float = 0.99
    ramp_steps: float = 0.0
    start_scale: float = 8.0
    momentum_start: float = 1.0
    average_losses: bool = False
    own_image_keys: bool = False
    outside_weight: float = 1.0
    second_row: bool = True
    slot_rate: float = 0.0
    total_steps: int = 1

    @classmethod
    def resident(cls, margin: Margin, total_steps: int) -> "Schedule":
        """The ramp of scale and margin, for class weights that learn."""
        return cls(margin, ramp_steps=max(1.0, 0.7 * total_steps), slot_rate=1.0, total_steps=total_steps)

    @classmethod
    def ramp(cls, margin: Margin, total_steps: int, momentum: float = 0.99) -> "Schedule":
        """The ramp for a run of ``total_steps``."""
        return cls(margin, momentum, ramp_steps=max(1.0, 0.7 * total_steps), momentum_start=10.0, average_losses=True,
                   own_image_keys=True)

    @classmethod
    def paper(cls, margin: Margin, momentum: float = 0.99) -> "Schedule":
        """As published (arXiv 2105.10375)."""
        return cls(margin, momentum)

    @classmethod
    def named(cls, recipe: str, margin: Margin, total_steps: int, momentum: float = 0.99) -> "Schedule":
        """The schedule of a recipe. Raises ConfigError unless it is "ramp" or "paper"."""
        if recipe not in ("resident", "ramp", "paper"):
            raise ConfigError(f"recipe={recipe!r}: must be 'resident', 'ramp' or 'paper'")
        if recipe == "resident":
            return cls.resident(margin, total_steps)
        return cls.ramp(margin, total_steps, momentum) if recipe == "ramp" else cls.paper(margin, momentum)

    def margin_at(self, step: int) -> Margin:
        """Scale and margin of a step, counted from 0."""
        if not self.ramp_steps:
            return self.margin
        share = min(1.0, step / self.ramp_steps)
        start = min(self.start_scale, self.margin.scale)
        return self.margin.scaled(scale=start + share * (self.margin.scale - start), share=share)

    def slot_rate_at(self, step: int) -> float:
        """Rate of the class weights' steps: falls linearly to 0 over the run."""
        return self.slot_rate * max(0.0, 1 - step / self.total_steps)

    def momentum_at(self, step: int) -> float:
        """Momentum of the gallery net after ``step`` steps."""
        return min(self.momentum, (1 + step) / (self.momentum_start + step))

    def loss_weight(self, terms: int) -> float:
        """Factor for each of the ``terms`` losses (views × half-steps) of a step."""
        return 1.0 / terms if self.average_losses else 1.0
