"""Restriction of a private Ray to its machine and user: loopback only, and a token of its own.

Ray listens on all interfaces unless its node has a loopback address, which it uses only where it
takes clusters to be impossible. Torch's rendezvous listens on all of them and needs no token, so
the ranks meet in a file of a folder that belongs to the user.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
import ray.train.torch
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
from ray.train.torch.config import (
    _set_torch_distributed_env_vars,
    _setup_torch_process_group,
    _TorchBackend,
)

from gbp_ray.runtime.worker import name_loopback

__all__ = ["LOOPBACK", "PrivateTorchConfig", "is_private", "keep_private"]

LOOPBACK = "127.0.0.1"
_MARK = "GBP_RAY_IS_PRIVATE"
"""Environment variable that the processes of a private Ray inherit."""


def is_private() -> bool:
    """True if this process belongs to a Ray that was started for one job."""
    return _MARK in os.environ


@contextlib.contextmanager
def keep_private() -> Iterator[None]:
    """Restricts a Ray that is started in the block to this machine and this user.

    Processes inherit the token by their environment, which no other user can read.
    """
    settings = {
        _MARK: "1",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # The metrics are served without the token.
        "RAY_enable_metrics_collection": "0",
        **name_loopback(),
    }
    before = {name: os.environ.get(name) for name in settings}
    takes_clusters = ray_constants.ENABLE_RAY_CLUSTER
    os.environ.update(settings)
    ray_constants.ENABLE_RAY_CLUSTER = False
    AuthenticationTokenLoader.instance().reset_cache()
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = takes_clusters
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        AuthenticationTokenLoader.instance().reset_cache()


@dataclass
class PrivateTorchConfig(ray.train.torch.TorchConfig):  # type: ignore[misc]
    """Lets the ranks of one machine meet in a file of `folder`, which no other user may enter."""

    folder: str = ""

    @property
    def backend_cls(self) -> type[_FileBackend]:
        """The class that starts the process group."""
        return _FileBackend


class _FileBackend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: PrivateTorchConfig) -> None:
        """Starts the process group of a group of workers, in a file of its own."""
        resources = worker_group.get_resources_per_worker()
        worker_group.execute(_set_torch_distributed_env_vars)
        meeting = f"file://{backend_config.folder}/{uuid.uuid4().hex}"
        started = [
            worker_group.execute_single_async(
                rank,
                _setup_torch_process_group,
                backend="nccl" if resources.get("GPU", 0) > 0 else "gloo",
                world_rank=rank,
                world_size=len(worker_group),
                init_method=meeting,
                timeout_s=backend_config.timeout_s,
            )
            for rank in range(len(worker_group))
        ]
        ray.get(started)
