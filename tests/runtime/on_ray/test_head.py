"""The client of the Jobs API against a head that misbehaves; the real one is tried elsewhere."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from fake_head import FakeHead, FakeJob, fake_head

import gbp_ray
from gbp_ray.cli.app import main
from gbp_ray.errors import ClusterError, ConfigError
from gbp_ray.runtime.on_ray import head as head_module
from gbp_ray.runtime.on_ray.head import Head, find_address
from gbp_ray.runtime.progress import CHECKED
from gbp_ray.runtime.submission import prepare_submission

TOKEN = "the-token-of-a-test"
CLEARED = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in CLEARED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(head_module, "_POLL_S", 0.01)
    monkeypatch.setattr(head_module, "_RETRY_S", 0.01)
    monkeypatch.setattr(head_module, "_TIMEOUTS_S", (1.0, 20.0))


@pytest.fixture
def head() -> Iterator[FakeHead]:
    with fake_head(ray_version=ray.__version__) as head:
        yield head


@dataclass
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Done]:
    """Runs gbp-ray in this process; a new one takes a second to import Ray."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["gbp-ray", *arguments])
        before, code = signal.getsignal(signal.SIGTERM), 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        finally:
            signal.signal(signal.SIGTERM, before)
        told = capsys.readouterr()
        return Done(code, told.out, told.err)

    return run


def submission(**settings: Any) -> Any:
    return prepare_submission(None, {"storage": "/shared", **settings}, environment={})


def fail(job: FakeJob, code: int | None, message: str) -> None:
    job.status, job.code, job.message = "FAILED", code, message


def test_a_job_is_sent_once_and_goes_on_under_the_next_number(head: FakeHead) -> None:
    client, job = Head(head.address), submission()
    calls: list[int] = []
    first, is_new = client.send(job, lambda: calls.append(1))
    assert (first.submission_id, is_new, first.state) == (job.base_id, True, "running")
    assert list(head.packages.values()) == [job.package.data]
    again, is_new = client.send(job, lambda: calls.append(2))
    assert (again.submission_id, is_new) == (job.base_id, False)
    assert calls == [1]
    # Another storage gets results of its own.
    elsewhere, is_new = client.send(submission(storage="/other"))
    assert (elsewhere.submission_id, is_new) == (f"{job.base_id}-2", True)
    for status in ("SUCCEEDED", "FAILED", "STOPPED"):
        head.jobs[again.submission_id].status = status
        again, is_new = client.send(job)
        assert is_new
    assert again.submission_id == f"{job.base_id}-5"
    assert len(head.packages) == 2
    assert [run.submission_id for run in client.jobs()] == list(head.jobs)


def test_of_two_that_submit_at_once_one_is_told_of_the_other(
    head: FakeHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, other, job = Head(head.address), Head(head.address), submission()
    seen = client._runs_of

    def too_late(base_id: str) -> Any:
        found = seen(base_id)
        monkeypatch.undo()
        other.send(job)
        return found

    monkeypatch.setattr(client, "_runs_of", too_late)
    state, is_new = client.send(job)
    assert (state.submission_id, is_new) == (job.base_id, False)
    assert len(head.jobs) == 1


def test_a_head_that_has_just_started_is_asked_again(
    head: FakeHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "_RETRY_S", 0.01)
    head.num_without_agent = 3
    calls: list[int] = []
    _, is_new = Head(head.address).send(submission(), lambda: calls.append(1))
    assert (is_new, head.num_without_agent, calls) == (True, 0, [1])


def test_a_head_that_takes_no_jobs_says_so(head: FakeHead, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "_AGENT_S", 0.1)
    head.num_without_agent = 10**9
    with pytest.raises(ClusterError, match=r"takes no jobs, as no node's agent.* stop that"):
        Head(head.address).send(submission())


def test_the_head_is_told_nothing_but_what_it_needs(head: FakeHead) -> None:
    Head(head.address).send(submission())
    (job,) = head.jobs.values()
    assert job.request["entrypoint"] == "exec python .gbp-ray-start.py"
    assert job.request["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "30"}
    assert set(job.request["metadata"]) == {
        f"gbp_ray.{name}" for name in ("version", "kind", "job", "uri")
    }


def test_exit_codes_tell_the_truth(head: FakeHead) -> None:
    client, name = Head(head.address), submission().base_id
    state, _ = client.send(submission())
    assert (state.exit_code, state.is_over) == (None, False)
    job = head.jobs[name]
    for status, code, expected in [
        ("SUCCEEDED", 0, 0),
        ("STOPPED", None, 130),
        ("FAILED", 2, 2),
        ("FAILED", 1, 1),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),
    ]:
        job.status, job.code = status, code
        assert client.state(name).exit_code == expected
        if expected:
            with pytest.raises(ClusterError) as caught:
                client.state(name).check()
            assert caught.value.exit_code == expected
    fail(job, 2, "failed, last logs:\nstarting\nerror: prune.sparsity = 2: lower it\nbye\n")
    with pytest.raises(ClusterError, match=r"failed with exit code 2: prune.sparsity = 2: lower"):
        client.state(name).check()


def test_a_submission_waits_for_the_checks_of_the_job(head: FakeHead) -> None:
    client, name = Head(head.address), submission().base_id
    client.send(submission())
    job = head.jobs[name]
    job.status, job.log = "PENDING", "setting up\n"

    def proceed() -> None:
        time.sleep(0.1)
        job.status = "RUNNING"
        time.sleep(0.1)
        job.log += f"{CHECKED}\n"

    threading.Thread(target=proceed).start()
    started = time.monotonic()
    assert client.await_checks(name).state == "running"
    assert time.monotonic() - started > 0.15
    fail(job, 2, "error: no bucket\n")
    assert client.await_checks(name).reason == "no bucket"


def test_a_job_without_room_is_left_waiting(
    head: FakeHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "_CHECKS_S", 0.1)
    client = Head(head.address)
    state, _ = client.send(submission())
    head.jobs[state.submission_id].status = "PENDING"
    assert client.await_checks(state.submission_id).state == "pending"


def test_the_same_from_python(head: FakeHead) -> None:
    def pass_checks() -> None:
        while not head.jobs:
            time.sleep(0.01)
        (job,) = head.jobs.values()
        job.log = f"{CHECKED}\n"

    threading.Thread(target=pass_checks).start()
    settings = {"storage": "/shared"}
    name = gbp_ray.submit(None, settings, address=head.address)
    assert list(head.jobs) == [name]
    fail(head.jobs[name], 2, "error: no\n")
    threading.Thread(target=lambda: fail_second(head)).start()
    with pytest.raises(ClusterError, match=f"job {name}-2 failed with exit code 1: no room") as e:
        gbp_ray.submit(None, settings, address=head.address)
    assert e.value.exit_code == 1


def fail_second(head: FakeHead) -> None:
    while len(head.jobs) < 2:
        time.sleep(0.01)
    fail(list(head.jobs.values())[1], 1, "error: no room\n")


def test_a_certificate_that_nobody_knows_is_told_from_no_answer(head: FakeHead) -> None:
    # The fake head speaks no TLS at all, which fails at the same step.
    with pytest.raises(ConfigError, match=r"its certificate is not trusted here"):
        Head(head.address.replace("http:", "https:"))


def test_a_log_is_followed_over_lost_connections(head: FakeHead) -> None:
    client = Head(head.address)
    state, _ = client.send(submission())
    job = head.jobs[state.submission_id]
    job.log = "".join(f"line {number} of a log\n" for number in range(20))
    head.num_drops = 3
    pieces: list[str] = []

    def write(piece: str) -> None:
        pieces.append(piece)
        if len("".join(pieces)) == len(job.log):
            job.log += "the last line\n" * (not job.log.endswith("last line\n"))
            job.status = "SUCCEEDED"

    ended = client.follow(state.submission_id, write)
    assert head.num_drops == 0
    assert "".join(pieces) == job.log
    assert ended.exit_code == 0


def test_a_head_that_has_forgotten_the_job_is_not_waited_for(head: FakeHead) -> None:
    client = Head(head.address)
    state, _ = client.send(submission())
    head.jobs[state.submission_id].log = "x" * 200
    head.num_drops = 1

    def forget(piece: str) -> None:
        head.jobs.clear()

    with pytest.raises(ClusterError, match="does not know the job; it may have been started anew"):
        client.follow(state.submission_id, forget)


def test_a_silent_connection_is_looked_after(
    head: FakeHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "_SILENCE_S", 0.05)
    client = Head(head.address)
    state, _ = client.send(submission())
    job = head.jobs[state.submission_id]
    job.log = "one\n"
    before = head.num_asked

    def end() -> None:
        time.sleep(0.5)
        job.log += "two\n"
        job.status = "SUCCEEDED"

    threading.Thread(target=end).start()
    pieces: list[str] = []
    assert client.follow(state.submission_id, pieces.append).state == "succeeded"
    assert "".join(pieces) == "one\ntwo\n"
    assert head.num_asked - before > 5


def test_a_head_out_of_reach_for_long_is_given_up(
    head: FakeHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "_ABSENCE_S", 0.5)
    client = Head(head.address)
    state, _ = client.send(submission())
    monkeypatch.setattr(client._client, "_address", "http://127.0.0.1:9")
    with pytest.raises(ClusterError, match="the job may go on without it being followed"):
        client.follow(state.submission_id, lambda piece: None)


def test_stopping_waits_for_the_end_also_of_what_has_not_started(head: FakeHead) -> None:
    client = Head(head.address)
    state, _ = client.send(submission())
    job = head.jobs[state.submission_id]
    job.status, job.num_deaf = "PENDING", 3
    assert client.stop(state.submission_id, 10.0).exit_code == 130
    assert job.num_deaf == -1
    # What has ended is not told again.
    assert client.stop(state.submission_id, 10.0).exit_code == 130
    assert job.num_deaf == -1
    job.status, job.num_deaf = "RUNNING", 10**9
    with pytest.raises(ClusterError, match="still running 0 s after it was told to stop"):
        client.stop(state.submission_id, 0.05)


def test_a_job_is_found_by_the_beginning_of_its_name(head: FakeHead) -> None:
    client = Head(head.address)
    first, _ = client.send(submission())
    head.jobs[first.submission_id].status = "STOPPED"
    second, _ = client.send(submission())
    assert client.find(first.submission_id) == client.state(first.submission_id)
    assert client.find("digits").submission_id == second.submission_id
    client.send(submission(seed=1))
    with pytest.raises(ConfigError, match=r"job 'digits': may be .*; give more of the name"):
        client.find("digits")
    with pytest.raises(ConfigError, match=r"job 'other': .* has no such job"):
        client.find("other")


def test_the_address_comes_from_the_option_or_the_environment(
    head: FakeHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="--address: which cluster"):
        find_address(None)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ConfigError, match="--address: which cluster"):
        find_address(None)
    monkeypatch.setenv("RAY_ADDRESS", "http://one:8265")
    assert find_address(None) == "http://one:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://two:8265/")
    assert find_address(None) == "http://two:8265"
    # What is given wins, which Ray's own client sees differently.
    Head(find_address(head.address))
    assert os.environ["RAY_ADDRESS"] == "http://one:8265"
    for address in ("head:8265", "ray://head:10001", "http://", "auto"):
        with pytest.raises(ConfigError, match=r"must read http://HEAD:8265"):
            find_address(address)
    with pytest.raises(ConfigError) as caught:
        find_address("http://me:hidden@head:8265")
    assert "hidden" not in str(caught.value)


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_who_does_not_answer_is_named_in_one_line_and_in_time(
    cli: Callable[..., Done], head: FakeHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(*options: str) -> str:
        started = time.monotonic()
        done = cli("submit", "--set=storage=/shared", *options)
        assert time.monotonic() - started < 20
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ")
        return line

    assert "no Ray cluster answers there" in refusal(f"--address=http://127.0.0.1:{closed_port()}")
    # An address that swallows what is sent to it.
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        port = deaf.getsockname()[1]
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        assert "no Ray cluster answers" in refusal(f"--address=http://127.0.0.1:{port}")
        for filler in fillers:
            filler.close()
    assert "--address: which cluster?" in refusal()
    here = f"--address={head.address}"
    head.token = TOKEN
    assert "the cluster wants a token, and none was found" in refusal(here)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    assert "refuses the token of RAY_AUTH_TOKEN;" in refusal(here)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere/token")
    assert "RAY_AUTH_TOKEN_PATH = '/nowhere/token': cannot be read: No" in refusal(here)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    head.ray_version = "2.41.0"
    expected = f"the cluster runs Ray 2.41.0, and this gbp-ray works with {ray.__version__[:4]}"
    assert expected in refusal(here)
    head.ray_version, head.python_version = ray.__version__, "3.9.1"
    assert "runs Python 3.9.1, and gbp-ray needs 3.11" in refusal(here)
    assert head.jobs == {}


def test_the_token_is_found_where_ray_looks_for_it(
    head: FakeHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head.token = TOKEN
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    for name, value in [
        ("RAY_AUTH_TOKEN", TOKEN),
        ("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token")),
    ]:
        monkeypatch.setenv(name, value)
        assert Head(head.address).jobs() == []
        monkeypatch.delenv(name)
    (tmp_path / ".ray").mkdir()
    kept = tmp_path / ".ray" / "auth_token"
    kept.write_text(TOKEN)
    assert Head(head.address).jobs() == []
    kept.write_text("wrong")
    with pytest.raises(ConfigError, match=f"refuses the token of {kept}") as caught:
        Head(head.address)
    assert "wrong" not in str(caught.value)
    kept.write_text("not a\ntoken")
    with pytest.raises(ConfigError, match="holds no token, which is one word"):
        Head(head.address)
    # A head that wants none gets none where there is none.
    kept.unlink()
    head.token = None
    assert Head(head.address).jobs() == []


def test_the_verbs_say_what_they_did(cli: Callable[..., Done], head: FakeHead) -> None:
    here = f"--address={head.address}"
    sent = cli("submit", "--set=storage=/shared", "--no-wait", here)
    assert sent.returncode == 0, sent.stderr
    assert re.search(r"0 files and gbp-ray [\d.]+ go to http.*, 0\.\d MB packed", sent.stderr)
    (name,) = head.jobs
    assert f"{name}: running; results: /shared/digits" in sent.stdout
    again = cli("submit", "--set=storage=/shared", here)
    assert "running already, nothing was submitted" in again.stdout
    assert again.stderr == ""
    assert cli("status", "digits", here).returncode == 0
    head.jobs[name].log = "setting up\nerror: prune.sparsity = 2: lower it\n"
    fail(head.jobs[name], 2, head.jobs[name].log)
    status = cli("status", "digits", here, "--json")
    assert status.returncode == 2
    told = json.loads(status.stdout)
    assert (told["state"], told["exit_code"], told["submission_id"]) == ("failed", 2, name)
    assert "exit code 2: prune.sparsity = 2: lower it" in cli("status", "digits", here).stdout
    log = cli("logs", "digits", here)
    assert (log.returncode, log.stdout) == (0, head.jobs[name].log)
    followed = cli("logs", "digits", here, "--follow")
    assert (followed.returncode, followed.stdout) == (2, head.jobs[name].log)
    assert followed.stderr.splitlines()[-1] == (
        f"error: job {name} failed with exit code 2: prune.sparsity = 2: lower it"
    )
    listed = cli("jobs", here)
    assert name in listed.stdout
    assert json.loads(cli("jobs", here, "--json").stdout)["jobs"][0]["uri"] == "/shared/digits"
    head.jobs[name].status = "RUNNING"
    stopped = cli("stop", "digits", here)
    assert stopped.returncode == 0
    assert f"{name}: stopped; submit the job again to go on" in stopped.stdout
    assert "had ended before: stopped" in cli("stop", "digits", here).stdout
    assert cli("status", "digits", here).returncode == 130
    assert cli("logs", "digits", here, "-f").returncode == 130


def test_a_dry_run_asks_nobody(cli: Callable[..., Done]) -> None:
    done = cli("submit", "--set=storage=/shared", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["uri"] == "/shared/digits"
    assert told["num_bytes"] > 100_000
    assert "gbp_ray/cli/app.py" in told["files"]
    shown = cli("submit", "--set=storage=/shared", "--dry-run", "--installed").stdout
    assert "0 files, " in shown


def test_ctrl_c_leaves_the_job_alone(head: FakeHead, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "gbp_ray", "submit", "--set=storage=/shared", "--follow"],
        env={**os.environ, "HOME": str(tmp_path), "RAY_API_SERVER_ADDRESS": head.address},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Shells start background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not head.jobs:
        assert process.poll() is None
        time.sleep(0.05)
    (job,) = head.jobs.values()
    job.log = "at work\n"
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert job.status == "RUNNING"
    name = job.request["submission_id"]
    assert f"no longer followed; {name} goes on" in errors
    assert f"stop: gbp-ray stop {name}" in errors
