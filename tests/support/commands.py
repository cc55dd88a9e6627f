"""Commands as processes of their own, in a session as from a terminal, and what ends them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO

PATIENCE_S = 60.0
"""For machines with much else to do; `stopping` itself waits 12 s."""


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Starts a command in a session of its own, as from a terminal."""
    return subprocess.Popen(
        [sys.executable, "-m", "gbp_ray", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_hear_all,
    )


def _hear_all() -> None:
    """Undoes what children inherit: background jobs ignore SIGINT, and those of nohup SIGHUP."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Forked:
    """A command in a process forked where torch is loaded: seconds sooner than a new one."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        context = multiprocessing.get_context("forkserver")
        (out, its_out), (errors, its_errors) = (context.Pipe(duplex=False) for _ in range(2))
        self._process = context.Process(
            target=_run, args=(str(folder), arguments, its_out, its_errors), daemon=True
        )
        self._process.start()
        its_out.close()
        its_errors.close()
        self.out, self.errors = _as_text(out), _as_text(errors)

    def end_by(self, number: int) -> int:
        """Sends a signal and waits for the end; returns the exit code."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)
        self._process.join(PATIENCE_S)
        assert self._process.exitcode is not None, "it does not end"
        return self._process.exitcode


def _as_text(end: Connection) -> IO[str]:
    with end:
        return os.fdopen(os.dup(end.fileno()))


def _run(folder: str, arguments: tuple[str, ...], out: Connection, errors: Connection) -> None:
    os.setsid()
    os.dup2(out.fileno(), 1)
    os.dup2(errors.fileno(), 2)
    for end in (out, errors):
        end.close()
    # Those of the server may have been files.
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    os.chdir(folder)
    sys.argv = ["gbp-ray", *arguments]
    _hear_all()
    from gbp_ray.__main__ import main

    main()


def wait_until_watching(process: subprocess.Popen[str]) -> None:
    """Waits for the first instruction of the command: before it there is only Python's start."""
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        caught = int(status.read_text().partition("SigCgt:")[2].split()[0], 16)
        if caught & 1 << (signal.SIGTERM - 1):
            return
        time.sleep(0.001)
    raise AssertionError(process.communicate()[1])


def session_of(leader: int) -> set[int]:
    """Finds the live processes of a session."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.add(int(folder.name))
    return found


def stop_by(process: subprocess.Popen[str], number: int, folder: Path) -> tuple[float, str]:
    """Sends a signal to all of a session, and checks what must be true of any end by it."""
    sent_s = time.monotonic()
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=PATIENCE_S)
    took_s = time.monotonic() - sent_s
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors, errors
    assert errors.splitlines()[-1].startswith("error: ")
    assert errors.endswith("; run the same command again to go on\n")
    assert session_of(process.pid) == set()
    assert not list(folder.rglob("*.part*"))
    return took_s, errors
