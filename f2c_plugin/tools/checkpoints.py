"""What is in a checkpoint, of either host, and turning arcface_torch's, a file a rank, into those of another number of ranks."""

import re
from pathlib import Path

import torch

from f2c_plugin.errors import CheckpointError
from f2c_plugin.trainer.checkpoint import FORMAT
from f2c_plugin.utils.safe_load import load_states
from f2c_plugin.utils.atomic import written_whole
from f2c_plugin.method.pool import NOT_IN_POOL

_HOST_KEYS = ("epoch", "global_step", "state_dict_backbone", "state_dict_softmax_fc", "state_optimizer", "state_lr_scheduler")
_HOST_NAME = "checkpoint_gpu_{}.pt"


def describe(path) -> list[tuple[str, str]]:
    """What a checkpoint holds, as lines of (what, finding).

    Raises:
        CheckpointError: the file is no whole checkpoint of either host.
    """
    path = Path(path)
    saved = load_states(path)
    if saved.get("format") == FORMAT:
        settings = saved["settings"]
        told = [("written by", "f2c_plugin.train"), ("step", f"{saved['step']:,}"), ("images seen", f"{saved['images']:,}"),
                ("ranks", f"{saved['layout'][0]} with {saved['layout'][1]} images each"),
                ("training", f"{settings.get('head')}, {settings.get('network')}, lr {settings.get('lr')}")]
        net, head = saved["backbone"], saved["head"]
    elif saved.keys() >= set(_HOST_KEYS):
        told = [("written by", "arcface_torch"), ("epochs done", f"{saved['epoch']}"), ("step", f"{saved['global_step']:,}")]
        net, head = saved["state_dict_backbone"], saved["state_dict_softmax_fc"]
    else:
        raise CheckpointError(f"{path}: not a checkpoint of arcface_torch or f2c_plugin.train; it holds {', '.join(map(str, saved))}")
    told.append(("probe net", f"{sum(value.numel() for value in net.values()):,} numbers{_not_finite(net)}"))
    return [("checkpoint", str(path)), *told, ("head", _describe_head(head) + _not_finite(head))]


def _describe_head(head):
    if "pool.rows" in head:
        _, slots, size = head["pool.rows"].shape
        taken = (head["pool.slot_identity"] != NOT_IN_POOL).sum().item()
        return f"F²C, {slots:,} slots of 2 × {size}, {taken:,} taken, {head['pool.clock'].item():,} writes"
    if head.keys() == {"weight"}:
        classes, size = head["weight"].shape
        return f"weights of {classes:,} classes × {size}"
    return f"{len(head)} tensors of an unknown head"


def _not_finite(state):
    bad = sum((~value.isfinite()).sum().item() for value in state.values() if torch.is_tensor(value))
    return f", {bad:,} of them NOT FINITE" if bad else ""


def merge(folder, out, num_ranks: int) -> list[Path]:
    """Turn the ``checkpoint_gpu_*.pt`` of a training by arcface_torch into files for another number of ranks.

    F²C's pool is the same on all ranks and is copied. Partial FC's weights, and what the optimizer
    knows of them, are put together and shared out anew. Steps are counted for the same batch size per
    GPU: an epoch has fewer of them with more ranks.

    Args:
        folder: of the files of all ranks.
        out: where the new ones go.
        num_ranks: how many there are to be.
    Returns:
        The files written.
    Raises:
        CheckpointError: a file is missing, damaged or of another moment than the others, the pools
            differ, or the head is unknown.
        FileExistsError: there is a checkpoint in ``out`` already.
    """
    folder, out = Path(folder), Path(out)
    if num_ranks < 1:
        raise CheckpointError(f"--ranks {num_ranks}: must be at least 1")
    found = {int(match[1]): path for path in folder.glob(_HOST_NAME.format("*"))
             if (match := re.fullmatch(r"checkpoint_gpu_(\d+)\.pt", path.name))}
    lacking = [_HOST_NAME.format(rank) for rank in range(max(found, default=0) + 1) if rank not in found]
    if lacking:
        raise CheckpointError(f"{folder}: lacks {', '.join(lacking)}: the files of all ranks are needed")
    paths = [found[rank] for rank in sorted(found)]
    states = [load_states(path) for path in paths]
    for path, state in zip(paths, states):
        if not state.keys() >= set(_HOST_KEYS):
            raise CheckpointError(f"{path}: not a checkpoint of arcface_torch")
        if (state["epoch"], state["global_step"]) != (states[0]["epoch"], states[0]["global_step"]):
            raise CheckpointError(f"{path}: is of step {state['global_step']}, but {paths[0].name} of "
                                  f"{states[0]['global_step']}: they are not of one moment")
    if exists := [path for rank in range(num_ranks) if (path := out / _HOST_NAME.format(rank)).exists()]:
        raise FileExistsError(f"{exists[0]} exists and is not overwritten: choose another folder or remove it")

    heads = [state["state_dict_softmax_fc"] for state in states]
    if "pool.rows" in heads[0]:
        _require_same_pools(heads, paths)
        shared = {}
    elif all(head.keys() == {"weight"} for head in heads):
        shared = _whole(states)
    else:
        raise CheckpointError(f"{paths[0]}: {_describe_head(heads[0])}: how its ranks share it is not known")

    out.mkdir(parents=True, exist_ok=True)
    written = []
    for rank in range(num_ranks):
        new = _recounted(states[0], len(states), num_ranks) | _share(states[0], shared, rank, num_ranks)
        written.append(out / _HOST_NAME.format(rank))
        with written_whole(written[-1]) as file:
            torch.save(new, file)
    return written


def _require_same_pools(heads, paths):
    for head, path in zip(heads, paths):
        for name, value in heads[0].items():
            if name.startswith("pool.") and not torch.equal(value, head.get(name, torch.empty(0))):
                raise CheckpointError(f"{path}: its {name} is not that of {paths[0].name}: the ranks' pools have drifted apart")


def _of_weight(state):
    """What the optimizer keeps for the head's one parameter, the last of all, {name: value}, and its number."""
    number = state["state_optimizer"]["param_groups"][-1]["params"][-1]
    return number, state["state_optimizer"]["state"].get(number, {})


def _whole(states):
    """The weights of all classes, and what the optimizer keeps of each, {name: (N, D)}."""
    whole = {"weight": torch.cat([state["state_dict_softmax_fc"]["weight"] for state in states])}
    for name, value in _of_weight(states[0])[1].items():
        if torch.is_tensor(value) and value.dim():
            whole[name] = torch.cat([_of_weight(state)[1][name] for state in states])
    return whole


def _share(state, shared, rank, num_ranks):
    """The entries of a checkpoint that hold a rank's share of what is shared."""
    if not shared:
        return {}
    mine = {name: value.tensor_split(num_ranks)[rank].clone() for name, value in shared.items()}  # split as Partial FC does
    number, kept = _of_weight(state)
    optimizer = state["state_optimizer"]
    kept = kept | {name: value for name, value in mine.items() if name in kept}
    of_all = optimizer["state"] | ({number: kept} if kept else {})
    return {"state_dict_softmax_fc": {"weight": mine["weight"]}, "state_optimizer": optimizer | {"state": of_all}}


def _recounted(state, before, after):
    """The checkpoint with its steps counted for another number of ranks."""
    epoch, step = state["epoch"], state["global_step"]
    if before == after or not epoch:
        return dict(state)
    head = state["state_dict_softmax_fc"]
    per_epoch = step // epoch
    schedule = dict(state["state_lr_scheduler"])

    def steps(count):
        return round(count / per_epoch * (per_epoch * before // after))
    for name in "last_epoch", "total_iters", "warmup_iters", "_step_count":
        if name in schedule:
            schedule[name] = steps(schedule[name])
    if "_extra_state" in head:  # F²C's own count of steps, by which its recipe goes
        head = type(head)(head) | {"_extra_state": torch.tensor(steps(step))}
    return state | {"global_step": steps(step), "state_lr_scheduler": schedule, "state_dict_softmax_fc": head}
