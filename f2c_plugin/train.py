"""The built-in host: trains by arcface_torch's config files, with its heads and loaders, on CPU or GPU.

    python -m f2c_plugin.train CONFIG
    torchrun --nproc_per_node=N -m f2c_plugin.train CONFIG

``config.head`` is the name of an installed head ("f2c_dcp"), or "softmax" for the full FC layer.
Into ``config.output`` go training.log, TensorBoard scalars, history.jsonl, model.pt, model.onnx,
verification scores and report.json.
"""

import argparse
import json
import logging
import os
import pickle
import random
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import distributed, nn
from tqdm import tqdm

from f2c_plugin.backbones import get_model
from f2c_plugin.config import ConfigError, load_config
from f2c_plugin.data import RecordError
from f2c_plugin.data.dataset import normalize_faces
from f2c_plugin.host.entry_points import record_loader, steps_per_epoch, training_device
from f2c_plugin.health import tensorboard_writer
from f2c_plugin.host.plugins import HEADS, SAMPLERS, UnknownPlugin, load_plugin
from f2c_plugin.loss import Margin
from f2c_plugin.softmax import SoftmaxHead
from f2c_plugin.tools.export import ExportError, export_onnx, onnx_cosine, require_same_embedding
from f2c_plugin.tools.verification import VerificationSet, VerificationSetError

MAX_GRADIENT_NORM = 5  # the host's


def softmax(cfg, backbone, margin_loss):
    """Head factory of the full FC layer."""
    head = SoftmaxHead(cfg.embedding_size, cfg.num_classes, Margin.of_host(margin_loss))
    head.to(next(backbone.parameters()).device)
    return _wrap(head)


BUILT_IN_HEADS = {"softmax": softmax}


def _head_factory(name):
    if name is None:
        raise ConfigError("head is not set, and the built-in host has no Partial FC: set head='f2c_dcp', or 'softmax' "
                          "for the full FC layer")
    return BUILT_IN_HEADS[name] if name in BUILT_IN_HEADS else load_plugin(HEADS, name)


def images_once(cfg, local_rank):
    """Loader factory of plain training: every image once a pass."""
    return record_loader(cfg, local_rank, identity_rate=0.0)


def train(cfg) -> dict:
    """Run one training and return the report that also goes to ``report.json``.

    Every rank calls this, with the process group set up; see ``process_group``.

    Args:
        cfg: a config as ``load_config`` returns it.
    Raises:
        ConfigError, RecordError, VerificationSetError: the config or the data are wrong.
        UnknownPlugin: an unknown head or sampler.
    """
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = training_device(local_rank)
    _seed(cfg.seed)

    head_factory = _head_factory(cfg.head)
    sampler = cfg.sampler or getattr(head_factory, "sampler", None)
    loader = (load_plugin(SAMPLERS, sampler) if sampler else images_once)(cfg, local_rank)
    if cfg.get("f2c_export") == "best" and not cfg.val_targets:
        raise ConfigError("f2c_export='best', but val_targets is empty: name a verification set to choose by")
    verification_sets = {name: VerificationSet(Path(cfg.rec) / f"{name}.bin") for name in cfg.val_targets}

    net = get_model(cfg.network, cfg.embedding_size, fp16=cfg.fp16).to(device)
    backbone = _wrap(net).train()
    head = head_factory(cfg, backbone, _margin_loss(cfg)).train()
    optimizer = _optimizer(cfg, [{"params": backbone.parameters()}, {"params": head.parameters()}])
    total_steps = steps_per_epoch(cfg, world_size) * cfg.num_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _learning_rate(cfg, total_steps))
    # The schedule counts batches, as the host's does, so with gradient_acc it steps before the optimizer.
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.fp16, growth_interval=100)

    parts = dict(backbone=net, head=head, optimizer=optimizer, schedule=schedule, scaler=scaler)
    state = _Checkpoint(cfg, rank, world_size, parts)
    start_epoch, step, seconds = state.load() if cfg.resume else (0, 0, 0.0)

    nets = {"": net}  # what is verified, by what precedes its name in the log
    if hasattr(head, "gallery"):
        nets["gallery_"] = head.gallery
    for key, value in cfg.items():
        logging.info(": %-24s %s", key, value)  # as the host does, for who reads its log
    log = _Log(cfg, total_steps, step) if rank == 0 else None
    begin = time.perf_counter() - seconds
    for epoch in range(start_epoch, cfg.num_epoch):
        loader.sampler.set_epoch(epoch)
        for images, labels in loader:
            step += 1
            loss = head(backbone(images), labels)
            scaler.scale(loss).backward()
            if step % cfg.gradient_acc == 0:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(backbone.parameters(), MAX_GRADIENT_NORM)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            learning_rate = schedule.get_last_lr()[0]
            schedule.step()
            if log:
                log.step(step, loss, learning_rate, head)
                if step % cfg.verbose == 0 and step < total_steps:
                    log.verify(step, nets, verification_sets)
        if cfg.save_all_states:
            state.save(epoch + 1, step, time.perf_counter() - begin)
        if rank == 0:
            torch.save(net.state_dict(), Path(cfg.output) / "model.pt")

    if rank != 0:
        return {}
    seconds = time.perf_counter() - begin
    results = log.verify(step, nets, verification_sets)
    log.close()
    return _finish(cfg, nets, results, step * cfg.batch_size * world_size, seconds, verification_sets)


@contextmanager
def process_group():
    """Joins the ranks that torchrun started, or makes a group of this process alone."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ:
        distributed.init_process_group(backend)
    else:
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _wrap(module):
    if distributed.get_world_size() == 1:
        return module
    device = next(module.parameters()).device
    return nn.parallel.DistributedDataParallel(module, [device.index] if device.type == "cuda" else None,
                                               broadcast_buffers=False)


def _seed(seed):
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def _margin_loss(cfg):
    """What head factories read of the host's CombinedMarginLoss."""
    if len(cfg.margin_list) != 3:
        raise ConfigError(f"margin_list={cfg.margin_list}: must be three numbers, (m1, m2, m3)")
    m1, m2, m3 = cfg.margin_list
    return SimpleNamespace(s=cfg.scale, m1=m1, m2=m2, m3=m3,
                           interclass_filtering_threshold=cfg.interclass_filtering_threshold)


def _optimizer(cfg, groups):
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(groups, cfg.lr, cfg.momentum, weight_decay=cfg.weight_decay)
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(groups, cfg.lr, weight_decay=cfg.weight_decay)
    raise ConfigError(f"optimizer={cfg.optimizer!r}: must be 'sgd' or 'adamw'")


def _learning_rate(cfg, total_steps):
    """The host's schedule as a factor of ``lr``: linear warm-up, then linear to 0."""
    warmup = total_steps // cfg.num_epoch * cfg.warmup_epoch

    def factor(step):
        return (step + 1) / warmup if step < warmup else (total_steps - step) / max(total_steps - warmup, 1)
    return factor


class _Checkpoint:
    """All states of a rank after an epoch, as the host's ``save_all_states`` keeps them."""

    # Another value of one of these is another training: the schedule, the head or the net would not fit.
    SETTINGS = ("head", "network", "embedding_size", "num_classes", "num_image", "batch_size", "f2c_pool_rate")

    def __init__(self, cfg, rank, world_size, parts):
        self.path, self.parts = Path(cfg.output) / f"checkpoint_gpu_{rank}.pt", parts
        self.settings = {key: cfg.get(key) for key in self.SETTINGS} | {"number of ranks": world_size}

    def save(self, epoch, step, seconds):
        states = {name: part.state_dict() for name, part in self.parts.items()}
        partial = self.path.with_suffix(".partial")
        torch.save({"epoch": epoch, "global_step": step, "seconds": seconds, "settings": self.settings, **states}, partial)
        os.replace(partial, self.path)

    def load(self):
        """(epoch to go on with, steps done, seconds spent)."""
        if not self.path.is_file():
            raise ConfigError(f"resume=True, but there is no {self.path}: train with save_all_states=True on as many "
                              "ranks first, or set resume=False")
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            lacking = {"settings", "epoch", "global_step", "seconds", *self.parts} - saved.keys()
        except (RuntimeError, EOFError, OSError, AttributeError, pickle.UnpicklingError) as error:
            raise ConfigError(f"resume=True, but {self.path} is damaged or no checkpoint ({str(error).splitlines()[:1]}): take "
                              "another rank's, or set resume=False") from error
        if lacking:
            raise ConfigError(f"resume=True, but {self.path} is no checkpoint of f2c_plugin.train: it lacks "
                              f"{', '.join(sorted(lacking))}; set resume=False")
        changed = [f"{key} was {saved['settings'].get(key)} and is now {value}"
                   for key, value in self.settings.items() if saved["settings"].get(key) != value]
        if changed:
            raise ConfigError(f"resume=True, but {self.path} is of another training: {', '.join(changed)}; "
                              "set them back, or set resume=False")
        for name, part in self.parts.items():
            try:
                part.load_state_dict(saved[name])
            except (ValueError, RuntimeError) as error:
                raise ConfigError(f"resume=True, but the {name} in {self.path} cannot be used: {error}") from error
        return saved["epoch"], saved["global_step"], saved["seconds"]


class _Log:
    """What rank 0 tells: progress bar, training.log, TensorBoard and history.jsonl."""

    def __init__(self, cfg, total_steps, step):
        self.cfg = cfg
        self.images_per_step = cfg.batch_size * distributed.get_world_size()
        self.folder = Path(cfg.output)
        self.history = open(self.folder / "history.jsonl", "a" if cfg.resume else "w")
        if not cfg.resume:  # a run's scalars do not mix with those of the run it replaces
            for events in (self.folder / "tensorboard").glob("events.out.tfevents.*"):
                events.unlink()
        self.writer = tensorboard_writer(self.folder / "tensorboard")
        self.bar = tqdm(total=total_steps, initial=step, unit="step", disable=None, file=sys.stdout)
        self._start_interval(step)

    def _start_interval(self, step):
        self.losses = []
        self.since, self.start = step, time.perf_counter()

    def step(self, step, loss, learning_rate, head):
        self.losses.append(loss.detach())
        self.bar.update()
        if step % self.cfg.frequent:
            return
        seconds = time.perf_counter() - self.start
        scalars = {"loss": torch.stack(self.losses).mean().item(), "learning_rate": learning_rate,
                   "images_per_second": (step - self.since) * self.images_per_step / seconds}
        if not np.isfinite(scalars["loss"]):
            logging.warning("the loss is %s at step %d: a smaller lr, or fp16=False, may help", scalars["loss"], step)
        health = getattr(head, "health", None)
        self._record(step, scalars, health.scalars if health else {})
        self.bar.set_postfix(loss=f"{scalars['loss']:.3f}")
        logging.info("step %d: %s", step, "  ".join(f"{name} {value:.4g}" for name, value in scalars.items()))
        self._start_interval(step)

    def verify(self, step, nets, verification_sets):
        """Results of every net of ``nets`` on every set, {which net: {set: result}}."""
        results = {which: {} for which in nets}
        begin = time.perf_counter()
        for name, verification_set in verification_sets.items():
            scalars = {}
            for which, net in nets.items():
                results[which][name] = result = verification_set.evaluate(net)
                np.savez(self.folder / f"{which}{name}_scores.npz", scores=result.scores, same=result.same)
                scalars |= {f"{name}/{which}accuracy": result.accuracy,
                            f"{name}/{which}tar_at_far_1e-3": result.tar_at_far(1e-3)}
                logging.info("[%s%s][%d] Accuracy-Flip: %.5f+-%.5f  TAR at FAR 1e-3: %.4f  XNorm: %.3f", which, name, step,
                             result.accuracy, result.accuracy_std, result.tar_at_far(1e-3), result.embedding_norm)
            self._record(step, scalars)
        self.start += time.perf_counter() - begin  # verification is not training
        return results

    def _record(self, step, scalars, of_head={}):
        """Into the history, and what the head has not written itself to TensorBoard."""
        finite = {name: value for name, value in (scalars | of_head).items() if np.isfinite(value)}
        self.history.write(json.dumps({"step": step, "images": step * self.images_per_step, **finite}) + "\n")
        self.history.flush()
        if self.writer:
            for name in scalars.keys() & finite.keys():
                self.writer.add_scalar(name, finite[name], step)

    def close(self):
        self.bar.close()
        self.history.close()
        if self.writer:
            self.writer.close()


def _finish(cfg, nets, results, images_seen, seconds, verification_sets):
    """Write model.pt and model.onnx of the net that is to be shipped, and report.json."""
    folder = Path(cfg.output)
    which = _to_ship(cfg, results)
    net = nets[which].net if which else nets[which]
    torch.save(net.state_dict(), folder / "model.pt")
    exported = get_model(cfg.network, cfg.embedding_size)  # in float32, and without what hangs on the trained one
    exported.load_state_dict(net.state_dict())
    export_onnx(exported, folder / "model.onnx")
    summaries = {name: result.summary() for name, result in results[which].items()}
    report = {"head": cfg.head, "network": cfg.network, "exported": "gallery" if which else "probe",
              "images_seen": images_seen, "seconds": round(seconds, 1),
              "verification": next(iter(summaries.values()), None), "verification_sets": summaries}
    cosine = None
    for verification_set in list(verification_sets.values())[:1]:
        cosine = onnx_cosine(exported, folder / "model.onnx", normalize_faces(verification_set.faces(64)))
        report["onnx_cosine"] = cosine if cosine is None or np.isfinite(cosine) else "not a number"
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    logging.info("model.pt, model.onnx and report.json are in %s", folder)
    require_same_embedding(cosine, folder / "model.onnx")
    return report


def _to_ship(cfg, results):
    """Which of the nets ``config.f2c_export`` chooses."""
    wanted = cfg.get("f2c_export", "probe") if len(results) > 1 else "probe"
    if wanted != "best":
        return "gallery_" if wanted == "gallery" else ""
    first = {which: next(iter(of_net.values())) for which, of_net in results.items()}
    return max(first, key=lambda which: (first[which].accuracy, first[which].tar_at_far(1e-3)))


class _TqdmHandler(logging.Handler):
    """Log lines above the progress bar instead of through it."""

    def emit(self, record):
        tqdm.write(self.format(record), file=sys.stdout)


def _init_logging(folder, resume):
    folder.mkdir(parents=True, exist_ok=True)
    handlers = [_TqdmHandler(), logging.FileHandler(folder / "training.log", "a" if resume else "w")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers, force=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m f2c_plugin.train", description=__doc__.split("\n")[0])
    parser.add_argument("config", help="path of a config file, or the name of one that comes with the package")
    try:
        cfg = load_config(parser.parse_args(arguments).config)
        with process_group():
            if distributed.get_rank() == 0:
                _init_logging(Path(cfg.output), cfg.resume)
            train(cfg)
    except (ConfigError, RecordError, VerificationSetError, UnknownPlugin, ExportError, OSError) as error:
        sys.exit(f"f2c_plugin.train: {error}")
    except KeyboardInterrupt:
        sys.exit("f2c_plugin.train: interrupted. With save_all_states=True the last whole epoch is kept, and resume=True "
                 "goes on from there")


if __name__ == "__main__":
    main()
