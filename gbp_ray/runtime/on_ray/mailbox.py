"""Messages between workers and their driver: progress, and permission for the next round."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gbp_ray.config.cluster import ClusterConfig
from gbp_ray.errors import GbpError
from gbp_ray.runtime.failures import Failure
from gbp_ray.runtime.hang import Standstill
from gbp_ray.runtime.progress import ProgressBoard
from gbp_ray.runtime.worker import Account

__all__ = ["Mailbox", "Relay"]

_POLL_INTERVAL_S = 0.2


@ray.remote(num_cpus=0)
class Mailbox:
    """Holds the workers' messages and standstills, and the driver's verdicts on rounds."""

    def __init__(self) -> None:
        self._messages: list[Any] = []
        self._group = ""
        self._standstills: dict[int, Standstill] = {}
        self._last_allowed, self._is_ended = -1, False
        self._kept_error: GbpError | None = None

    def put(self, message: Any) -> None:
        """Adds a message."""
        self._messages.append(message)

    def take(self) -> list[Any]:
        """Returns the messages since the last call."""
        messages, self._messages = self._messages, []
        return messages

    def allow(self, number: int) -> None:
        """Lets workers go on after all rounds up to this one."""
        self._last_allowed = number

    def end(self) -> None:
        """Stops workers after their next round."""
        self._is_ended = True

    def verdict(self, number: int) -> bool | None:
        """Returns True to go on after a round, False to stop, None while undecided."""
        return True if number <= self._last_allowed else False if self._is_ended else None

    def keep_error(self, error: GbpError) -> None:
        """Stores an error that a worker would meet again."""
        self._kept_error = error

    def kept_error(self) -> GbpError | None:
        """Returns that error, if any."""
        return self._kept_error

    def compare(self, group: str, own: Standstill) -> list[Standstill]:
        """Stores one worker's standstill and returns those of its whole group."""
        if group != self._group:
            self._group, self._standstills = group, {}
        self._standstills[own.rank] = own
        return list(self._standstills.values())


class Relay:
    """Passes messages from its mailbox to the board while the block runs.

    `cluster` as for `Account`.
    """

    def __init__(self, board: ProgressBoard, cluster: ClusterConfig | None = None) -> None:
        # Beside the driver, since machines of workers may come and go.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.mailbox = Mailbox.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
        self.account = Account(board, cluster)
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="gbp-ray-progress", daemon=True)

    def __enter__(self) -> Relay:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._is_over.set()
        self._thread.join(timeout=5)
        if kind is None:
            self.deliver()

    def describe(self, failure: Failure) -> tuple[int, str]:
        """Describes a failure with the workers' last messages: (rank, words)."""
        self.deliver()
        return self.account.describe(failure)

    def deliver(self) -> None:
        """Shows new messages; lost progress must not end the trial."""
        with contextlib.suppress(ray.exceptions.RayError), self._lock:
            for message in ray.get(self.mailbox.take.remote(), timeout=30):
                self.account.show(message)

    def _poll(self) -> None:
        while not self._is_over.wait(_POLL_INTERVAL_S):
            self.deliver()
