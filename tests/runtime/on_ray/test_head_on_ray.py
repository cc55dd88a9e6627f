"""Jobs on a real head that wants a token: exit codes, and what a user may get wrong.

The default suite starts one head and runs three short jobs at a time; GBP_RAY_HEAD asks for the
rest, which takes some minutes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import gbp_ray
from gbp_ray.config.job import load_job, trial_id
from gbp_ray.results.store import Store
from gbp_ray.runtime.on_ray.head import Head
from gbp_ray.runtime.progress import CHECKED
from gbp_ray.runtime.submission import prepare_submission

pytestmark = pytest.mark.ray
whole_suite = pytest.mark.skipif(
    "GBP_RAY_HEAD" not in os.environ,
    reason="takes some minutes; set GBP_RAY_HEAD to try it",
)

CODE = '''
"""The digits, and a job that waits until it is told to go on."""
import time
from dataclasses import replace
from pathlib import Path

from gbp_ray.workloads import digits_convnet


def digits():
    return digits_convnet(width=4, augment=False)


def patient(flag):
    calls = [0]

    def augment(inputs):
        # The checks before the work augment as well.
        calls[0] += 1
        while calls[0] > 20 and not Path(flag).exists():
            time.sleep(0.1)
        return inputs

    return replace(digits(), augment=augment)
'''
JOB = """
workload.factory = "code_of_a_test:digits"
pretrain.epochs = 1
cluster.num_workers = 0
name = "tiny"

[prune]
criterion = "magnitude"
sparsity = 0.5
batchnorm_examples = 64
"""
# What the environment of whoever runs the tests would change.
CLEARED = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@dataclass
class Cluster:
    """A head of its own, and a user who knows its token."""

    address: str
    environment: dict[str, str]
    folder: Path

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs gbp-ray in the user's folder."""
        return subprocess.run(
            [sys.executable, "-m", "gbp_ray", *arguments],
            cwd=self.folder,
            env=self.environment | environment,
            capture_output=True,
            text=True,
        )

    def settings(self, name: str, **fields: object) -> list[str]:
        """Words the settings of a job of its own name and storage folder."""
        own = {"name": name, "storage": str(self.folder / "results")} | fields
        return [f"--set={key.replace('__', '.')}={value}" for key, value in own.items()]


def free_port() -> int:
    # Ray's own range for workers must stay clear of the others.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def start_head(folder: Path, **environment: str) -> Iterator[Cluster]:
    """Runs `ray start --head` with a token of its own until the block ends."""
    token_file = folder / "token"
    token_file.write_text(secrets.token_hex(16))
    port, address = free_port(), f"http://127.0.0.1:{(dashboard := free_port())}"
    mine = {key: value for key, value in os.environ.items() if key not in CLEARED}
    mine |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)}
    # As in an activated environment, and with this checkout first where it is not installed.
    python = Path(sys.executable)
    root = str(Path(gbp_ray.__file__).parents[1])
    mine |= {"PATH": f"{python.parent}:{os.environ['PATH']}", "PYTHONPATH": root}
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += ["--num-cpus=4", "--disable-usage-stats", "--include-dashboard=true"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--port={port}"]
    # Another Ray on this machine may have the usual one.
    command += [f"--dashboard-agent-listen-port={free_port()}"]
    # Names of sockets have room for a short path alone.
    scratch = Path(tempfile.mkdtemp(prefix="gbp-"))
    command += [f"--temp-dir={scratch}", f"--ray-client-server-port={free_port()}"]
    with (folder / "head.log").open("w") as log:
        # Not in this folder, whose package would be found without being sent.
        head = subprocess.Popen(
            command,
            cwd=folder,
            env=mine | environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    work = folder / "work"
    work.mkdir()
    (work / "code_of_a_test.py").write_text(CODE)
    (work / "job.toml").write_text(JOB)
    try:
        deadline = time.monotonic() + 120
        request = urllib.request.Request(
            f"{address}/api/version",
            headers={"Authorization": f"Bearer {token_file.read_text()}"},
        )
        while True:
            try:
                urllib.request.urlopen(request, timeout=5).close()
                break
            except OSError:
                assert head.poll() is None, (folder / "head.log").read_text()
                assert time.monotonic() < deadline, "the head does not answer"
                time.sleep(0.5)
        yield Cluster(address, mine | {"RAY_API_SERVER_ADDRESS": address}, work)
    finally:
        # The head drains its node for half a minute when asked nicely.
        os.killpg(head.pid, signal.SIGKILL)
        head.wait()
        for line in processes_of(scratch):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(line.split()[0]), signal.SIGKILL)
        shutil.rmtree(scratch, ignore_errors=True)


def processes_of(folder: Path) -> list[str]:
    listed = subprocess.run(
        ["ps", "-ww", "-o", "pid=,args=", "-e"], capture_output=True, text=True, check=True
    )
    return [line for line in listed.stdout.splitlines() if f"{folder}/" in line]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with start_head(tmp_path_factory.mktemp("head")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def head(cluster: Cluster) -> Iterator[Head]:
    patch = pytest.MonkeyPatch()
    for name in (*CLEARED, "RAY_AUTH_MODE"):
        patch.delenv(name, raising=False)
    patch.setenv("RAY_AUTH_TOKEN_PATH", cluster.environment["RAY_AUTH_TOKEN_PATH"])
    yield Head(cluster.address)
    patch.undo()


def last_error(done: subprocess.CompletedProcess[str]) -> str:
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: "), done.stderr + done.stdout
    return line


def test_exit_codes_of_jobs_that_succeed_fail_and_are_stopped(cluster: Cluster, head: Head) -> None:
    flag = cluster.folder / "flag of a job that waits"
    patient = cluster.settings(
        "patient",
        workload__factory="code_of_a_test:patient",
        workload__options=f'{{ flag = "{flag}" }}',
    )

    def stop_it() -> list[subprocess.CompletedProcess[str]]:
        waiting = cluster.run("submit", "job.toml", *patient)
        again = cluster.run("submit", "job.toml", *patient, "--json")
        return [waiting, again, cluster.run("stop", "patient")]

    good = cluster.settings("good")
    bad = cluster.settings("bad", workload__factory="code_of_a_test:digitz")
    with ThreadPoolExecutor(3) as pool:
        done = pool.submit(cluster.run, "submit", "job.toml", *good, "--follow")
        failed = pool.submit(cluster.run, "submit", "job.toml", *bad)
        waiting, again, stopped = pool.submit(stop_it).result()
        done, failed = done.result(), failed.result()
    # 0: it succeeded, and its log and its result are here.
    assert done.returncode == 0, done.stderr + done.stdout
    assert "round 1  sparsity 0.5000" in done.stdout
    record = load_job(cluster.folder / "job.toml", {"name": "good"})
    store = Store(cluster.folder / "results", "good")
    assert store.read_trial(trial_id(record)) is not None
    assert head.find("good").exit_code == 0
    # The driver's own: bad input is 2.
    assert failed.returncode == 2
    assert "'code_of_a_test' has no 'digitz', did you mean 'digits'?" in last_error(failed)
    assert cluster.run("status", "bad").returncode == 2
    # 130: it was stopped, after it had been found running.
    assert waiting.returncode == 0, waiting.stderr
    assert "running; results:" in waiting.stdout
    assert again.returncode == 0, again.stderr
    told = json.loads(again.stdout)
    assert (told["is_new"], told["state"]) == (False, "running")
    assert stopped.returncode == 0, stopped.stderr
    # It had the time to say so, and gave back its lease.
    told = cluster.run("logs", "patient", "--follow")
    assert told.returncode == 130
    assert told.stdout.splitlines()[-1].startswith("error: terminated; run the same command")


def check_a_stopped_job_goes_on(cluster: Cluster) -> None:
    """It ends with the mask of a job that nobody stopped."""
    quick = {"prune.rounds": 6, "finetune.epochs": 2, "prune.criterion": "taylor"}
    fields = {key.replace(".", "__"): value for key, value in quick.items()}
    whole = cluster.run("submit", "job.toml", *cluster.settings("whole", **fields), "--follow")
    assert whole.returncode == 0, whole.stderr
    broken = cluster.settings("broken", **fields)
    job = load_job(
        cluster.folder / "job.toml",
        quick | {"name": "broken", "storage": str(cluster.folder / "results")},
    )
    assert cluster.run("submit", "job.toml", *broken).returncode == 0
    store = Store(job.storage, "broken")
    while len(store.read_rounds(trial_id(job))) < 3:
        time.sleep(0.1)
    assert cluster.run("stop", "broken").returncode == 0
    assert store.read_trial(trial_id(job)) is None
    again = cluster.run("submit", "job.toml", *broken, "--follow")
    assert again.returncode == 0, again.stderr
    assert re.search(r"goes on after round [2-5]", again.stdout)
    assert f"{trial_id(job)}-2: succeeded" in again.stdout
    digests = [
        Store(job.storage, name).read_trial(trial_id(job)).final.mask_digest  # type: ignore[union-attr]
        for name in ("whole", "broken")
    ]
    assert digests[0] == digests[1]


def check_a_sweep(cluster: Cluster) -> None:
    space = "sweep.space.prune.sparsity=[0.5, 0.7]"
    done = cluster.run(
        "submit",
        "job.toml",
        *cluster.settings("swept", cluster__num_workers=1),
        f"--set={space}",
        "--follow",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["kind"], told["state"], told["exit_code"]) == ("sweep", "succeeded", 0)
    assert "2 trials: 2 finished" in done.stderr
    assert len(gbp_ray.open_results(told["uri"]).final()) == 2


def check_a_job_that_has_not_started_stops(cluster: Cluster, head: Head) -> None:
    job = cluster.folder / "job.toml"
    state, _ = head.send(prepare_submission(job, {"storage": "/shared", "name": "early"}))
    assert state.state == "pending"
    stopped = head.stop(state.submission_id, 60.0)
    assert (stopped.state, stopped.exit_code) == ("stopped", 130)
    assert CHECKED not in head.read_log(state.submission_id)


def attempt(cluster: Cluster, *arguments: str, code: int = 2, **environment: str) -> str:
    started = time.monotonic()
    done = cluster.run("submit", "job.toml", *arguments, **environment)
    took = time.monotonic() - started
    assert done.returncode == code, done.stderr + done.stdout
    assert took < float(os.environ.get("GBP_RAY_HEAD_LIMIT_S", "30"))
    return last_error(done)


def check_wrong_submissions(cluster: Cluster) -> None:
    """They end in one line and in time."""
    own = cluster.settings("wrong")
    assert "no Ray cluster answers there" in attempt(
        cluster, *own, f"--address=http://127.0.0.1:{free_port()}"
    )
    assert "refuses the token" in attempt(cluster, *own, RAY_AUTH_TOKEN="wrong")
    assert "'nowhere.toml' does not exist" in last_error(cluster.run("submit", "nowhere.toml"))
    (cluster.folder / "broken.py").write_text("import nothing_of_this_name\n")
    factory = cluster.settings("wrong", workload__factory="broken:digits")
    assert "no module named 'nothing_of_this_name'" in attempt(cluster, *factory)
    # Another job's folder.
    Store(cluster.folder / "results", "taken").claim(load_job())
    taken = attempt(cluster, *cluster.settings("taken"))
    assert "holds results of another job, whose workload.factory = 'gbp_ray.zoo" in taken
    # A folder that cannot be written.
    nowhere = cluster.settings("wrong", storage="/proc/results")
    assert "storage: cannot write '/proc/results" in attempt(cluster, *nowhere)


def check_another_version_on_the_nodes(
    cluster: Cluster, head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gbp_ray.runtime import submission

    monkeypatch.setattr(submission, "__version__", "9.9.9")
    sent = submission.prepare_submission(
        cluster.folder / "job.toml", {"storage": "/shared", "name": "other"}, is_installed=True
    )
    state, _ = head.send(sent)
    state = head.await_checks(state.submission_id)
    assert state.exit_code == 2
    assert "has gbp-ray 0.1.0, and 9.9.9 submitted the job" in state.reason


def check_a_full_disk(cluster: Cluster, tmp_path: Path) -> None:
    """Only where a file system of 24 kB can be mounted."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", tmp_path], capture_output=True
    )
    if done.returncode:
        return
    try:
        full = cluster.settings("full", storage=str(tmp_path))
        assert "no room on disk for" in attempt(cluster, *full, "--follow")
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@contextmanager
def start_s3_head(endpoint: str, folder: Path) -> Iterator[tuple[Cluster, str]]:
    """Starts a head whose nodes know several credentials, of which a job chooses by name."""
    key, secret = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
    guest = os.environ.get("GBP_RAY_S3_GUEST", ":").split(":")
    (folder / "credentials").write_text(
        "".join(
            f"[{name}]\naws_access_key_id = {one}\naws_secret_access_key = {other}\n"
            for name, one, other in [
                ("default", key, secret),
                ("wrong", key, "not-it"),
                ("unknown", "nobody", secret),
                ("guest", *guest),
            ]
        )
    )
    more = {"AWS_SHARED_CREDENTIALS_FILE": str(folder / "credentials")}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
            patch.delenv(name, raising=False)
        with start_head(folder, **more) as cluster:
            url = endpoint if "://" in endpoint else f"http://{endpoint}"
            cluster.environment |= {"AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1"}
            yield cluster, secret


def check_s3_by_the_credentials_of_the_nodes(cluster: Cluster, secret: str) -> None:
    unique = secrets.token_hex(4)

    def on(bucket: str) -> list[str]:
        return cluster.settings(f"s3-{unique}", storage=f"s3://{bucket}/submitted")

    assert "there is no bucket 'nowhere'" in attempt(cluster, *on("nowhere"))
    profile = "--env=AWS_PROFILE"
    wrong = attempt(cluster, *on("gbp"), profile, AWS_PROFILE="wrong")
    assert "the server refuses the credentials (SignatureDoesNotMatch)" in wrong
    unknown = attempt(cluster, *on("gbp"), profile, AWS_PROFILE="unknown")
    assert "the server refuses the credentials (InvalidAccessKeyId)" in unknown
    if "GBP_RAY_S3_GUEST" in os.environ:
        forbidden = attempt(cluster, *on("gbp"), profile, AWS_PROFILE="guest")
        assert "the credentials need s3:GetObject on arn:aws:s3:::gbp/submitted" in forbidden
    done = cluster.run("submit", "job.toml", *on("gbp"), "--follow", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["uri"] == f"s3://gbp/submitted/s3-{unique}"
    # What the head shows of the jobs, and what they have said, holds no secret.
    request = urllib.request.Request(
        f"{cluster.address}/api/jobs/",
        headers={
            "Authorization": "Bearer "
            + Path(cluster.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        },
    )
    with urllib.request.urlopen(request) as answer:
        shown = answer.read().decode()
    assert f"s3-{unique}" in shown
    assert secret not in shown + done.stderr


@whole_suite
def test_jobs_stop_go_on_sweep_and_are_refused(
    cluster: Cluster, head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_a_stopped_job_goes_on(cluster)
    check_a_sweep(cluster)
    check_a_job_that_has_not_started_stops(cluster, head)
    check_wrong_submissions(cluster)
    (tmp_path / "full").mkdir()
    check_a_full_disk(cluster, tmp_path / "full")
    check_another_version_on_the_nodes(cluster, head, monkeypatch)
    if endpoint := os.environ.get("GBP_RAY_S3_ENDPOINT"):
        (tmp_path / "s3").mkdir()
        with start_s3_head(endpoint, tmp_path / "s3") as (s3_cluster, secret):
            check_s3_by_the_credentials_of_the_nodes(s3_cluster, secret)
