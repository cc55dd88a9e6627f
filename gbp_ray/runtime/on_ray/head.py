"""A client for the Jobs API of a remote cluster's head: submit, find, follow and stop jobs.

Requests go over HTTP with Ray's token and a time limit. The head knows a job by its submission id.
Only one run of a job is alive at a time; the next one gets the next number.

Exit codes are the driver's own, which those of Ray's client are not: 0 for a job that succeeded,
130 for one that was stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import re
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import aiohttp
import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from gbp_ray.errors import ClusterError, ConfigError
from gbp_ray.runtime.progress import CHECKED
from gbp_ray.runtime.submission import PYTHONS, Submission

__all__ = ["Head", "JobState", "find_address"]

_TIMEOUTS_S = (5.0, 60.0)
"""For a connection and for an answer: the head receives a whole archive before it answers."""

_POLL_S = 0.5
_CHECKS_S = 90.0
"""Longest wait for a job to pass its checks; the cluster may have to add a node first."""

_AGENT_S = 60.0
"""Longest wait for a head that has just started; half a minute is not always enough."""

_NO_AGENT = "No available agent"
"""Message of Ray 2.60 when no node's agent answers the head."""

_RETRY_S = 1.0
_SILENCE_S = 20.0
"""Longest silence of a followed job before the head is asked for a sign of life."""

_ABSENCE_S = 300.0
"""Longest time out of reach before a job is no longer followed."""

_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")

# This module reports the same in its own words.
for _name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
    logging.getLogger(_name).setLevel(logging.ERROR)

State = Literal["pending", "running", "succeeded", "failed", "stopped"]


@dataclass(frozen=True)
class JobState:
    """The state of a job as its head reports it.

    Attributes:
        base_id: The submission id without the number of the run.
        exit_code: 0, the driver's own, or 130 after a stop; None before the end.
        message: The head's description; for a failed job it ends with the end of the log.
        started_s: In seconds since 1970, like `ended_s`.
    """

    submission_id: str
    base_id: str
    state: State
    exit_code: int | None
    message: str
    kind: str
    uri: str
    started_s: float | None
    ended_s: float | None

    @property
    def is_over(self) -> bool:
        """True after the job's end."""
        return self.exit_code is not None

    @property
    def reason(self) -> str:
        """The cause of a failure in one line: the driver's error, or the last line of its log."""
        lines = _lines_of(self.message)
        errors = [line for line in lines if line.startswith("error: ")]
        return (errors or lines or ["its log is empty"])[-1].removeprefix("error: ")

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, for JSON and for tables."""
        return dataclasses.asdict(self)

    def check(self) -> None:
        """Raises a ClusterError with the job's exit code if the job failed or was stopped."""
        if self.state == "stopped":
            raise ClusterError(
                f"job {self.submission_id} was stopped; submit it again to go on", exit_code=130
            )
        if self.state == "failed":
            raise ClusterError(
                f"job {self.submission_id} failed with exit code {self.exit_code}: {self.reason}",
                exit_code=self.exit_code,
            )


def find_address(address: str | None) -> str:
    """Returns the head's HTTP address, as given or from the environment."""
    source = "--address"
    if address is None:
        for source in _ADDRESS_VARIABLES:
            if os.environ.get(source, "").startswith(("http://", "https://")):
                address = os.environ[source]
                break
        else:
            raise ConfigError(
                "--address: which cluster? Give the address of its head, http://HEAD:8265, or set "
                "RAY_API_SERVER_ADDRESS"
            )
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        shown = "" if "@" in address else f" = '{address}'"
        raise ConfigError(
            f"{source}{shown}: must read http://HEAD:8265, the address of the dashboard of the "
            "cluster's head"
        )
    return address.rstrip("/")


class Head:
    """The head of a cluster, at an address such as http://HEAD:8265.

    Raises:
        ClusterError: No Ray cluster answers.
        ConfigError: The head refuses the token, or runs a Ray or Python that does not fit.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        token, self._token_source = _find_token()
        with self._explained():
            self._client = _Client(address, token)
            versions = self._client.ask("/api/v0/cluster_metadata").get("data", {})
        ray_version = str(versions.get("rayVersion", "unknown"))
        if _minor(ray_version) != _minor(ray.__version__):
            raise ConfigError(
                f"--address = {address}: the cluster runs Ray {ray_version}, and this gbp-ray "
                f"works with {_minor(ray.__version__)}; start the cluster with "
                f"ray=={ray.__version__}, or use the gbp-ray that goes with its Ray"
            )
        python = versions.get("pythonVersion")
        if python is not None and _minor(python) not in PYTHONS:
            raise ConfigError(
                f"--address = {address}: the cluster runs Python {python}, and gbp-ray "
                f"needs {' or '.join(PYTHONS)}; start the cluster with one of those"
            )

    def send(
        self, submission: Submission, before: Callable[[], None] = lambda: None
    ) -> tuple[JobState, bool]:
        """Submits a job unless a run of it is alive; returns (the run, True if submitted now).

        `before` is called just before the archive is sent.
        """
        deadline, was_called = time.monotonic() + _AGENT_S, False
        while True:
            runs = self._runs_of(submission.base_id)
            # The same trial for another storage is another job.
            same = [run for run in runs.values() if run.uri == submission.uri]
            if live := [run for run in same if not run.is_over]:
                return live[-1], False
            if not was_called:
                was_called = True
                before()
            number = max(runs, default=0) + 1
            name = submission.base_id if number == 1 else f"{submission.base_id}-{number}"
            with tempfile.TemporaryDirectory(prefix="gbp-ray-") as scratch, self._explained():
                archive = Path(scratch, "job.zip")
                archive.write_bytes(submission.package.data)
                try:
                    self._client.submit_job(
                        entrypoint=submission.entrypoint,
                        submission_id=name,
                        runtime_env={"working_dir": str(archive), "env_vars": submission.env_vars},
                        metadata=submission.metadata,
                    )
                except RuntimeError as error:
                    # Another submission was faster; the next turn finds it.
                    if "already exists" in str(error):
                        continue
                    if _NO_AGENT in str(error) and time.monotonic() < deadline:
                        time.sleep(_RETRY_S)
                        continue
                    raise
            return self.state(name), True

    def jobs(self) -> list[JobState]:
        """Lists the jobs that gbp-ray has submitted, the newest last."""
        return [job for job in self._list() if job.base_id]

    def find(self, name: str) -> JobState:
        """Finds a job by its submission id or an unambiguous beginning of it."""
        jobs = self._list()
        for job in jobs:
            if job.submission_id == name:
                return job
        matches = [job for job in jobs if job.base_id and job.submission_id.startswith(name)]
        if not matches:
            raise ConfigError(
                f"job '{name}': {self.address} has no such job; 'gbp-ray jobs' lists those it has"
            )
        if len({job.base_id for job in matches}) > 1:
            names = ", ".join(dict.fromkeys(job.submission_id for job in matches))
            raise ConfigError(f"job '{name}': may be {names}; give more of the name")
        return matches[-1]

    def state(self, submission_id: str) -> JobState:
        """Asks the head for the state of a job."""
        with self._explained():
            return _state_of(self._client.get_job_info(submission_id))

    def read_log(self, submission_id: str) -> str:
        """Reads the log of a job."""
        with self._explained():
            return str(self._client.get_job_logs(submission_id))

    def await_checks(self, submission_id: str) -> JobState:
        """Waits until a job has passed its checks, has ended, or `_CHECKS_S` are over.

        Only the driver on the head can find out if the code imports there, the storage can be
        written and the workers placed.
        """
        deadline = time.monotonic() + _CHECKS_S
        while not (state := self.state(submission_id)).is_over and time.monotonic() < deadline:
            if state.state == "running" and CHECKED in self.read_log(submission_id):
                break
            time.sleep(_POLL_S)
        return state

    def follow(self, submission_id: str, write: Callable[[str], None]) -> JobState:
        """Passes a job's log to `write`, piece by piece, until the job ends."""
        asyncio.run(self._stream(submission_id, write))
        # The head needs a moment to note that the job has ended.
        deadline = time.monotonic() + 30.0
        while not (state := self.state(submission_id)).is_over and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return state

    def stop(self, submission_id: str, timeout_s: float) -> JobState:
        """Stops a job, started or not, and waits until it has ended."""
        deadline = time.monotonic() + timeout_s
        while not (state := self.state(submission_id)).is_over:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"job {submission_id} is still {state.state} {timeout_s:.0f} s after it was "
                    "told to stop; run the same command again to go on waiting"
                )
            # Repeated, since a job that has not started yet ignores it.
            with self._explained():
                self._client.stop_job(submission_id)
            time.sleep(_POLL_S)
        return state

    async def _stream(self, submission_id: str, write: Callable[[str], None]) -> None:
        num_shown, lost_since = 0, None
        while True:
            num_seen = 0
            try:
                async for piece in self._pieces(submission_id):
                    lost_since = None
                    # A new connection begins from the start.
                    fresh = piece[max(0, num_shown - num_seen) :]
                    num_seen += len(piece)
                    if fresh:
                        num_shown += len(fresh)
                        write(fresh)
                return
            except (aiohttp.ClientError, OSError, RuntimeError) as error:
                now = time.monotonic()
                lost_since = now if lost_since is None else lost_since
                if now - lost_since > _ABSENCE_S:
                    raise ClusterError(
                        f"job {submission_id}: the head at {self.address} has been out of reach "
                        f"for {_ABSENCE_S / 60:.0f} minutes ({type(error).__name__}); the job may "
                        "go on without it being followed; run the same command again"
                    ) from error
            await asyncio.sleep(_RETRY_S)
            try:
                await asyncio.to_thread(self.state, submission_id)
            except ClusterError as error:
                # A restarted head does not know the job, and never will.
                if not getattr(error, "is_out_of_reach", False):
                    raise

    async def _pieces(self, submission_id: str) -> AsyncIterator[str]:
        """Yields the log of a job from its start; raises when the head is out of reach."""
        source = self._client.tail_job_logs(submission_id)
        waiting: asyncio.Task[str] | None = None
        try:
            while True:
                waiting = waiting or asyncio.ensure_future(anext(source))
                done, _ = await asyncio.wait({waiting}, timeout=_SILENCE_S)
                if done:
                    task, waiting = waiting, None
                    try:
                        piece = task.result()
                    except StopAsyncIteration:
                        return
                    yield piece
                else:
                    # A connection that was cut on the way stays silent for ever.
                    await asyncio.to_thread(self._client.get_job_info, submission_id)
        finally:
            if waiting is not None:
                waiting.cancel()
                with contextlib.suppress(BaseException):
                    await waiting
            await source.aclose()

    def _list(self) -> list[JobState]:
        with self._explained():
            details = self._client.list_jobs()
        jobs = [_state_of(one) for one in details if one.submission_id]
        return sorted(jobs, key=lambda job: job.started_s or 0.0)

    def _runs_of(self, base_id: str) -> dict[int, JobState]:
        """Maps run numbers to the runs of a job."""
        runs = {}
        for job in self._list():
            if match := re.fullmatch(re.escape(base_id) + r"(?:-(\d+))?", job.submission_id):
                runs[int(match[1] or 1)] = job
        return runs

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        place = f"--address = {self.address}"
        try:
            yield
        except AuthenticationError:
            get_one = "'ray get-auth-token' on the head shows it"
            fault = (
                f"the cluster refuses the token of {self._token_source}; give this cluster's own "
                f"({get_one})"
                if self._token_source
                else "the cluster wants a token, and none was found; set RAY_AUTH_TOKEN or "
                f"RAY_AUTH_TOKEN_PATH, or write it to ~/.ray/auth_token ({get_one})"
            )
            raise ConfigError(f"{place}: {fault}") from None
        except (ConnectionError, requests.ConnectionError, requests.Timeout) as error:
            if isinstance(error.__context__ or error, requests.exceptions.SSLError):
                raise ConfigError(
                    f"{place}: its certificate is not trusted here; name the file of its authority "
                    "in REQUESTS_CA_BUNDLE and SSL_CERT_FILE"
                ) from error
            raise ClusterError(
                f"{place}: no Ray cluster answers there; check that the address is that of the "
                "head's dashboard (port 8265, unless it was set), that the cluster is up, and that "
                "no firewall is in between",
                exit_code=2,
                is_out_of_reach=True,
            ) from error
        except (requests.RequestException, KeyError) as error:
            raise ConfigError(
                f"{place}: what answers there is not the head of a Ray cluster "
                f"({type(error).__name__}); give the address of its dashboard"
            ) from error
        except RuntimeError as error:
            raise ClusterError(f"{place}: {_explain_answer(str(error))}") from error


class _Client(JobSubmissionClient):  # type: ignore[misc]
    """Ray's client with a time limit for each request."""

    def __init__(self, address: str, token: str) -> None:
        # Ray prefers an address in the environment to its argument.
        hidden = {name: os.environ.pop(name) for name in _ADDRESS_VARIABLES if name in os.environ}
        try:
            # Without this header Ray looks for a token itself and fails where there is none, even
            # if the cluster needs none.
            super().__init__(address, headers={"Authorization": f"Bearer {token}" if token else ""})
        finally:
            os.environ.update(hidden)

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        return super()._do_request(method, endpoint, timeout=_TIMEOUTS_S, **options)

    def ask(self, endpoint: str) -> dict[str, Any]:
        """Reads an endpoint outside the Jobs API."""
        answer = self._do_request("GET", endpoint)
        if answer.status_code == 404:
            return {}
        answer.raise_for_status()
        return dict(answer.json())


def _state_of(details: Any) -> JobState:
    metadata = details.metadata or {}
    state: State = details.status.value.lower()
    code = details.driver_exit_code
    exit_codes: dict[str, int] = {
        "succeeded": 0,
        # A signal's number is negative; a driver that never started has no code.
        "failed": 1 if not code else code if code > 0 else 128 - code,
        "stopped": 130,
    }
    return JobState(
        submission_id=details.submission_id or "",
        base_id=metadata.get("gbp_ray.job", ""),
        state=state,
        exit_code=exit_codes.get(state),
        message=details.message or "",
        kind=metadata.get("gbp_ray.kind", ""),
        uri=metadata.get("gbp_ray.uri", ""),
        started_s=details.start_time and details.start_time / 1000,
        ended_s=details.end_time and details.end_time / 1000,
    )


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _find_token() -> tuple[str, str]:
    """Returns the token from where Ray looks for it, and that place; ("", "") for none."""
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return "", ""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token, "RAY_AUTH_TOKEN"
    name = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(name) if name else Path.home() / ".ray" / "auth_token"
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        if not name:
            return "", ""
        reason = getattr(error, "strerror", None) or "is no text"
        raise ConfigError(
            f"RAY_AUTH_TOKEN_PATH = '{name}': cannot be read: {reason}; give the file that holds "
            "the cluster's token"
        ) from None
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise ConfigError(
            f"'{path}': holds no token, which is one word; write the cluster's own there"
        )
    return token, "RAY_AUTH_TOKEN_PATH" if name else str(path)


def _lines_of(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _explain_answer(text: str) -> str:
    """Shortens the head's answer, which may be a traceback, to one line."""
    last = (_lines_of(text) or ["no reason given"])[-1].rstrip(".")
    if "404" in text and "version" in text.lower():
        return "what answers there is not the head of a Ray cluster; give its dashboard's address"
    if _NO_AGENT in text:
        return (
            "the head takes no jobs, as no node's agent answers it; try again if it has just "
            "started; another Ray on its machine may use the agent's port 52365: stop that Ray, "
            "or start the head with --dashboard-agent-listen-port"
        )
    if "does not exist" in text:
        return "the cluster does not know the job; it may have been started anew since"
    return f"the head refuses: {last}; the dashboard's log on the head may say more"
