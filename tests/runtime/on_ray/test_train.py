"""One trial on Ray Train against the same trial in one process, and what happens when it breaks."""

import contextlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import session_of, start, stop_by
from shell import Shell

from gbp_ray.config.cluster import ClusterConfig
from gbp_ray.config.job import load_job
from gbp_ray.errors import PruneError, WorkloadError
from gbp_ray.runtime.api import prune

pytestmark = pytest.mark.ray
logger = logging.getLogger(__name__)

QUICK = {
    "pretrain.epochs": 2,
    "finetune.epochs": 1,
    "prune.rounds": 2,
    "prune.calibration_examples": 192,
}

FAULTY_WORKLOAD = '''
"""The digits workload, with a fault in the augmentation of its training batches."""
import os, signal
from pathlib import Path

import torch
from dataclasses import replace
from gbp_ray.workloads import digits_convnet


def _faulty(flag, call, action):
    workload = digits_convnet(augment=False)
    calls = [0]

    def augment(inputs):
        # The checks before there are ranks do not count.
        if torch.distributed.is_initialized():
            calls[0] += 1
            if calls[0] == call and torch.distributed.get_rank() == 1 and not Path(flag).exists():
                action(Path(flag))
        return inputs

    return replace(workload, augment=augment)


def dies_once(flag):
    def die(flag):
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    return _faulty(flag, 90, die)


def always_raises(flag):
    def fail(flag):
        raise ZeroDivisionError("the data ran out of luck")

    return _faulty(flag, 3, fail)


def sound(flag):
    return replace(digits_convnet(augment=False), augment=lambda inputs: inputs)
'''


@pytest.fixture(scope="module")
def ray_session():
    from gbp_ray.runtime.on_ray.session import ray_session

    with ray_session(ClusterConfig(num_workers=4), is_debug=False):
        yield


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    (tmp_path / "faulty_workload.py").write_text(FAULTY_WORKLOAD)
    monkeypatch.delitem(sys.modules, "faulty_workload", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)

    def run(factory: str, num_workers: int, max_failures: int):
        job = load_job(
            None,
            QUICK
            | {
                "name": f"{factory}-{num_workers}",
                "storage": str(tmp_path / "results"),
                "workload.factory": f"faulty_workload:{factory}",
                "workload.options": {"flag": str(tmp_path / "flag")},
                "cluster.num_workers": num_workers,
                "cluster.max_failures": max_failures,
            },
        )
        return prune(job, is_quiet=True)

    return run


def outcome(result) -> list[tuple[str, str, float]]:
    return [
        (r.mask_digest, r.files["weights.safetensors"].sha256, r.accuracy)
        for r in result.record.rounds
    ]


def test_what_ends_a_worker_is_survived_or_told(ray_session, faulty, tmp_path, capfd):
    """Joined, as Ray takes half a minute to start."""
    # A killed worker costs no more than its round, and workers change nothing.
    survived = faulty("dies_once", 2, max_failures=1)
    assert (Path(survived.uri).parents[3] / "flag").exists(), "the worker never died"
    assert outcome(survived) == outcome(faulty("sound", 0, max_failures=0))
    assert survived.sparsity == pytest.approx(0.9, abs=1e-4)

    # A failing worker ends the trial with its own error.
    (tmp_path / "flag").unlink()
    capfd.readouterr()
    with pytest.raises(
        WorkloadError, match="ZeroDivisionError: the data ran out of luck"
    ) as caught:
        faulty("always_raises", 2, max_failures=2)
    assert "starting the workers again" not in capfd.readouterr().err
    assert "\n" not in str(caught.value)

    # What the package itself refuses arrives as it was raised.
    refused = {"storage": str(tmp_path), "pretrain.learning_rate": 1e30, "cluster.num_workers": 1}
    job = load_job(None, QUICK | refused)
    with pytest.raises(PruneError, match=r"pretrain: .*pretrain\.learning_rate"):
        prune(job)
    told = capfd.readouterr().err
    assert "starting 1 worker" in told
    assert "starting the workers again" not in told, "a bad input was retried"


ON_RAY, ALONE = "--set=cluster.num_workers=1", "--set=cluster.num_workers=0"


def words(storage: Path, name: str) -> list[str]:
    settings = QUICK | {"storage": storage, "name": name}
    return ["prune", "--json", *(f"--set={key}={value}" for key, value in settings.items())]


def command(storage: Path, name: str) -> list[str]:
    return [sys.executable, "-m", "gbp_ray", *words(storage, name), ON_RAY]


def undisturbed(shell: Shell, storage: Path) -> tuple[str, str]:
    return final_round(*shell(*words(storage, "whole"), ALONE))


def final_round(code: int, out: str, errors: str) -> tuple[str, str]:
    assert code == 0, errors
    record = json.loads(out)["rounds"][-1]
    return record["mask_digest"], record["files"]["weights.safetensors"]["sha256"]


@pytest.mark.skipif(
    "GBP_RAY_KILLS" not in os.environ,
    reason="test_tune kills Ray and its driver, test_kills a trial; set GBP_RAY_KILLS to try it",
)
def test_kills_and_signals_at_any_moment_cost_no_more_than_a_round(shell, tmp_path):
    check_kills(shell, tmp_path)
    (tmp_path / "signals").mkdir()
    check_signals_while_ray_starts(tmp_path / "signals")


def check_kills(shell: Shell, tmp_path: Path) -> None:
    """Kills every process at GBP_RAY_KILLS random moments; the job run again has the same mask."""
    moments = random.Random(os.environ.get("GBP_RAY_KILL_SEED", "3"))
    wanted = undisturbed(shell, tmp_path)
    for number in range(int(os.environ["GBP_RAY_KILLS"])):
        job, folder = command(tmp_path, f"killed{number}"), tmp_path / f"killed{number}"
        num_whole, extra_s = moments.randrange(QUICK["prune.rounds"] + 1), moments.uniform(0.0, 1.0)
        # Before the first round most of the time goes into starting Ray and training.
        delay_s = extra_s * 15 if num_whole == 0 else extra_s * 3
        while not kill_after(num_whole, delay_s, job, folder):
            delay_s /= 2
            shutil.rmtree(folder)
        logger.info("killed %.1f s after round %d of the first", delay_s, num_whole)
        assert not list(folder.glob("trials/*/trial.json"))
        again = subprocess.run(job, capture_output=True, text=True)
        assert final_round(again.returncode, again.stdout, again.stderr) == wanted


def kill_after(num_whole: int, delay_s: float, job: list[str], folder: Path) -> bool:
    """Kills a job with all its processes after so many rounds; False where it had ended."""
    process = subprocess.Popen(
        job, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while process.poll() is None and len(whole_rounds(folder)) < num_whole:
        time.sleep(0.05)
    time.sleep(delay_s)
    if process.poll() is not None:
        return False
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return not list(folder.glob("trials/*/trial.json"))


def whole_rounds(folder: Path) -> list[Path]:
    return list(folder.glob("trials/*/*/round.json"))


def addresses_of(processes: set[int]) -> dict[str, str]:
    """Finds where processes listen: the address in hex, as Linux gives it, to a command."""
    sockets = {}
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                sockets[f"socket:[{fields[9]}]"] = fields[1]
    found = {}
    for pid in processes:
        with contextlib.suppress(OSError):
            for handle in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError, KeyError):
                    address = sockets[str(handle.readlink())]
                    found[address] = Path(f"/proc/{pid}/cmdline").read_text()[:200]
    return found


LOOPBACK = ("0100007F:", "0000000000000000FFFF00000100007F:", "00000000000000000000000001000000:")


def test_ctrl_c_ends_everything_that_was_started_and_the_job_goes_on_when_run_again(
    shell, tmp_path
):
    token_file = Path.home() / ".ray" / "auth_token"
    had_token = token_file.exists()
    process = start(tmp_path, *words(tmp_path, "stopped"), "--set=cluster.num_workers=2")
    assert process.stderr is not None
    for line in process.stderr:
        if "dense  accuracy" in line:
            break
    started = session_of(process.pid)
    # Ray, its agents, the workers and their rendezvous are there for this machine alone.
    listening = addresses_of(started)
    assert any("ray::" in name for name in listening.values())
    assert any("raylet" in name for name in listening.values())
    assert {a: c for a, c in listening.items() if not a.startswith(LOOPBACK)} == {}
    environment = Path(f"/proc/{min(started - {process.pid})}/environ").read_bytes()
    assert b"RAY_AUTH_MODE=token" in environment
    assert b"RAY_AUTH_TOKEN=" in environment
    assert token_file.exists() == had_token
    stop_by(process, signal.SIGINT, tmp_path)
    assert 1 <= len(whole_rounds(tmp_path / "stopped")) <= QUICK["prune.rounds"]
    # Any number of workers may go on; without any, Ray need not start again.
    again = shell(*words(tmp_path, "stopped"), ALONE)
    assert "goes on after round" in again.err
    assert final_round(*again) == undisturbed(shell, tmp_path)


def check_signals_while_ray_starts(tmp_path: Path) -> None:
    """Signals end the command; test_signals tries the same without Ray."""
    moments = random.Random(os.environ.get("GBP_RAY_KILL_SEED", "5"))
    for count in range(int(os.environ["GBP_RAY_KILLS"])):
        number = (signal.SIGINT, signal.SIGTERM)[count % 2]
        process = start(tmp_path, *words(tmp_path, f"signal{count}"), ON_RAY)
        assert process.stderr is not None
        for line in process.stderr:
            if "starting 1 worker" in line:
                break
        delay_s = moments.random() * 20
        time.sleep(delay_s)
        took_s, _ = stop_by(process, number, tmp_path)
        logger.info("%s %.1f s after Ray began to start took %.1f s", number.name, delay_s, took_s)
        assert not list(tmp_path.rglob("driver.lock"))
