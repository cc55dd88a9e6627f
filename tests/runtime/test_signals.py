"""Ctrl-C and SIGTERM at any moment of a command, from its imports on; GBP_RAY_KILLS asks for more.

`on_ray/test_train.py` does the same while Ray starts and runs.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from commands import PATIENCE_S, session_of, start, stop_by, wait_until_watching

logger = logging.getLogger(__name__)

# Longer than any delay: a command that is about to end may end well whatever arrives.
LONG = ("--set=pretrain.epochs=300", "--set=cluster.num_workers=0", "--quiet")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_signals_end_a_command_at_any_moment(tmp_path: Path) -> None:
    moments = random.Random(os.environ.get("GBP_RAY_KILL_SEED", "7"))
    for count in range(int(os.environ.get("GBP_RAY_KILLS", "3"))):
        number = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[count % 3]
        # The first third of a second imports the command line, the next seconds torch.
        delay_s = moments.random() ** 2 * 6
        folder = tmp_path / str(count)
        folder.mkdir()
        process = start(folder, "prune", *LONG)
        wait_until_watching(process)
        time.sleep(delay_s)
        took_s, _ = stop_by(process, number, folder)
        logger.info("%s after %.2f s took %.2f s", number.name, delay_s, took_s)
        assert not list(folder.rglob("driver.lock"))


PROGRAM = """
import sys, time
sys.path[:0] = {paths!r}
from gbp_ray.runtime import signals
signals.watch()
print("ready", file=sys.stderr, flush=True)
# As if it were the package's own work, which is not simply broken off.
exec(compile({work!r}, signals.__file__.replace("signals", "work"), "exec"))
"""
DEAF = """
while True:
    try:
        time.sleep(60)
    except BaseException:
        pass
"""


def program(work: str, **options: Any) -> subprocess.Popen[str]:
    root = str(Path(__file__).resolve().parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(paths=[root], work=work)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **options,
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    return process


def test_a_second_signal_ends_what_does_not_hear_the_first_with_all_that_it_started() -> None:
    start_child = "import subprocess; subprocess.Popen(['sleep', '600']);"
    process = program(f"{start_child} print('started', file=sys.stderr, flush=True)\n{DEAF}")
    assert process.stderr is not None
    assert process.stderr.readline() == "started\n"
    assert len(session_of(process.pid)) == 2
    process.send_signal(signal.SIGTERM)
    # What a supervisor sends twice at once is one signal.
    process.send_signal(signal.SIGTERM)
    time.sleep(1.0)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert errors == "error: stopped; run the same command again to go on\n"
    assert session_of(process.pid) == set()


@pytest.mark.parametrize(
    "work",
    [
        # Inside a library that hears nothing, and in a child that is forked.
        "import os; os.fork() or time.sleep(600); time.sleep(600)",
        "import threading; threading.Lock().acquire(); threading.Event().wait()",
    ],
    ids=["forked", "waiting"],
)
def test_one_signal_ends_what_hears_it(work: str) -> None:
    process = program(work)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode != 0
    # Its child has closed all it had open a moment before it is gone.
    deadline = time.monotonic() + PATIENCE_S
    while session_of(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert session_of(process.pid) == set()
