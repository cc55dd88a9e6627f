"""Ctrl-C and termination of a command, from its first instruction to its last.

Python's own handling is not enough: an import may swallow the exception or show a traceback, and a
main thread that waits inside a library gets none. So a thread receives each signal first. A command
whose work has not begun ends at once. Otherwise KeyboardInterrupt or `Terminated` is raised in the
main thread as soon as it imports nothing, and the command has `_PATIENCE_S` to clean up. A second
signal, or the end of that time, kills the process and all that it has started.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

__all__ = [
    "STOPPED",
    "WORDS",
    "Terminated",
    "descendants",
    "end",
    "is_watching",
    "kill",
    "settle",
    "watch",
]

STOPPED = 128 + signal.SIGINT

WORDS = {
    STOPPED: "stopped; run the same command again to go on",
    128 + signal.SIGTERM: "terminated; run the same command again to go on",
    128 + signal.SIGHUP: "the terminal was closed; run the same command again to go on",
}
"""The messages by exit code."""

_PATIENCE_S = 12.0
_DEATH_S = 2.0
_POLL_S = 0.02
_ONE_S = 0.5
"""Signals closer together count as one: a terminal and a supervisor may both send it."""

_BY_HANDLER = 0x80
_PACKAGE = str(Path(__file__).resolve().parents[1]) + os.sep
_IMPORT = "<frozen importlib._bootstrap>"
_BEFORE_WORK = ("__init__", "__main__", "cli/", "runtime/__init__", "runtime/signals")
"""Modules that leave nothing to clean up."""


class Terminated(BaseException):
    """A termination signal arrived; `exit_code` is the one to end with."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


class _State:
    is_watching = False
    is_over = False
    is_delivering = False
    num_own = 0
    pipe = (-1, -1)
    ending = threading.Lock()


def is_watching() -> bool:
    """True in a command, False in a notebook that calls the package."""
    return _State.is_watching


def watch() -> None:
    """Handles these signals for the rest of the process; call it in the main thread."""
    if _State.is_watching:
        return
    _State.is_watching = True
    reading, writing = _State.pipe = os.pipe()
    os.set_blocking(writing, False)
    for number in (code - 128 for code in WORDS):
        # Background processes of a shell ignore Ctrl-C, and those of nohup a closed terminal.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _handle)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget)
    threading.Thread(target=_listen, args=(reading,), name="gbp-ray-signals", daemon=True).start()


def settle() -> None:
    """Marks the command as over: a later signal ends the process at once."""
    _State.is_over = True


def end(number: int) -> None:
    """Kills this process and all that it has started."""
    if not _State.ending.acquire(blocking=False):
        return
    kill(descendants())
    with contextlib.suppress(OSError):
        # A progress display hides the cursor.
        show_cursor = "\x1b[?25h\n" if os.isatty(2) else ""
        os.write(2, f"{show_cursor}error: {WORDS[128 + number]}\n".encode())
    os._exit(128 + number)


def descendants(parents: Iterable[int] | None = None) -> set[tuple[int, str]]:
    """Lists all descendants as (process id, start time); none without /proc.

    Args:
        parents: Whose; by default those of this process.
    """
    starts: dict[int, str] = {}
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = _read_stat(folder.name)
            starts[int(folder.name)] = fields[19]
            children.setdefault(int(fields[1]), []).append(int(folder.name))
    found: set[tuple[int, str]] = set()
    waiting = [os.getpid()] if parents is None else list(parents)
    while waiting:
        for pid in children.get(waiting.pop(), []):
            found.add((pid, starts[pid]))
            waiting.append(pid)
    return found


def _read_stat(pid: int | str) -> list[str]:
    """Reads the fields of /proc/PID/stat from the state on."""
    # The process name before the last bracket may hold any character.
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()


def kill(processes: set[tuple[int, str]]) -> None:
    """Kills those of the processes that still run, and waits a moment for their end."""
    deadline_s = time.monotonic() + _DEATH_S
    while time.monotonic() < deadline_s:
        num_alive = 0
        for pid, started in processes:
            with contextlib.suppress(OSError, IndexError):
                fields = _read_stat(pid)
                if fields[0] != "Z" and fields[19] == started:
                    os.kill(pid, signal.SIGKILL)
                    num_alive += 1
        if num_alive == 0:
            break
        time.sleep(_POLL_S)


def _handle(number: int, frame: FrameType | None) -> None:
    if _State.is_over:
        end(number)
    if not _State.is_delivering:
        # Repeated here, since a library may have replaced the wakeup pipe.
        with contextlib.suppress(OSError):
            os.write(_State.pipe[1], bytes([number | _BY_HANDLER]))
        return
    _State.is_delivering = False
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated(128 + number)


def _forget() -> None:
    """Restores Python's own handlers in a forked child."""
    _State.is_watching = False
    signal.set_wakeup_fd(-1)
    for number in (code - 128 for code in WORDS):
        if signal.getsignal(number) is _handle:
            is_ctrl_c = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if is_ctrl_c else signal.SIG_DFL)
    for end_of_pipe in _State.pipe:
        os.close(end_of_pipe)


def _listen(reading: int) -> None:
    first_s = None
    while data := os.read(reading, 1):
        number, now_s = data[0] & ~_BY_HANDLER, time.monotonic()
        if 128 + number not in WORDS:
            continue
        if first_s is None:
            first_s = now_s
            threading.Thread(target=_interrupt, args=(number,), daemon=True).start()
        elif data[0] & _BY_HANDLER:
            continue
        elif _State.num_own:
            _State.num_own -= 1
        elif now_s - first_s > _ONE_S:
            end(number)


def _interrupt(number: int) -> None:
    main = threading.main_thread().ident
    assert main is not None
    deadline_s = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline_s:
        is_importing, is_at_work = _look_at(sys._current_frames().get(main))
        if _State.is_over or not is_at_work:
            end(number)
        if not is_importing:
            break
        time.sleep(_POLL_S)
    _State.num_own += 1
    _State.is_delivering = True
    signal.pthread_kill(main, number)
    time.sleep(max(0.0, deadline_s - time.monotonic()))
    end(number)


def _look_at(frame: FrameType | None) -> tuple[bool, bool]:
    """Returns (the main thread imports something, its work has begun)."""
    files = []
    while frame is not None:
        files.append(frame.f_code.co_filename)
        frame = frame.f_back
    files.reverse()
    is_importing = _IMPORT in files
    callers = files[: files.index(_IMPORT)] if is_importing else files
    own = [name.removeprefix(_PACKAGE) for name in callers if name.startswith(_PACKAGE)]
    return is_importing, any(not name.startswith(_BEFORE_WORK) for name in own)
