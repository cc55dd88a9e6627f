"""Who else is told every round of a sweep: TensorBoard, MLflow, Weights & Biases, by Tune's own.

TensorBoard's files go to `<job>/tune/<trial id>/` when a trial ends, on a folder and on an object
store alike. MLflow takes its server from MLFLOW_TRACKING_URI, Weights & Biases its key and mode
from WANDB_API_KEY and WANDB_MODE; experiment and project are called like the job.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from gbp_ray.config import JobConfig, trial_id
from gbp_ray.errors import ConfigError
from gbp_ray.store import Store

__all__ = ["check_extras", "make_loggers"]

_EXTRAS = {"optuna": "search", "mlflow": "loggers", "wandb": "loggers", "tensorboardX": "loggers"}


def check_extras(job: JobConfig) -> None:
    """Makes sure that what a sweep asks for is installed.

    Raises:
        ConfigError: It is not; says what to install.
    """
    asked = [name.replace("tensorboard", "tensorboardX") for name in job.sweep.loggers]
    asked += ["optuna"] if job.sweep.search == "optuna" else []
    for name in asked:
        if importlib.util.find_spec(name) is None:
            what = name if name == "tensorboardX" else f"'gbp-ray[{name}]'"
            raise ConfigError(
                f"sweep.{_EXTRAS[name]} = {name}: is not installed; pip install {what}"
            )


def make_loggers(job: JobConfig, store: Store) -> list[Any]:
    """Makes the callbacks that Tune is to tell."""
    # Each is imported where it is asked for: the last two are extras.
    callbacks: list[Any] = []
    if "tensorboard" in job.sweep.loggers:
        from ray.tune import Callback
        from ray.tune.logger import TBXLoggerCallback

        class KeepEvents(Callback):  # type: ignore[misc]
            """Puts TensorBoard's files where the results are; comes after the one that closes."""

            def __getstate__(self) -> dict[str, Any]:
                return {}

            def on_trial_complete(
                self, iteration: int, trials: Any, trial: Any, **info: Any
            ) -> None:
                name = trial_id(JobConfig.model_validate_json(trial.config["job"]))
                files = list(Path(trial.local_path).glob("events.out.tfevents.*"))
                # An earlier attempt was told from the start again.
                old = [entry.key for entry in store.objects.entries(f"tune/{name}/")]
                for file in files:
                    store.objects.put(f"tune/{name}/{file.name}", file.read_bytes())
                store.objects.delete(old)

            on_trial_error = on_trial_complete

        callbacks += [TBXLoggerCallback(), KeepEvents()]
    if "mlflow" in job.sweep.loggers:
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        callbacks.append(MLflowLoggerCallback(experiment_name=job.name))
    if "wandb" in job.sweep.loggers:
        from ray.air.integrations.wandb import WandbLoggerCallback

        callbacks.append(WandbLoggerCallback(project=job.name))
    return callbacks
