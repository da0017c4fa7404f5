"""Summarizes checkpoints, and converts arcface_torch's, one file per rank, to another number of ranks."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from f2c_plugin.errors import CheckpointError, OverwriteError
from f2c_plugin.method.slots import NOT_IN_POOL
from f2c_plugin.trainer.output import write_states
from f2c_plugin.utils.distributed import Shard
from f2c_plugin.utils.finite import not_finite, some
from f2c_plugin.utils.rank_files import NAME, load_all_ranks, require_arcface_torch, require_none
from f2c_plugin.utils.safe_load import load_states
from f2c_plugin.utils.schema import COUNTERS, FORMAT, problems

States = dict[str, Any]
_STATES = ("state_dict_backbone", "state_dict_softmax_fc", "state_optimizer")
_MAX_RANKS = 1 << 16
_KEPT = "pool.kept.rows"  # of all identities in the file of rank 0, else of the rank's
_POOL = {"pool.rows": 3, "pool.slot_identity": 1, "pool.clock": 0}  # dimensions of what is described


def describe(path: str | Path) -> list[tuple[str, str]]:
    """Summarize a checkpoint of arcface_torch or f2c_plugin.train in rows of (name, value). Raises CheckpointError."""
    path = Path(path)
    saved = load_states(path)
    if saved.get("format") == FORMAT:
        require_none(problems(saved), path)
        settings, net, head = saved["settings"], saved["backbone"], saved["head"]
        rows = [("written by", "f2c_plugin.train"), ("step", f"{saved['step']:,}"), ("images seen", f"{saved['images']:,}"),
                ("ranks", f"{saved['layout'][0]} with {saved['layout'][1]} images each"),
                ("training", f"{settings.get('head')}, {settings.get('network')}, lr {settings.get('lr')}")]
    elif "state_dict_backbone" in saved:
        require_arcface_torch(saved, path)
        net, head = saved["state_dict_backbone"], saved["state_dict_softmax_fc"]
        rows = [("written by", "arcface_torch"), ("epochs done", f"{saved['epoch']}"), ("step", f"{saved['global_step']:,}")]
    else:
        raise CheckpointError(f"{path}: not a checkpoint of arcface_torch or f2c_plugin.train; it holds "
                              f"{some([str(key)[:40] for key in saved])}")
    rows.append(("probe net", f"{sum(value.numel() for value in net.values()):,} numbers{_not_finite(net)}"))
    return [("checkpoint", str(path)), *rows, ("head", _describe_head(head) + _not_finite(head))]


def _describe_head(head: Mapping[str, Any]) -> str:
    if all(torch.is_tensor(head.get(name)) and head[name].dim() == dimensions for name, dimensions in _POOL.items()):
        rows, slots, size = head["pool.rows"].shape
        taken = int((head["pool.slot_identity"] != NOT_IN_POOL).sum())
        what = f"{f'{rows} ' * (rows > 1)}class weights of {size}" if _KEPT in head else f"{rows} × {size}"
        return f"F²C, {slots:,} slots of {what}, {taken:,} taken, {int(head['pool.clock']):,} writes"
    if torch.is_tensor(head.get("weight")) and head["weight"].dim() == 2:
        classes, size = head["weight"].shape
        return f"weights of {classes:,} classes × {size}"
    return f"{len(head)} entries of an unknown head"


def _not_finite(state: Mapping[str, Any]) -> str:
    numbers = [value for value in state.values() if torch.is_tensor(value) and value.is_floating_point()]
    bad = sum(int((~value.isfinite()).sum()) for value in numbers)
    return f", {bad:,} of them NOT FINITE" if bad else ""


def merge(folder: str | Path, out: str | Path, num_ranks: int) -> list[Path]:
    """Convert arcface_torch's ``checkpoint_gpu_*.pt`` files to another number of ranks. Returns the files written.

    F²C's pool is the same on all ranks and is copied; its kept weights are split again. Partial FC's weights and their
    optimizer state are joined and split again. The batch size per GPU is assumed to stay the same, so with more ranks an epoch
    has fewer steps; steps are rescaled.

    Raises CheckpointError if a file is missing, damaged, not finite or from another step than the others, the pools differ, or
    the head is unknown; OverwriteError if ``out`` already holds a checkpoint.
    """
    folder, out = Path(folder), Path(out)
    if not 1 <= num_ranks <= _MAX_RANKS:
        raise CheckpointError(f"--ranks {num_ranks}: must be from 1 to {_MAX_RANKS}")
    of_all_ranks = load_all_ranks(folder)
    paths, states = list(of_all_ranks), list(of_all_ranks.values())
    for path, state in of_all_ranks.items():
        if found := not_finite({name: state[name] for name in _STATES}):
            raise CheckpointError(f"{path}: {some(found)} not finite: merge an earlier checkpoint")
    targets = [out / NAME.format(rank) for rank in range(num_ranks)]
    if exists := [path for path in targets if path.exists()]:
        raise OverwriteError(f"{exists[0]} exists and is not overwritten: choose another folder or remove it")

    heads = [state["state_dict_softmax_fc"] for state in states]
    if "pool.rows" in heads[0]:
        _require_same_pools(heads, paths)
        whole: dict[str, Tensor] = {}
    elif all(head.keys() == {"weight"} for head in heads):
        _require_fitting_weights(states, paths)
        whole = _join(states)
    else:
        raise CheckpointError(f"{paths[0]}: {_describe_head(heads[0])}: only F²C and Partial FC can be converted")

    rescaled = _rescale_steps(states[0], len(states), num_ranks)
    with ExitStack() as on_error:  # a part of the files is of no use
        for rank, target in enumerate(targets):
            write_states(rescaled | _split(rescaled, whole, rank, num_ranks), target)
            on_error.callback(target.unlink)
        on_error.pop_all()
    return targets


def _require_same_pools(heads: Sequence[Mapping[str, Any]], paths: Sequence[Path]) -> None:
    for head, path in zip(heads, paths, strict=True):
        for name, value in heads[0].items():
            if name.startswith("pool.") and name != _KEPT and not (
                    torch.is_tensor(value) and torch.is_tensor(head.get(name)) and torch.equal(value, head[name])):
                raise CheckpointError(f"{path}: {name} differs from {paths[0].name}: the pools of the ranks have drifted apart")


def _require_fitting_weights(states: Sequence[States], paths: Sequence[Path]) -> None:
    def form(state: States) -> Any:
        """Dtypes and widths of the weights and their optimizer state; False if these differ in shape or are missing."""
        groups = state["state_optimizer"]["param_groups"]
        if not groups or not groups[-1]["params"]:
            return False
        weight, (_, of_weight) = state["state_dict_softmax_fc"]["weight"], _optimizer_state_of_weight(state)
        parts = {name: value for name, value in of_weight.items() if torch.is_tensor(value) and value.dim()}
        fit = torch.is_tensor(weight) and weight.dim() == 2 and all(part.shape == weight.shape for part in parts.values())
        return fit and {name: (part.dtype, part.shape[1]) for name, part in {**parts, "weight": weight}.items()}
    for path, state in zip(paths, states, strict=True):
        if not form(state) or form(state) != form(states[0]):
            raise CheckpointError(f"{path}: the weights of its classes and their optimizer state do not fit together, or do "
                                  f"not fit those in {paths[0].name}")


def _optimizer_state_of_weight(state: States) -> tuple[int, dict[str, Any]]:
    """Number and optimizer state of the head's only parameter, which is the last one."""
    number = state["state_optimizer"]["param_groups"][-1]["params"][-1]
    return number, state["state_optimizer"]["state"].get(number, {})


def _join(states: Sequence[States]) -> dict[str, Tensor]:
    """The weights of all classes and their optimizer state, {name: (N, D)}."""
    parts = [_optimizer_state_of_weight(state)[1] | state["state_dict_softmax_fc"] for state in states]
    return {name: torch.cat([part[name] for part in parts]) for name, value in parts[0].items()
            if torch.is_tensor(value) and value.dim()}


def _split(state: States, whole: Mapping[str, Tensor], rank: int, num_ranks: int) -> States:
    """The entries of a rank's checkpoint that hold its part of ``whole``. Splits as Partial FC does."""
    if not whole:
        head = state["state_dict_softmax_fc"]
        return {"state_dict_softmax_fc": head | _own_kept_weights(head, rank, num_ranks)}
    part = {name: value.tensor_split(num_ranks)[rank].clone() for name, value in whole.items()}
    weight = part.pop("weight")
    optimizer = state["state_optimizer"]
    number, of_weight = _optimizer_state_of_weight(state)
    of_all = optimizer["state"] | ({number: of_weight | part} if of_weight else {})
    return {"state_dict_softmax_fc": {"weight": weight}, "state_optimizer": optimizer | {"state": of_all}}


def _own_kept_weights(head: States, rank: int, num_ranks: int) -> dict[str, Tensor]:
    """A rank's kept weights, as ``KeptWeights`` saves them; {} if the head has none."""
    if _KEPT not in head or not rank:
        return {}
    first, end = Shard(rank, num_ranks).range_of(head[_KEPT].size(1))
    return {_KEPT: head[_KEPT][:, first:end].clone()}


def _rescale_steps(state: States, before: int, after: int) -> States:
    """The checkpoint with its steps counted for ``after`` ranks instead of ``before``."""
    epoch, step = state["epoch"], state["global_step"]
    if before == after or not epoch:
        return dict(state)
    head = state["state_dict_softmax_fc"]
    per_epoch = step // epoch

    def steps(count: int) -> int:
        return round(count / per_epoch * (per_epoch * before // after))
    schedule = {name: steps(value) if name in COUNTERS else value for name, value in state["state_lr_scheduler"].items()}
    if "_extra_state" in head:  # F²C's own step counter, which drives its schedule
        head = head | {"_extra_state": torch.tensor(steps(step))}
    return state | {"global_step": steps(step), "state_lr_scheduler": schedule, "state_dict_softmax_fc": head}
