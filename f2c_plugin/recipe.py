"""How scale, margin and the weight of the losses run over a training (``config.f2c_recipe``)."""

from dataclasses import dataclass

from f2c_plugin.loss import Margin

START_SCALE = 8.0
RAMP_SHARE = 0.7  # of the run; the rest trains with the configured scale and margin
MOMENTUM_START = 10  # the gallery net's momentum after t steps is at most (1 + t) / (MOMENTUM_START + t)
TWINS = True  # whether probes outside the pool tell their own image from it, instead of being pushed off hard negatives
OUTSIDE_WEIGHT = 1.0  # of the loss of probes outside the pool beside the margin softmax


@dataclass(frozen=True)
class Recipe:
    """Margin and loss weight for every step.

    "ramp": the scale grows linearly from 8 and the margin from 0 to the configured ones over the
    first 70 % of the run, and losses of views and half-steps are averaged. With the full scale
    from the first step, probe and gallery features, which start out nearly equal for everyone,
    need long to part. The gallery net's momentum grows from 0.1 to the configured one, so that it
    has left its random weights behind as soon as the probe net has. Probes whose identity is not
    in the pool tell their own image from the pool, by the softmax that the others take.
    "paper": scale, margin and momentum as configured from the first step, losses summed, and probes
    whose identity is not in the pool pushed off their hard negatives.

    Args:
        name: "ramp" or "paper".
        margin: the configured one.
        total_steps: length of the run in training steps.
    """

    name: str
    margin: Margin
    total_steps: int

    def margin_at(self, step: int) -> Margin:
        """The margin of a step, counted from 0."""
        if self.name == "paper":
            return self.margin
        share = min(1.0, step / max(1.0, RAMP_SHARE * self.total_steps))
        start = min(START_SCALE, self.margin.scale)
        return self.margin.scaled(scale=start + share * (self.margin.scale - start), share=share)

    def momentum_at(self, step: int, momentum: float) -> float:
        """Momentum of the gallery net after ``step`` steps, up to ``momentum``."""
        return momentum if self.name == "paper" else min(momentum, (1 + step) / (MOMENTUM_START + step))

    def loss_weight(self, terms: int) -> float:
        """Factor for each of the ``terms`` losses (views × half-steps) that make up a step's."""
        return 1.0 if self.name == "paper" else 1.0 / terms

    @property
    def twins(self) -> bool:
        """Whether probes whose identity is not in the pool take their own image as target (``HalfStep.twins``)."""
        return self.name != "paper" and TWINS

    @property
    def outside_weight(self) -> float:
        """Factor of the loss of probes whose identity is not in the pool."""
        return 1.0 if self.name == "paper" else OUTSIDE_WEIGHT
