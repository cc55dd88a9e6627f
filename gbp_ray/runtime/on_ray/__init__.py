"""Trials and sweeps on Ray; the only package that imports it.

What Ray reads from the environment when it is imported, and hands to the processes it starts, is
set here, before any module of this package can import it. A value that is set already stays.
"""

import os

START_TIMEOUT_S = 10
"""How long Ray tries to place the workers before it looks anew at what the cluster has."""

for _name, _value in {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    # After a loss Ray may ask for more than is left, and must give up soon to ask for less.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(START_TIMEOUT_S),
    # Waited out before each restart where a worker hangs.
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",
}.items():
    os.environ.setdefault(_name, _value)
