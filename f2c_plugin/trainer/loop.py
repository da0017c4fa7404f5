"""The training: a state, a step, a loop."""

import json
import logging
import os
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, distributed, nn

from f2c_plugin.config import F2CConfig, TrainConfig, unused_keys
from f2c_plugin.data.dataset import normalize_faces
from f2c_plugin.data.from_config import steps_per_epoch, training_device
from f2c_plugin.data.loader import DualLoader
from f2c_plugin.data.sampler import DualSampler
from f2c_plugin.evaluation.model_selection import Results, select_net
from f2c_plugin.evaluation.onnx_export import export_checked, unusable
from f2c_plugin.evaluation.verification import VerificationSet
from f2c_plugin.initial import initialize
from f2c_plugin.method.gallery import GalleryNet, gallery_nets
from f2c_plugin.models import get_model
from f2c_plugin.trainer import build
from f2c_plugin.trainer.bad_steps import BadSteps
from f2c_plugin.trainer.checkpoint import Checkpoints, save_due
from f2c_plugin.trainer.logger import TrainingLog
from f2c_plugin.trainer.output import sole_user, write_states
from f2c_plugin.trainer.signals import Request, Requests, Stopped, listening
from f2c_plugin.utils.atomic import written_whole

log = logging.getLogger(__name__)

MAX_GRADIENT_NORM = 5  # arcface_torch's


@dataclass
class TrainState:
    """Everything that a training step works on.

    Attributes:
        backbone: the probe net, in DDP where there are several ranks.
        net: the probe net itself.
        head: from (embeddings, labels) to the loss.
        step: batches done.
        total_steps: of the whole training.
    """

    cfg: TrainConfig
    backbone: nn.Module
    net: nn.Module
    head: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    total_steps: int
    step: int = 0
    bad_steps: BadSteps = field(init=False)

    @property
    def nets(self) -> dict[str, nn.Module]:
        """The nets to verify, by name."""
        return getattr(self.head, "nets", {"probe": self.net})

    @property
    def between_optimizer_steps(self) -> bool:
        """Whether gradients of the batches so far are yet to be applied: a checkpoint would lose them."""
        return self.step % self.cfg.gradient_acc != 0 and self.step != self.total_steps

    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds the state of."""
        return dict(backbone=self.net, head=getattr(self.head, "module", self.head), optimizer=self.optimizer,
                    scaler=self.scaler)


def build_state(cfg: TrainConfig, device: torch.device, total_steps: int) -> TrainState:
    """Nets, head and optimizer, before ``f2c_init`` or a checkpoint is loaded."""
    net = get_model(cfg.network, cfg.embedding_size, fp16=cfg.fp16).to(device)
    net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # faster, and the same for every head
    backbone = build.wrap(net).train()
    factory = build.head_factory(cfg.head)
    factory = getattr(factory, "without_init", factory)  # f2c_init is loaded once it is clear whether the training resumes
    head = factory(cfg, backbone, build.margin_loss(cfg)).train()
    optimizer = build.build_optimizer(cfg, [{"params": backbone.parameters()}, {"params": head.parameters()}])
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.fp16, growth_interval=100)
    state = TrainState(cfg, backbone, net, head, optimizer, scaler, total_steps)
    nets = dict.fromkeys([*state.nets.values(), *gallery_nets(head)])  # those of loss terms are not verified
    state.bad_steps = BadSteps(cfg.get("f2c_max_bad_steps", F2CConfig.max_bad_steps), nets)
    return state


def train_step(state: TrainState, images: Tensor, labels: Tensor) -> Tensor:
    """One batch: forward, backward and, every ``gradient_acc`` batches, a step of the optimizer. Returns the loss."""
    for group in state.optimizer.param_groups:
        group["lr"] = build.learning_rate(state.cfg, state.step, state.total_steps)
    state.step += 1
    loss = state.head(state.backbone(images), labels)
    state.scaler.scale(loss).backward()
    if state.step % state.cfg.gradient_acc == 0:
        state.scaler.unscale_(state.optimizer)
        norm = nn.utils.clip_grad_norm_(state.backbone.parameters(), MAX_GRADIENT_NORM)
        bad = state.bad_steps.update(state.step, norm)
        if not state.cfg.fp16:
            state.optimizer.found_inf = bad  # pyright: ignore[reportAttributeAccessIssue]  # it then skips the step, without a wait
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad()
    return loss.detach()


def train(cfg: TrainConfig) -> dict[str, Any]:
    """Run one training and return the report that also goes to ``report.json``; {} on ranks other than 0.

    Every rank calls this, with the process group set up; see ``process_group``. It ends in an error unless
    model.pt, model.onnx, report.json and history.jsonl are whole and the model is finite.

    Args:
        cfg: a config as ``load_config`` returns it.
    Raises:
        F2CError: the config, the data or the checkpoints are wrong, the training diverged, or another one is at
            work in ``config.output``.
        OSError: a file cannot be written; names it.
        Stopped: a signal has ended it.
    """
    with sole_user(Path(cfg.output), distributed.get_rank()), listening() as requests:
        return _train(cfg, requests)


def _train(cfg: TrainConfig, requests: Requests) -> dict[str, Any]:
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    build.seed_everything(cfg.seed)
    torch.backends.cudnn.benchmark = True  # all batches have one shape
    loader = build.build_loader(cfg, build.head_factory(cfg.head), local_rank)
    sets = build.verification_sets(cfg)
    num_steps = steps_per_epoch(cfg, world_size)
    state = build_state(cfg, training_device(local_rank), num_steps * cfg.num_epoch)

    checkpoints = Checkpoints(cfg, state.parts(), cast(DualSampler, loader.sampler))
    state.step, seconds = checkpoints.begin()
    initialize(cfg, state.net, state.head, resumed=bool(checkpoints.good))
    state.bad_steps.keep()
    if cfg.save_all_states or cfg.get("f2c_save_every"):
        checkpoints.require_room()
    for line in unused_keys(cfg):
        log.warning("%s", line)
    for key, value in cfg.items():
        log.info(": %-24s %s", key, value)  # as arcface_torch does, for whoever reads its log

    training_log = TrainingLog(cfg, state.total_steps, state.step) if rank == 0 else None
    begin = time.perf_counter() - seconds
    _run(state, loader, num_steps, sets, checkpoints, training_log, requests, begin)
    seconds = time.perf_counter() - begin
    if training_log is None:
        return {}
    results = training_log.verify(state.step, state.nets, sets)
    _require_usable(state, checkpoints, results)
    report = _finish(state, results, state.step * cfg.batch_size * world_size, seconds, sets)
    training_log.close()
    return report


def _run(state: TrainState, loader: DualLoader, num_steps: int, sets: dict[str, VerificationSet], checkpoints: Checkpoints,
         training_log: TrainingLog | None, requests: Requests, begin: float) -> None:
    """All epochs, from ``state.step`` on. ``begin`` is when the first began."""
    cfg = state.cfg
    save_is_due = False
    with requests.in_steps():
        for epoch in range(state.step // num_steps, cfg.num_epoch):
            cast(DualSampler, loader.sampler).set_epoch(epoch, state.step % num_steps)
            for images, labels in loader:
                requests.ask()
                loss = train_step(state, images, labels)
                if training_log:
                    training_log.update(state.step, loss, state.optimizer.param_groups[0]["lr"], state.head)
                    if state.step % cfg.verbose == 0 and state.step < state.total_steps:
                        state.bad_steps.settle()
                        training_log.verify(state.step, state.nets, sets)
                request = requests.agreed()
                save_is_due |= save_due(cfg, state.step, num_steps, state.total_steps)
                if not (request or save_is_due):
                    continue
                state.bad_steps.settle()
                if state.between_optimizer_steps or state.bad_steps.in_a_row:
                    continue  # what is due waits
                checkpoints.save(state.step, time.perf_counter() - begin)
                save_is_due = False
                requests.done()
                if request is Request.SAVE_AND_STOP:
                    raise Stopped(f"stopped by a signal after step {state.step}, which is saved: resume=True goes on from it")
            state.bad_steps.settle()
            if training_log:
                _require_usable(state, checkpoints)
                write_states(state.net.state_dict(), Path(cfg.output) / "model.pt")


def _require_usable(state: TrainState, checkpoints: Checkpoints, results: Results | None = None) -> None:
    """Raise TrainingDiverged if a net is not finite, or embeds faces in what is not finite: it must not become model.pt."""
    found = [f"{which} net: {name}" for which, net in state.nets.items() for name in unusable(net)]
    found += [f"{which} net: its embeddings of {name}" for which, of_net in (results or {}).items()
              for name, result in of_net.items() if not np.isfinite(result.scores).all()]
    if found:
        raise checkpoints.diverged(found, state.step)


def _finish(state: TrainState, results: Results, images_seen: int, seconds: float,
            sets: dict[str, VerificationSet]) -> dict[str, Any]:
    """Write model.pt and model.onnx of the selected net, and report.json."""
    cfg, folder = state.cfg, Path(state.cfg.output)
    nets = state.nets
    which = select_net(cfg.get("f2c_export", "probe") if "gallery" in nets else "probe", results)
    net = cast(GalleryNet, nets["gallery"]).net if which == "gallery" else nets["probe"]
    write_states(net.state_dict(), folder / "model.pt")
    exported = get_model(cfg.network, cfg.embedding_size)  # in float32, and without hooks
    exported.load_state_dict(net.state_dict())
    faces = next((normalize_faces(each.faces(64)) for each in sets.values()), None)
    cosine = export_checked(exported, folder / "model.onnx", faces)
    summaries = {name: result.summary() for name, result in results[which].items()}
    report: dict[str, Any] = dict(
        head=cfg.head, network=cfg.network, exported=which, images_seen=images_seen, seconds=round(seconds, 1),
        peak_mb=round(_peak_memory() / 2**20), verification=next(iter(summaries.values()), None), verification_sets=summaries)
    if sets:
        report["onnx_cosine"] = cosine
    with written_whole(folder / "report.json") as file:
        file.write((json.dumps(report, indent=2) + "\n").encode())
    log.info("model.pt, model.onnx and report.json are in %s", folder)
    return report


def _peak_memory() -> int:
    """Peak bytes of this rank: on its GPU, or of the process without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
