"""A ready F²C head from plain arguments, for the training loops of arcface_torch, of this package and of others."""

from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from f2c_plugin.config import slots_for
from f2c_plugin.errors import ConfigError
from f2c_plugin.method.dcq import ClassQueue, DCQHead
from f2c_plugin.method.head import F2CHead
from f2c_plugin.method.margin import Margin, SFace
from f2c_plugin.method.pool import DynamicClassPool
from f2c_plugin.method.pool_head import PoolHead
from f2c_plugin.method.resident import ResidentPool
from f2c_plugin.method.resident_head import ResidentHead
from f2c_plugin.method.schedule import Schedule
from f2c_plugin.utils.distributed import WHOLE, Shard, this_rank

Classes = tuple[type[ResidentHead], type[F2CHead], type[DCQHead]]


def build_head(backbone: nn.Module, num_identities: int, total_steps: int, *, embedding_size: int = 512,
               margin: Margin = Margin(64.0, angular=0.5), pool_rate: float = 0.1, num_slots: int | None = None,
               pool_dtype: torch.dtype = torch.float32, recipe: str = "resident", kept_weights: Path | None = None,
               shard_pool: bool = False, momentum: float = 0.99, symmetric: bool = True,
               num_hard_negatives: int | None = None, sub_centers: int = 1, forget_rate: float = 0.0,
               queue_size: int = 8192, gallery_images: int = 1, seed: int = 0, gradient_acc: int = 1, autocast: bool = False,
               hook: bool = False, pretrained: bool = False, fused: bool = True,
               classes: Classes = (ResidentHead, F2CHead, DCQHead)) -> PoolHead:
    """A head with its pool and schedule, on the backbone's device. The defaults are those of the config keys.

    Args:
        backbone: the probe net, on its device, before or after it is wrapped in DDP.
        num_identities: labels are 0 … num_identities − 1.
        total_steps: batches of the whole training; the ramp takes the first 70 % of them, or 30 % if ``pretrained``, and
            the rate of the class weights falls to 0 over them.
        embedding_size: D, as the backbone returns it.
        margin: scale and margin: ``Margin(64.0, angular=0.5)`` is ArcFace, ``Margin(64.0, additive=0.4)`` CosFace,
            ``Margin(64.0, additive=0.4, adaptive=True)`` AdaFace, ``SFace(64.0, 0.9, 1.2)`` SFace.
        pool_rate: slots as a share of the identities, unless ``num_slots`` is given.
        pool_dtype: of the pool's rows.
        recipe: "resident" (``ResidentHead``; the ranks share the slots), "paper" (``F2CHead``) or "dcq" (``DCQHead``).
        kept_weights: the folder whose disk keeps the weights of identities out of the pool; None is main memory. It is for
            the recipe "resident", as are ``sub_centers``, class weights of an identity, and ``forget_rate``: see
            ``ResidentHead``.
        shard_pool: whether the ranks share the rows, instead of each holding all of them.
        momentum: m of the gallery net.
        symmetric, num_hard_negatives, gradient_acc, autocast, hook: see ``F2CHead``.
        queue_size, gallery_images: of the recipe "dcq", see ``DCQHead``, which has no use for ``pool_rate``, ``num_slots``,
            ``shard_pool`` and ``symmetric``.
        seed: of the random vectors in slots not yet taken; the same on all ranks.
        pretrained: whether the backbone is a trained net. Recipe "resident".
        fused: whether the passes over the slots run as fused kernels where they can: on a GPU, with Triton.
        classes: what to make; subclasses of these.
    Raises:
        ConfigError: an argument out of range, an unknown recipe, a pool without slots or with more than
            there are identities, or a backbone that F2CHead cannot use.
    """
    for name, value, valid, expected in (
            ("pool_dtype", pool_dtype, pool_dtype.is_floating_point, "a floating point type"),
            ("momentum", momentum, 0 <= momentum < 1, "from 0 to below 1"),
            ("embedding_size", embedding_size, embedding_size > 0, "a whole number above 0"),
            ("margin", margin, not margin.adaptive or (margin.additive > 0 and not margin.angular),
             "one with additive above 0 and without angular, if it is adaptive"),
            ("gradient_acc", gradient_acc, gradient_acc > 0, "a whole number above 0"),
            ("num_hard_negatives", num_hard_negatives, num_hard_negatives is None or num_hard_negatives > 0,
             "a whole number above 0, or None"),
            ("queue_size", queue_size, queue_size > 0, "a whole number above 0"),
            ("gallery_images", gallery_images, gallery_images > 0, "a whole number above 0"),
            ("sub_centers", sub_centers, sub_centers > 0 and (sub_centers == 1 or recipe == "resident"),
             "a whole number above 0; more than 1 with the recipe 'resident' only"),
            ("forget_rate", forget_rate, 0 <= forget_rate < 1 and (not forget_rate or recipe == "resident"),
             "from 0 to below 1; above 0 with the recipe 'resident' only")):
        if not valid:
            raise ConfigError(f"{name}={value}: must be {expected}")
    if next(backbone.parameters(), None) is None:
        raise ConfigError("the backbone has no parameters: there is nothing to train")
    schedule = Schedule.named(recipe, margin, total_steps, momentum, pretrained)
    slots = queue_size if recipe == "dcq" else slots_for(pool_rate, num_identities) if num_slots is None else num_slots
    if recipe != "dcq" and not 0 < slots <= num_identities:
        given = f"pool_rate={pool_rate}" if num_slots is None else f"num_slots={num_slots}"
        raise ConfigError(f"{given}: gives a pool of {slots} slots for {num_identities} identities; it needs 1 to "
                          f"{num_identities}")
    # The pool is drawn where it will be: in main memory there may be no room for those of all ranks.
    device = next(backbone.parameters()).device
    resident_head, f2c_head, dcq_head = classes
    if recipe == "resident":  # gradients of all slots would cost more to add up over the ranks than the slots are worth
        with device:
            pool = ResidentPool(slots, num_identities, embedding_size, seed, pool_dtype, Shard(*this_rank()), kept_weights,
                                sub_centers)
        head = resident_head(backbone, pool, schedule, autocast, forget_rate, gradient_acc, hook)
    elif recipe == "dcq":
        with device:
            pool = ClassQueue(slots, num_identities, embedding_size, seed, pool_dtype)
        head = dcq_head(backbone, pool, schedule, gradient_acc, autocast, hook, gallery_images)
    else:
        shard = Shard(*this_rank()) if shard_pool else WHOLE
        with device:
            pool = DynamicClassPool(slots, num_identities, embedding_size, seed, pool_dtype, shard)
        head = f2c_head(backbone, pool, schedule, symmetric, num_hard_negatives, gradient_acc, autocast, hook)
    pool.fused = fused
    return head.to(device)


class CombinedMargin(Protocol):
    """The attributes of arcface_torch's ``CombinedMarginLoss`` that are read here."""

    s: float
    m1: float
    m2: float
    m3: float
    interclass_filtering_threshold: float


def margin_from(margin_loss: CombinedMargin, name: str | None = None) -> Margin:
    """The margin of arcface_torch's ``CombinedMarginLoss``, or another of ``MARGINS`` with its numbers m2 and m3.

    Raises:
        ConfigError: a ``margin_list`` that does not fit the margin, or, without a name, one that arcface_torch refuses, too.
    """
    m1, m2, m3 = margin_loss.m1, margin_loss.m2, margin_loss.m3
    found = f"margin_list=({m1}, {m2}, {m3})"
    if name is None:
        name = "arcface" if m1 == 1.0 and m3 == 0.0 else "cosface"
        if name == "cosface" and m3 <= 0:
            raise ConfigError(f"{found} is neither ArcFace (1, m2, 0) nor CosFace (1, 0, m3 > 0)")
        m2 = 0.0 if name == "cosface" else m2  # arcface_torch leaves it out, too
    else:
        takes, published = MARGINS[name]
        used = [number > 0 for number in (m2, m3)]
        if m1 != 1.0 or used != ["second" in takes, "third" in takes]:
            raise ConfigError(f"f2c_margin={name!r}: takes its {takes} of {found}: set margin_list={published}, as published")
    kind = SFace if name == "sface" else Margin
    return kind(margin_loss.s, m2, m3, margin_loss.interclass_filtering_threshold, adaptive=name == "adaface")


# What each margin takes from margin_list, by its name in ``config.f2c_margin``, and the margin_list of its paper.
MARGINS = {
    "arcface": ("m from the second number", (1.0, 0.5, 0.0)), "cosface": ("m from the third number", (1.0, 0.0, 0.35)),
    "adaface": ("m from the third number", (1.0, 0.0, 0.4)),
    "sface": ("a and b from the second and third number", (1.0, 0.9, 1.2))}
