"""Which failure explains a group's end, and how it is put; no Ray is started."""

from __future__ import annotations

import errno
import pickle
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
)
from ray.train.v2._internal.exceptions import (
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from shell import Shell

from gbp_ray.config.cluster import ClusterConfig
from gbp_ray.errors import PruneError, TransientStoreError, TrialError, WorkloadError
from gbp_ray.runtime.failures import Failure, is_consequence
from gbp_ray.runtime.on_ray.failures import find_failure, may_pass
from gbp_ray.runtime.worker import Account

CLOSED = RuntimeError(
    "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:6573. This is "
    "typically caused by a remote worker crashing."
)
RESET = RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer.")


DIED = ActorDiedError()


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def dead(error: Exception) -> Exception:
    return WorkerHealthCheckFailedError("A worker health check failed.\nWorker info: ...", error)


@pytest.mark.parametrize(
    ("failures", "rank", "part"),
    [
        ({0: CLOSED, 1: dead(ActorDiedError())}, 1, "was killed, perhaps for memory"),
        ({0: CLOSED, 1: RESET, 2: ValueError("bad\nluck")}, 2, "failed with ValueError: bad"),
        ({0: CLOSED, 1: RESET}, 0, "lost its connection to the others"),
        ({0: ConnectionError("connection reset by peer"), 1: CLOSED}, 0, "ConnectionError"),
        ({1: CLOSED, 0: ConnectionError("connection reset by peer")}, 0, "ConnectionError"),
        ({0: ValueError("x"), 1: PruneError("ours")}, 1, "PruneError: ours"),
        ({2: dead(OutOfMemoryError("x"))}, 2, "because its machine ran out of memory"),
        (
            {2: dead(RayActorError(error_msg="The actor died because its node has died."))},
            2,
            "was lost together with its machine",
        ),
        (
            {
                0: CLOSED,
                2: WorkerHealthCheckTimeoutError("health check has been hanging for 12.3 s"),
            },
            2,
            "did not answer for 12 s",
        ),
        (
            {0: CLOSED, 2: dead(ActorUnavailableError("RpcError", None))},
            2,
            "is out of reach, perhaps lost together with its machine",
        ),
        ({0: RayTaskError("f", "trace", KeyError("a"))}, 0, "failed with KeyError: 'a'"),
    ],
)
def test_the_failure_that_explains_the_others_is_found(
    failures: dict[int, Exception], rank: int, part: str
) -> None:
    found = find_failure(failures)
    assert found.rank == rank
    assert part in found.words
    assert "\n" not in found.words
    assert pickle.loads(pickle.dumps(found)) == Failure(rank, found.words, found.cause) or (
        found.cause is not None
    )


TAKEN_AWAY = dead(
    RayActorError(error_msg="The actor died: its node was terminated", preempted=True)
)


def test_a_machine_taken_away_with_notice_is_counted_apart() -> None:
    taken, killed = find_failure({0: CLOSED, 1: TAKEN_AWAY}), find_failure({0: dead(DIED)})
    assert (taken.rank, taken.is_preemption, killed.is_preemption) == (1, True, False)
    assert "taken away with notice" in taken.words
    told: list[str] = []
    board = MagicMock(note=told.append)
    account = Account(board, ClusterConfig(max_failures=1, max_preemptions=2))
    for failure in (taken, killed, taken, taken, killed):
        account.show(("t", failure))
    counts = [text.partition("again (")[2].rstrip(")") for text in told]
    # Beyond the limits nothing starts again, and the last word is the trial's own error.
    assert counts == [
        "1 of cluster.max_preemptions = 2",
        "1 of cluster.max_failures = 1",
        "2 of cluster.max_preemptions = 2",
    ]
    Account(board, ClusterConfig()).show(("t", taken))
    assert told[-1].endswith("(1 of cluster.max_preemptions = any number)")


def test_an_error_of_ours_arrives_as_raised() -> None:
    error = PruneError("ours")
    assert find_failure({0: CLOSED, 1: error}).cause is error
    assert find_failure({0: CLOSED}).cause is None


def test_a_users_error_raised_from_another_stays_the_users() -> None:
    error = ValueError("split 3 is unreadable")
    error.__cause__ = OSError("no such file")
    assert "split 3 is unreadable" in find_failure({0: error}).words


@pytest.mark.parametrize(
    ("error", "is_worth_it"),
    [
        (CLOSED, True),
        (DIED, True),
        (ConnectionResetError("by the data server"), True),
        (TimeoutError(), True),
        (OSError(errno.EIO, "the disk"), True),
        (OSError(errno.ESTALE, "the network's file system"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (TransientStoreError("s3 is slow"), True),
        (TrialError("Ray did not start", trial_id="", rank=None, cause=""), True),
        (TrialError("it again", trial_id="", rank=1, cause="", is_lasting=True), False),
        (WorkloadError("labels"), False),
        (raised_from(WorkloadError("item 3"), ConnectionResetError()), True),
        (raised_from(WorkloadError("item 3"), KeyError()), False),
        (ZeroDivisionError(), False),
        (KeyError("a"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (FileNotFoundError(errno.ENOENT, "gone"), False),
        (OSError("image file is truncated"), False),
        (RuntimeError("CUDA out of memory. Tried to allocate 20 GiB"), False),
    ],
)
def test_only_what_may_pass_is_tried_again(error: Exception, *, is_worth_it: bool) -> None:
    assert may_pass(error) == is_worth_it


def test_a_lost_connection_to_a_data_server_is_no_consequence() -> None:
    assert is_consequence(CLOSED)
    assert is_consequence(RESET)
    assert not is_consequence(ConnectionResetError("Connection reset by peer"))
    assert not is_consequence(RuntimeError("CUDA error: device-side assert triggered"))


def test_a_failed_trial_ends_with_the_command_that_goes_on(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise TrialError(
            "trial t: worker 1 was killed; run the job again", trial_id="t", rank=1, cause="killed"
        )

    monkeypatch.setattr("gbp_ray.runtime.single._run_rounds", fail)
    arguments = ["prune", "-q", "--set=prune.exclude=['linear*']"]
    outcome = shell(*arguments, f"--set=storage={tmp_path}")
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1] == (
        "error: trial t: worker 1 was killed; run the job again: gbp-ray prune -q "
        """'--set=prune.exclude=['"'"'linear*'"'"']' """
        f"--set=storage={tmp_path}"
    )
