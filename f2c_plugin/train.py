"""The built-in host: trains by arcface_torch's config files, with its heads and loaders, on CPU or GPU.

    python -m f2c_plugin.train CONFIG
    torchrun --nproc_per_node=N -m f2c_plugin.train CONFIG

``config.head`` is the name of an installed head ("f2c_dcp"), or "softmax" for the full FC layer.
Into ``config.output`` go training.log, TensorBoard scalars, history.jsonl, model.pt, model.onnx,
verification scores and report.json, and checkpoints. SIGUSR1 saves one, SIGTERM saves one and stops.
"""

import argparse
import json
import logging
import os
import random
import resource
import signal
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import distributed, nn
from tqdm import tqdm

from f2c_plugin.backbones import get_model
from f2c_plugin.checkpoint import CheckpointError, Checkpoints, checkpoints_in
from f2c_plugin.config import HOST_DEFAULTS, ConfigError, F2CConfig, bad_keys, load_config, problems
from f2c_plugin.data import RecordError
from f2c_plugin.data.dataset import normalize_faces
from f2c_plugin.files import written_whole
from f2c_plugin.health import NotLearning, tensorboard_writer
from f2c_plugin.host.entry_points import open_pack, record_loader, steps_per_epoch, training_device
from f2c_plugin.host.plugins import HEADS, SAMPLERS, UnknownPlugin, load_plugin
from f2c_plugin.host.shipping import PREFIX, verify, which_to_ship
from f2c_plugin.loss import Margin
from f2c_plugin.meeting import process_group
from f2c_plugin.signals import Request, Stopped, listening
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


def check(cfg, world_size: int = 1):
    """Try everything that the training is going to need, but for the other ranks.

    Args:
        cfg: a config as ``load_config`` returns it.
        world_size: number of ranks there will be.
    Raises:
        ConfigError: with a line for everything that is wrong: the key or file, the value found, the remedy.
    """
    found, bad = problems(cfg, world_size), bad_keys(cfg)
    rest = type(cfg)(cfg | {key: HOST_DEFAULTS[key] for key in bad.keys() & HOST_DEFAULTS.keys()})  # to judge a key by itself
    for keys, needed in ((["head"], lambda: _head_factory(cfg.head)),
                         (["sampler"], lambda: cfg.sampler and load_plugin(SAMPLERS, cfg.sampler)),
                         (["network"], lambda: _on_meta(get_model, rest.network, rest.embedding_size)),
                         (["margin_list"], lambda: Margin.of_host(_margin_loss(rest))),
                         (["optimizer"], lambda: _optimizer(rest, [torch.zeros(1)])),
                         (["num_image", "batch_size"], lambda: steps_per_epoch(cfg, world_size)),
                         (["rec", "num_classes", "num_image"], lambda: open_pack(cfg)),
                         (["rec", "val_targets"], lambda: _verification_sets(cfg))):
        if bad.keys().isdisjoint(keys):
            try:
                needed()
            except (ConfigError, RecordError, UnknownPlugin, OSError) as error:
                found += str(error).splitlines()
    if found:
        raise ConfigError("\n".join(found))


def _on_meta(make, *arguments):
    with torch.device("meta"):
        return make(*arguments)


def _verification_sets(cfg):
    if cfg.get("f2c_export") == "best" and not cfg.val_targets:
        raise ConfigError("f2c_export='best', but val_targets is empty: name a verification set to choose by")
    sets, wrong = {}, []
    for name in cfg.val_targets:
        try:
            sets[name] = VerificationSet(Path(cfg.rec) / f"{name}.bin")
        except VerificationSetError as error:
            wrong.append(f"val_targets names {name!r}: {error}")
    if wrong:
        raise ConfigError("\n".join(wrong))
    return sets


def train(cfg) -> dict:
    """Run one training and return the report that also goes to ``report.json``.

    Every rank calls this, with the process group set up; see ``process_group``.

    Args:
        cfg: a config as ``load_config`` returns it.
    Raises:
        ConfigError, RecordError: the config or the data are wrong.
        UnknownPlugin: an unknown head or sampler.
    """
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = training_device(local_rank)
    _seed(cfg.seed)

    head_factory = _head_factory(cfg.head)
    sampler = cfg.sampler or getattr(head_factory, "sampler", None)
    loader = (load_plugin(SAMPLERS, sampler) if sampler else images_once)(cfg, local_rank)
    verification_sets = _verification_sets(cfg)

    net = get_model(cfg.network, cfg.embedding_size, fp16=cfg.fp16).to(device)
    backbone = _wrap(net).train()
    head = head_factory(cfg, backbone, _margin_loss(cfg)).train()
    optimizer = _optimizer(cfg, [{"params": backbone.parameters()}, {"params": head.parameters()}])
    num_steps = steps_per_epoch(cfg, world_size)
    total_steps = num_steps * cfg.num_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _learning_rate(cfg, total_steps))
    # The schedule counts batches, as the host's does, so with gradient_acc it steps before the optimizer.
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.fp16, growth_interval=100)

    parts = dict(backbone=net, head=getattr(head, "module", head), optimizer=optimizer, scaler=scaler)
    checkpoints = Checkpoints(cfg, parts, loader.sampler)
    step, seconds = checkpoints.begin()
    if cfg.save_all_states or cfg.get("f2c_save_every"):
        checkpoints.require_room()
    _set_schedule(schedule, optimizer, step)

    nets = {"probe": net}  # what is verified
    if hasattr(head, "gallery"):
        nets["gallery"] = head.gallery
    for key, value in cfg.items():
        logging.info(": %-24s %s", key, value)  # as the host does, for who reads its log
    log = _Log(cfg, total_steps, step) if rank == 0 else None
    bad_steps = _BadSteps(cfg.get("f2c_max_bad_steps", F2CConfig.max_bad_steps), nets.values())
    save_is_due = False
    begin = time.perf_counter() - seconds
    with listening() as requests:
        for epoch in range(step // num_steps, cfg.num_epoch):
            loader.sampler.set_epoch(epoch, step % num_steps)
            for images, labels in loader:
                step += 1
                loss = head(backbone(images), labels)
                scaler.scale(loss).backward()
                if step % cfg.gradient_acc == 0:
                    scaler.unscale_(optimizer)
                    norm = nn.utils.clip_grad_norm_(backbone.parameters(), MAX_GRADIENT_NORM)
                    bad = bad_steps.see(step, norm)
                    if cfg.fp16 or not bad:  # a scaler has to know of bad steps, and skips them itself
                        scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()
                learning_rate = schedule.get_last_lr()[0]
                schedule.step()
                if log:
                    log.step(step, loss, learning_rate, head)
                    if step % cfg.verbose == 0 and step < total_steps:
                        log.verify(step, nets, verification_sets)
                request = requests.agreed()
                save_is_due |= _save_is_due(cfg, step, num_steps, total_steps)
                # Between two steps of the optimizer gradients would be lost: what is due waits.
                whole = (step % cfg.gradient_acc == 0 or step == total_steps) and not bad_steps.in_a_row
                if whole and (request or save_is_due):
                    checkpoints.save(step, time.perf_counter() - begin)
                    save_is_due = False
                    requests.done()
                if whole and request is Request.SAVE_AND_STOP:
                    raise Stopped(f"stopped by a signal after step {step}, which is saved: go on with resume=True")
            if rank == 0:
                save_net(net, Path(cfg.output) / "model.pt")

    if rank != 0:
        return {}
    seconds = time.perf_counter() - begin
    results = log.verify(step, nets, verification_sets)
    log.close()
    return _finish(cfg, nets, results, step * cfg.batch_size * world_size, seconds, verification_sets)


def _save_is_due(cfg, step, num_steps, total_steps):
    every = cfg.get("f2c_save_every")
    return bool(every and (step % every == 0 or step == total_steps) or cfg.save_all_states and step % num_steps == 0)


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
    m1, m2, m3 = cfg.margin_list
    return SimpleNamespace(s=cfg.scale, m1=m1, m2=m2, m3=m3,
                           interclass_filtering_threshold=cfg.interclass_filtering_threshold)


def _optimizer(cfg, groups):
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(groups, cfg.lr, cfg.momentum, weight_decay=cfg.weight_decay)
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(groups, cfg.lr, weight_decay=cfg.weight_decay)
    raise ConfigError(f"optimizer={cfg.optimizer!r}: must be 'sgd' or 'adamw'")


def _set_schedule(schedule, optimizer, step):
    """Put a schedule, which is a function of the step alone, to where ``step`` calls of its ``step()`` would."""
    schedule.last_epoch = step
    rates = [base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas)]
    schedule._last_lr = rates
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate


def _learning_rate(cfg, total_steps):
    """The host's schedule as a factor of ``lr``: linear warm-up, then linear to 0."""
    warmup = total_steps // cfg.num_epoch * cfg.warmup_epoch

    def factor(step):
        return (step + 1) / warmup if step < warmup else (total_steps - step) / max(total_steps - warmup, 1)
    return factor


class _BadSteps:
    """Steps whose gradient is not finite: they change nothing, are counted, and end the training if they do not end.

    Args:
        limit: so many in a row are too many (``config.f2c_max_bad_steps``).
        nets: whose BatchNorm statistics such a step would spoil.
    """

    def __init__(self, limit, nets):
        self.limit, self.in_a_row, self.in_all = limit, 0, 0
        self.buffers = [buffer for net in nets for buffer in net.buffers() if buffer.is_floating_point()]
        self.good = [buffer.clone() for buffer in self.buffers]

    def see(self, step, gradient_norm) -> bool:
        """Whether the step is bad.

        Raises:
            NotLearning: one too many.
        """
        if torch.isfinite(gradient_norm):
            self.in_a_row = 0
            torch._foreach_copy_(self.good, self.buffers)
            return False
        torch._foreach_copy_(self.buffers, self.good)
        self.in_a_row += 1
        self.in_all += 1
        logging.info("step %d is skipped, for its gradient is not finite (%d so far)", step, self.in_all)
        if self.in_a_row >= self.limit:
            raise NotLearning(f"the gradient was not finite in {self.in_a_row} steps in a row, up to step {step} "
                              f"(f2c_max_bad_steps={self.limit}): a smaller lr, or fp16=False, may help; the nets are as they "
                              "were before, and checkpoints stay")
        return True


class _Log:
    """What rank 0 tells: progress bar, training.log, TensorBoard and history.jsonl."""

    def __init__(self, cfg, total_steps, step):
        self.cfg = cfg
        self.images_per_step = cfg.batch_size * distributed.get_world_size()
        self.folder = Path(cfg.output)
        self._keep_history(step * self.images_per_step)
        self.history = open(self.folder / "history.jsonl", "a")
        if not step:  # a run's scalars do not mix with those of the run it replaces
            for events in (self.folder / "tensorboard").glob("events.out.tfevents.*"):
                events.unlink()
        self.writer = tensorboard_writer(self.folder / "tensorboard", step)
        self.bar = tqdm(total=total_steps, initial=step, unit="step", disable=None, file=sys.stdout)
        self._start_interval(step)

    def _keep_history(self, images):
        """Of what was told before, keep what was told up to ``images``: the rest comes again."""
        file = self.folder / "history.jsonl"
        told = file.read_text().splitlines(keepends=True) if images and file.is_file() else []
        with written_whole(file) as new:
            for line in told:
                if line.endswith("\n") and json.loads(line)["images"] <= images:
                    new.write(line.encode())

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
        begin = time.perf_counter()
        results = verify(nets, verification_sets, step, self.folder)
        for name in verification_sets:
            scalars = {}
            for which, of_net in results.items():
                scalars |= {f"{name}/{PREFIX[which]}accuracy": of_net[name].accuracy,
                            f"{name}/{PREFIX[which]}tar_at_far_1e-3": of_net[name].tar_at_far(1e-3)}
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
    which = which_to_ship(cfg.get("f2c_export", "probe"), results) if "gallery" in nets else "probe"
    net = nets["gallery"].net if which == "gallery" else nets["probe"]
    save_net(net, folder / "model.pt")
    exported = get_model(cfg.network, cfg.embedding_size)  # in float32, and without what hangs on the trained one
    exported.load_state_dict(net.state_dict())
    export_onnx(exported, folder / "model.onnx")
    summaries = {name: result.summary() for name, result in results[which].items()}
    report = {"head": cfg.head, "network": cfg.network, "exported": which,
              "images_seen": images_seen, "seconds": round(seconds, 1), "peak_mb": round(_peak_memory() / 2**20),
              "verification": next(iter(summaries.values()), None), "verification_sets": summaries}
    cosine = None
    for verification_set in list(verification_sets.values())[:1]:
        cosine = onnx_cosine(exported, folder / "model.onnx", normalize_faces(verification_set.faces(64)))
        report["onnx_cosine"] = cosine if cosine is None or np.isfinite(cosine) else "not a number"
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    logging.info("model.pt, model.onnx and report.json are in %s", folder)
    require_same_embedding(cosine, folder / "model.onnx")
    return report


def _peak_memory():
    """Bytes that this rank has held at most: on its GPU, or, without one, of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def save_net(net, path):
    """Write the parameters of a net, as arcface_torch has them in model.pt."""
    with written_whole(path) as file:
        torch.save(net.state_dict(), file)


class _TqdmHandler(logging.Handler):
    """Log lines above the progress bar instead of through it."""

    def emit(self, record):
        tqdm.write(self.format(record), file=sys.stdout)


def _init_logging(folder, resume):
    folder.mkdir(parents=True, exist_ok=True)
    mode = "a" if resume or checkpoints_in(folder) else "w"
    handlers = [_TqdmHandler(), logging.FileHandler(folder / "training.log", mode)]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers, force=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m f2c_plugin.train", description=__doc__.split("\n")[0])
    parser.add_argument("config", help="path of a config file, or the name of one that comes with the package")
    try:
        cfg = load_config(parser.parse_args(arguments).config)
        check(cfg, int(os.environ.get("WORLD_SIZE", 1)))
        if int(os.environ.get("RANK", 0)) == 0:
            _init_logging(Path(cfg.output), cfg.resume)
        with process_group():
            train(cfg)
    except (ConfigError, RecordError, VerificationSetError, UnknownPlugin, ExportError, CheckpointError, NotLearning,
            OSError) as error:
        sys.exit(f"f2c_plugin.train: {error}")
    except Stopped as stopped:
        print(f"f2c_plugin.train: {stopped}", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except KeyboardInterrupt:
        sys.exit("f2c_plugin.train: interrupted. Where there are checkpoints (f2c_save_every, save_all_states), resume=True "
                 "goes on from the last")


if __name__ == "__main__":
    main()
