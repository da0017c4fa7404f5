"""Weights & Biases and MLflow, for trainings that ask for them: ``using_wandb``, ``using_mlflow``."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from f2c_plugin.config import Config
from f2c_plugin.errors import ConfigError, F2CError
from f2c_plugin.utils.atomic import written_whole
from f2c_plugin.utils.extras import require

log = logging.getLogger(__name__)


class _WeightsAndBiases:
    """A run there. Offline with WANDB_MODE=offline: it then lies in the folder ``wandb`` of the output."""

    def __init__(self, cfg: Config, name: str, run_id: str | None):
        wandb = require("wandb", extra="wandb")
        # It would take what the terminal shows, which training.log has.
        settings = wandb.Settings(console="off", silent=True)
        self._run: Any = wandb.init(project=cfg["wandb_project"], entity=cfg["wandb_entity"], name=name, dir=cfg["output"],
                                    config=dict(cfg), id=run_id, resume="allow", settings=settings)
        self.run_id = self._run.id
        # A training that resumes may log a step again; theirs only count on.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({**scalars, "step": step})

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """A run on the server that MLFLOW_TRACKING_URI names."""

    def __init__(self, cfg: Config, name: str, run_id: str | None):
        self._mlflow = require("mlflow", extra="mlflow")
        if cfg["mlflow_experiment"]:
            self._mlflow.set_experiment(cfg["mlflow_experiment"])
        run = self._mlflow.start_run(run_id=run_id, run_name=None if run_id else name)
        self.run_id = run.info.run_id
        if not run_id:
            self._mlflow.log_params(dict(cfg))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        # It takes no other characters in names.
        self._mlflow.log_metrics({name.replace("@", "_at_"): value for name, value in scalars.items()}, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


_TRACKERS: dict[str, Callable[[Config, str, str | None], Any]] = {"using_wandb": _WeightsAndBiases, "using_mlflow": _MLflow}

_REMEDIES = {
    "using_wandb": "log in by `wandb login`, or set WANDB_MODE=offline, which keeps the run in config.output",
    "using_mlflow": "set MLFLOW_TRACKING_URI to your server's address; or, without a server, to file:///FOLDER, and "
                    "MLFLOW_ALLOW_FILE_STORE=true"}


class Trackers:
    """The runs of a training at the services that its config asks for.

    A training that resumes goes on in the same runs; their ids are in ``trackers.json`` in ``config.output``. A service that
    fails later is reported once, and training goes on without it.

    Args:
        cfg: the config.
        step: that the training resumes from, or 0.
    Raises:
        ConfigError: a service is asked for, and cannot be had; says why.
    """

    def __init__(self, cfg: Config, step: int):
        folder = Path(cfg["output"])
        name = folder.name + (f"_{cfg['suffix_run_name']}" if cfg["suffix_run_name"] else "")
        ids = _ids(folder / "trackers.json") if step else {}
        self._open: dict[str, Any] = {}
        for key, start in _TRACKERS.items():
            if cfg[key]:
                try:
                    self._open[key] = start(cfg, name, ids.get(key))
                except F2CError as error:
                    raise ConfigError(f"{key}=True: {error}") from error
                except Exception as error:  # of many kinds: no network, no key, no such project
                    raise ConfigError(f"{key}=True: {type(error).__name__}: {error}: {_REMEDIES[key]}") from error
        if self._open:
            with written_whole(folder / "trackers.json") as file:
                file.write(json.dumps({key: tracker.run_id for key, tracker in self._open.items()}).encode())

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Log the scalars of a step, all of them finite."""
        self._each(lambda tracker: tracker.write(step, scalars))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())

    def _each(self, call: Callable[[Any], None]) -> None:
        for key, tracker in list(self._open.items()):
            try:
                call(tracker)
            except Exception as error:
                del self._open[key]
                log.warning("%s=True: %s: %s: nothing more is logged there, and training goes on", key, type(error).__name__,
                            error)


def _ids(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, str)} if isinstance(found, dict) else {}
