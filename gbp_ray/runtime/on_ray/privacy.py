"""Keeps a Ray of one machine to it and to its user: only loopback, and a token of its own.

Ray listens on all interfaces unless its node has a loopback address, which it gives a node only
where it takes clusters to be impossible. Torch's rendezvous listens on all of them and asks for no
token, so the ranks meet in a file of a folder that is the user's own.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
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

__all__ = [
    "LOOPBACK",
    "PrivateTorchConfig",
    "is_private",
    "keep_private",
]

LOOPBACK = "127.0.0.1"
_MARK = "GBP_RAY_IS_PRIVATE"
"""Environment variable that the processes of a private Ray inherit."""


def is_private() -> bool:
    """Says whether the Ray that this process belongs to was started here for one job."""
    return _MARK in os.environ


@contextlib.contextmanager
def keep_private() -> Iterator[None]:
    """Keeps a Ray that is started in the block to this machine and this user.

    The token goes from process to process by the environment, which no other user can read, and is
    in no file.
    """
    settings = {
        _MARK: "1",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # Nobody reads the metrics, which are served without the token.
        "RAY_enable_metrics_collection": "0",
    }
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        settings[name] = os.environ.get(name) or _loopback_interface()
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


def _loopback_interface() -> str:
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")


@dataclass
class PrivateTorchConfig(ray.train.torch.TorchConfig):  # type: ignore[misc]
    """Lets the ranks of one machine meet in a file.

    Attributes:
        folder: Holds it; no other user may enter.
    """

    folder: str = ""

    @property
    def backend_cls(self) -> type[_FileBackend]:
        """What starts the process group."""
        return _FileBackend


class _FileBackend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: PrivateTorchConfig) -> None:
        """Starts the process group, of each new group of workers in a file of its own."""
        resources = worker_group.get_resources_per_worker()
        worker_group.execute(_set_torch_distributed_env_vars)
        started = [
            worker_group.execute_single_async(
                rank,
                _setup_torch_process_group,
                backend="nccl" if resources.get("GPU", 0) > 0 else "gloo",
                world_rank=rank,
                world_size=len(worker_group),
                init_method=f"file://{backend_config.folder}/{meeting}",
                timeout_s=backend_config.timeout_s,
            )
            for meeting in [uuid.uuid4().hex]
            for rank in range(len(worker_group))
        ]
        ray.get(started)
