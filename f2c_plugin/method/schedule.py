"""How scale, margin and the rate of the class weights change during a training (``config.f2c_recipe``)."""

from dataclasses import dataclass

from f2c_plugin.errors import ConfigError
from f2c_plugin.method.margin import Margin
from f2c_plugin.utils.replay import Number


@dataclass(frozen=True)
class Schedule:
    """Margin, rate and momentum of every step.

    ``Schedule.resident`` (ours, the default): the scale grows linearly from 8 and the margin from 0 to the configured ones
    over the first 70 % of the run: with the full scale from the first step, embeddings, which start out nearly equal for
    everyone, take long to separate. Those of a pretrained net are apart already; 30 % are enough for it to get used to new
    class weights. The rate of the class weights falls linearly to 0, as the learning rate does.

    ``Schedule.paper``: scale, margin and momentum in full from the first step; slots hold features and do not learn. So, too,
    with DCQ.

    Attributes:
        margin: the configured one.
        total_steps: of the run.
        ramp_steps: steps until scale and margin reach the configured ones; 0 is from the start.
        start_scale: the scale of the first step.
        slot_rate: rate of the class weights' first step. That of a full FC layer is lr / (1 − momentum): 1 for 0.1 and
            0.9. It does not follow lr: weights whose norm grows with their steps find their own pace, and half or twice
            the rate gives the same accuracy.
        momentum: m of the gallery net.
    """

    margin: Margin
    total_steps: int = 1
    ramp_steps: float = 0.0
    start_scale: float = 8.0
    slot_rate: float = 1.0
    momentum: float = 0.99

    @classmethod
    def resident(cls, margin: Margin, total_steps: int, pretrained: bool = False, momentum: float = 0.99) -> "Schedule":
        """The ramp, for a run of ``total_steps`` from a pretrained net or from scratch."""
        return cls(margin, total_steps, ramp_steps=max(1.0, (0.3 if pretrained else 0.7) * total_steps), momentum=momentum)

    @classmethod
    def paper(cls, margin: Margin, momentum: float = 0.99) -> "Schedule":
        """As published (arXiv 2105.10375)."""
        return cls(margin, momentum=momentum)

    @classmethod
    def named(cls, recipe: str, margin: Margin, total_steps: int, momentum: float = 0.99,
              pretrained: bool = False) -> "Schedule":
        """The schedule of a recipe. Raises ConfigError unless it is "resident", "paper" or "dcq"."""
        if recipe not in ("resident", "paper", "dcq"):
            raise ConfigError(f"recipe={recipe!r}: must be 'resident', 'paper' or 'dcq'")
        return cls.resident(margin, total_steps, pretrained, momentum) if recipe == "resident" else cls.paper(margin, momentum)

    def margin_at(self, step: int) -> Margin:
        """Scale and margin of a step, counted from 0."""
        if not self.ramp_steps:
            return self.margin
        share = min(1.0, step / self.ramp_steps)
        start, scale = self._scales
        return self.margin.scaled(scale=start + share * (scale - start), share=share)

    def share_of(self, scale: Number) -> Number:
        """How far the ramp is, 0 to 1, when the scale is ``scale``; a number or, in a recording, a tensor."""
        start, end = self._scales
        return (scale - start) / (end - start) if self.ramp_steps and start < end else 1.0

    @property
    def _scales(self) -> tuple[float, float]:
        scale = self.margin.numbers[0]
        return min(self.start_scale, scale), scale

    def slot_rate_at(self, step: int) -> float:
        """Rate of the class weights' steps."""
        return self.slot_rate * max(0.0, 1 - step / self.total_steps)
