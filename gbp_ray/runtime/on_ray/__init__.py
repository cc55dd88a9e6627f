"""Trials and sweeps on Ray; the only package that imports Ray.

Ray reads its environment variables on import, so their defaults are set here first.
"""

import os

START_TIMEOUT_S = 10
"""Time in which Ray must place the workers before it counts the cluster's resources again."""

for _name, _value in {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    # After a loss Ray may request more than is left; it must soon give up to request less.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(START_TIMEOUT_S),
    # Delays each restart after a hang.
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
