"""Starts a training from a pretrained net, and from class weights of its identities (``config.f2c_init``)."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor, nn

from f2c_plugin.config import Config
from f2c_plugin.errors import CheckpointError, ConfigError
from f2c_plugin.method.gallery import gallery_nets
from f2c_plugin.utils.finite import not_finite, some
from f2c_plugin.utils.inputs import unwrapped
from f2c_plugin.utils.rank_files import NAME, load_all_ranks, require_arcface_torch, require_none
from f2c_plugin.utils.safe_load import load_states
from f2c_plugin.utils.schema import FORMAT, problems

log = logging.getLogger(__name__)

_BLOCK = 1 << 16  # class weights that are copied at a time

Head = Mapping[str, Any]  # the state of a head


@runtime_checkable
class TakesClassWeights(Protocol):
    """A head that can start from class weights."""

    def put_class_weights(self, identities: Tensor, weights: Tensor) -> None:
        """Take the weights (n, D), of any floating point type, of identities int64 (n,). Both are on the CPU."""
        ...


@dataclass
class ClassWeights:
    """The class weights of a checkpoint, which may be larger than main memory: of identities 0 … N − 1.

    Their norms stay as they are. The larger the norm, the smaller the steps, and weights that have learnt have a larger one
    (about 0.8) than new ones (0.2 in a pool, 0.1 to 0.2 in a full FC layer). With that of new ones they lose some of what they
    have learnt: in the world of vectors 0.2 to 1.7 points of TAR at FAR 1e-3.

    Attributes:
        parts: (n, D) of the first n identities, (n, D) of the next n, and so on. 0 where an identity has none.
        in_pool: identities int64 (K,), below 0 for none; and directions (K, D) and lengths (K, 1) of their weights, which
            replace those in ``parts``.
    """

    parts: Sequence[Tensor]
    in_pool: tuple[Tensor, Tensor, Tensor] | None = None

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Identities int64 (n,) and their weights (n, D). A later weight of an identity replaces an earlier."""
        first = 0
        for part in self.parts:
            for start in range(0, len(part), _BLOCK):
                block = part[start:start + _BLOCK]
                there = block.any(1).nonzero()[:, 0]
                yield first + start + there, block[there]
            first += len(part)
        if self.in_pool:
            for identities, directions, lengths in zip(*(part.split(_BLOCK) for part in self.in_pool), strict=True):
                taken = identities >= 0
                yield identities[taken], directions[taken] * lengths[taken]


@dataclass
class Pretrained:
    """What is taken from ``config.f2c_init``.

    Attributes:
        net: the backbone's states.
        classes: None if they are not taken.
        left: names of what is not taken.
    """

    net: Mapping[str, Tensor]
    classes: ClassWeights | None
    left: list[str]


def initialize(cfg: Config, backbone: nn.Module, head: nn.Module, resumed: bool) -> None:
    """Load the net of ``config.f2c_init``, if it is set, and its class weights, if ``config.f2c_init_classes``.

    All ranks call this before the first batch, and read the same files.

    Args:
        cfg: the keys of the config.
        backbone: the probe net, wrapped in DDP or not. A gallery net that follows it starts from the same states.
        head: wrapped in DDP or not; one that ``TakesClassWeights``, if they are to be loaded.
        resumed: whether the training goes on from a checkpoint of its own. Then nothing is loaded.
    Raises:
        ConfigError: see ``read``; or the head takes no class weights.
    """
    if not (name := cfg.get("f2c_init")):
        return
    if resumed:
        log.info("f2c_init=%r is not loaded: the training goes on from its own checkpoint", name)
        return
    own_head: nn.Module = getattr(head, "module", head)
    pretrained = read(cfg, probe_net := unwrapped(backbone))
    taken = f"backbone ({len(pretrained.net)} tensors)"
    if pretrained.classes:
        if not isinstance(own_head, TakesClassWeights):
            raise ConfigError("f2c_init_classes=True: this head has no class weights of its own: set it to False, or set "
                              "f2c_recipe='resident'")
        known = torch.zeros(cfg["num_classes"], dtype=torch.bool)
        for identities, weights in pretrained.classes.blocks():
            own_head.put_class_weights(identities, weights)
            known[identities] = True
        taken += f", class weights of {int(known.sum()):,} identities"
    for net in (probe_net, *(each.net for each in gallery_nets(own_head))):
        net.load_state_dict(pretrained.net)
    log.info("f2c_init=%r: taken: %s; left: %s", name, taken, ", ".join(pretrained.left) or "nothing")


def read(cfg: Config, net: nn.Module) -> Pretrained:
    """Read what ``config.f2c_init`` names: a ``model.pt``, or a checkpoint of arcface_torch or of the built-in trainer.

    Args:
        cfg: the keys of the config.
        net: that the states are for, on any device.
    Raises:
        ConfigError: a file cannot be read, is not finite, or does not fit the net or the config; lists what does not.
    """
    path, with_classes = Path(cfg["f2c_init"]), cfg.get("f2c_init_classes", False)
    try:
        state, heads, left = _states(path, with_classes)
    except CheckpointError as error:
        raise ConfigError(f"f2c_init: {error}") from error
    state = _fitting(state, net, cfg)
    return Pretrained(state, _fitting_classes(heads, cfg) if with_classes else None, left)


def _states(path: Path, with_classes: bool) -> tuple[Mapping[Any, Any], list[Head], list[str]]:
    """States of the backbone and of the heads of all ranks; and names of what is left."""
    saved = load_states(path)
    if saved.get("format") == FORMAT:
        require_none(problems(saved), path)
        backbone, head, settings = "backbone", "head", saved["settings"]
    elif "state_dict_backbone" in saved:
        require_arcface_torch(saved, path)
        backbone, head, settings = "state_dict_backbone", "state_dict_softmax_fc", {}
    else:
        return saved, [], []
    heads = [saved[head]]
    if with_classes and head == "state_dict_softmax_fc":  # Partial FC's of each rank has the weights of its own identities
        states = load_all_ranks(path.parent)
        if path not in states:
            raise CheckpointError(f"{path}: is not named {NAME.format('<rank>')}, so the files of the other ranks, which "
                                  "f2c_init_classes=True needs, cannot be found: give it its name back")
        heads = [state[head] for state in states.values()]
    if with_classes and (count := _sub_centers(settings, heads[0])) > 1:
        raise CheckpointError(f"{path}: has {count} class weights of each identity (f2c_sub_centers), which cannot be taken: "
                              "set f2c_init_classes=False")
    return saved[backbone], heads, sorted(saved.keys() - {"format", backbone, *([head] if with_classes else [])})


def _sub_centers(settings: Mapping[str, Any], head: Head) -> int:
    """How many class weights an identity has: by the settings of the built-in trainer, or by the weights kept by a pool."""
    kept, rows = head.get("pool.kept.rows"), head.get("pool.rows")
    if _is_table(kept, 3) and _is_table(rows, 3) and kept.size(2) == rows.size(0) * rows.size(2):
        return rows.size(0)
    count = settings.get("f2c_sub_centers")
    return count if isinstance(count, int) else 1


def _fitting(state: Mapping[Any, Any], net: nn.Module, cfg: Config) -> Mapping[str, Tensor]:
    """The states of a net, without the "module." of DDP. Raises ConfigError unless exactly those of ``net`` are there."""
    if all(str(name).startswith("module.") for name in state):
        state = {str(name).removeprefix("module."): value for name, value in state.items()}
    own: dict[str, Tensor] = net.state_dict()
    wrong = {
        "lacks": [name for name in own if name not in state],
        "holds what the net has not:": [str(name)[:60] for name in state if name not in own],
        "holds in another form:": [f"{name} ({_form(state[name])} instead of {_form(value)})" for name, value in own.items()
                                   if name in state and _form(state[name]) != _form(value)]}
    if found := [f"{what} {some(names)}" for what, names in wrong.items() if names]:
        raise ConfigError(f"f2c_init={cfg['f2c_init']!r}: does not fit network={cfg['network']!r} with embedding_size="
                          f"{cfg['embedding_size']}: it {'; it '.join(found)}: set both to what the file was trained with")
    if names := not_finite(dict(state)):
        raise ConfigError(f"f2c_init={cfg['f2c_init']!r}: {some(names)} not finite: choose another file")
    return state


def _form(value: Any) -> str:
    """Shape and kind of numbers."""
    if not torch.is_tensor(value):
        return f"a {type(value).__name__}"
    kind = "complex numbers" if value.is_complex() else "numbers" if value.is_floating_point() else "whole numbers"
    return f"{' × '.join(map(str, value.shape)) or 1} {kind}"


def _fitting_classes(heads: Sequence[Head], cfg: Config) -> ClassWeights:
    """Class weights of the heads of all ranks. Raises ConfigError unless there are any and they fit the config."""
    where = f"f2c_init_classes=True, but f2c_init={cfg['f2c_init']!r} holds "
    if not (classes := _of_f2c(heads[0]) or _of_layer(heads) if heads else None):
        raise ConfigError(f"{where}no class weights: set it to False, or f2c_init to a checkpoint of arcface_torch's Partial "
                          "FC, of F²C's recipe 'resident' or of head='softmax'")
    count, size = sum(map(len, classes.parts)), classes.parts[0].size(1)
    if count > cfg["num_classes"] or size != cfg["embedding_size"]:
        raise ConfigError(f"{where}class weights of {count:,} identities × {size}, for num_classes={cfg['num_classes']:,} and "
                          f"embedding_size={cfg['embedding_size']}: its identities must be the first of the pack: set "
                          "f2c_init_classes=False, or train on such a pack")
    if not all(weights.isfinite().all() for _, weights in classes.blocks()):
        raise ConfigError(f"{where}class weights that are not finite: choose another file")
    return classes


def _of_f2c(head: Head) -> ClassWeights | None:
    """Class weights in the state of a ``ResidentHead``, of which rank 0's has those of all ranks."""
    names = "kept.rows", "rows", "lengths.rows", "slot_identity"
    kept, rows, lengths, identities = (head.get(f"pool.{name}") for name in names)
    if not (_is_table(kept, 3) and _is_table(rows, 3) and _is_table(lengths, 3) and torch.is_tensor(identities)
            and identities.dtype == torch.int64):
        return None
    fit = identities.shape == rows.shape[1:2] == lengths.shape[1:2] and (identities < kept.size(1)).all()
    fit &= rows.size(2) == kept.size(2) and lengths.size(2) == 1
    return ClassWeights([kept[0]], (identities, rows[0], lengths[0])) if fit else None


def _of_layer(heads: Sequence[Head]) -> ClassWeights | None:
    """Class weights in the states of full FC layers, or of the parts of Partial FC."""
    parts = [weight for head in heads if _is_table(weight := head.get("weight"), 2)]
    return ClassWeights(parts) if len(parts) == len(heads) and len({part.size(1) for part in parts}) == 1 else None


def _is_table(value: Any, dimensions: int) -> TypeGuard[Tensor]:
    return torch.is_tensor(value) and value.dim() == dimensions and value.is_floating_point() and value.numel() > 0
