"""Start and end of Ray, with a driver that stays interruptible while it waits."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any

import ray
from ray._private import auto_init_hook

from gbp_ray.config.cluster import ClusterConfig
from gbp_ray.distributed.ranks import check_devices
from gbp_ray.errors import ConfigError, TrialError
from gbp_ray.runtime.failures import first_line
from gbp_ray.runtime.on_ray.privacy import LOOPBACK, keep_private
from gbp_ray.runtime.placement import pretend_cpus
from gbp_ray.runtime.signals import Terminated, descendants, is_watching, kill

__all__ = ["fit_interruptibly", "ray_session", "run_beside"]

_LOOK_INTERVAL_S = 1.0
_END_S = 5.0
"""Longest wait for Ray to shut down at the end of a command."""


@contextlib.contextmanager
def ray_session(cluster: ClusterConfig, is_debug: bool) -> Iterator[None]:
    """Joins the job's cluster or starts a private one, and ends what it started."""
    if ray.is_initialized():
        yield
        return
    if cluster.use_gpu and cluster.address is None:
        check_devices(cluster)
    options: dict[str, Any] = {"address": cluster.address or "local"}
    with contextlib.ExitStack() as stack:
        if cluster.address is None:
            stack.enter_context(keep_private())
            # Workers that wait for each other must all be placed, even on too few cores.
            num_cpus = pretend_cpus(cluster, os.cpu_count() or 1)
            options |= {"num_cpus": num_cpus, "include_dashboard": False}
            options["_node_ip_address"] = LOOPBACK
        before, is_over = descendants(), threading.Event()
        # Beside the main thread, which no signal reaches while it waits inside Ray. The thread
        # stays, since the kernel ends Ray's processes with the thread that started them.
        started = run_beside(lambda: _start_ray(cluster, options, is_debug), is_over)
        try:
            while not started.done():
                wait([started], timeout=_LOOK_INTERVAL_S)
            started.result()
            yield
        finally:
            is_stopped = isinstance(sys.exception(), (KeyboardInterrupt, Terminated))
            _end_ray(started, before, is_stopped)
            is_over.set()


def fit_interruptibly(trainer: Any) -> Any:
    """Runs fit() beside the main thread, in which Ctrl-C then raises KeyboardInterrupt.

    In the main thread Ray would replace the SIGINT handler and end the process with its own code.
    """
    outcome = run_beside(trainer.fit)
    try:
        while not outcome.done():
            wait([outcome], timeout=_LOOK_INTERVAL_S)
            _check_alive()
        return outcome.result()
    except BaseException:
        # If the thread still works when Ray has shut down, Ray's functions would join any other
        # Ray they find.
        if not outcome.done():
            auto_init_hook.enable_auto_connect = False
        raise


def run_beside(work: Callable[[], Any], is_over: threading.Event | None = None) -> Future[Any]:
    """Runs a function in a thread, which then stays until `is_over` is set."""
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001 - handed to the waiting thread
            outcome.set_exception(error)
        if is_over is not None:
            is_over.wait()

    threading.Thread(target=run, name="gbp-ray-beside", daemon=True).start()
    return outcome


def _end_ray(started: Future[Any], before: set[tuple[int, str]], is_stopped: bool) -> None:
    """Ends Ray; for a stopped command kills all processes started since `before`."""
    if not is_watching():
        # A notebook goes on, and a Ray that is still starting cannot be ended.
        while not started.done():
            with contextlib.suppress(KeyboardInterrupt):
                wait([started])
        ray.shutdown()
        return
    own = descendants() - before
    if started.done():
        _, unfinished = wait([run_beside(ray.shutdown)], timeout=_END_S)
        is_stopped = is_stopped or bool(unfinished)
    if is_stopped:
        # Processes whose parents have ended are no longer descendants.
        kill(own | descendants() - before)


def _check_alive() -> None:
    """Raises a TrialError if part of the private Ray has died: fit() would wait for ever."""
    # A cluster that was joined has none of these processes here.
    node = ray._private.worker._global_node
    dead = {name for name, _ in node.dead_processes()} if node is not None else set()
    if lost := dead & {"raylet", "gcs_server"}:
        cause = f"Ray's {lost.pop()} on this machine has died; perhaps memory ran out"
        raise TrialError(f"{cause}; run the same command again to go on", cause=cause)


def _start_ray(cluster: ClusterConfig, options: dict[str, Any], is_debug: bool) -> None:
    # It warns that it handles no SIGTERM outside the main thread.
    logging.getLogger("ray._private.worker").setLevel("INFO" if is_debug else "ERROR")
    try:
        ray.init(
            log_to_driver=is_debug,
            logging_level="INFO" if is_debug else "ERROR",
            configure_logging=is_debug,
            **options,
        )
    except Exception as error:
        # Ray raises ConnectionError, RuntimeError, ValueError or, on a busy machine, Exception.
        cause = first_line(error)
        if cluster.address is None:
            raise TrialError(
                f"Ray did not start on this machine: {cause}; run the same command again to go on",
                cause=cause,
            ) from error
        raise ConfigError(
            f"cluster.address = {cluster.address}: Ray did not start or answer: {cause}"
        ) from error
