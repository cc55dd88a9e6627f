"""The command line: its verbs, and the exit code of each outcome.

Standard output carries only the result; progress and errors go to standard error. Exit codes: 0
done, 1 failed, 2 bad input, 130 stopped by Ctrl-C, 143 by a termination signal.
"""

from __future__ import annotations

import atexit
import gc
import io
import os
import shlex
import sys
import traceback

import typer

from gbp_ray.cli.cluster import add_cluster_verbs
from gbp_ray.cli.reading import add_reading_verbs
from gbp_ray.cli.reference import add_reference_verbs
from gbp_ray.cli.reuse import add_reuse_verbs
from gbp_ray.cli.running import add_running_verbs
from gbp_ray.cli.stability import add_stability_verb
from gbp_ray.cli.terminal import (
    note,
    prints_aside,
)
from gbp_ray.errors import GbpError, TrialError, clean_message
from gbp_ray.runtime.bootstrap import SUBMITTED
from gbp_ray.runtime.signals import STOPPED, WORDS, Terminated, watch

__all__ = [
    "app",
    "main",
]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Find out how sparse a network can be, and walk away with the pruned network.\n\n"
    "Start with [bold]gbp-ray prune[/bold]: it trains and prunes a small digit recogniser on this "
    "machine in about a minute, without any download. Then write a job file of your own: "
    "[bold]gbp-ray fields[/bold] lists what it may say, [bold]gbp-ray criteria[/bold] what can "
    "decide which weights go.",
)


add_running_verbs(app)
add_reading_verbs(app)
add_cluster_verbs(app)
add_stability_verb(app)
add_reuse_verbs(app)
add_reference_verbs(app)

for _verb in app.registered_commands:
    if _verb.callback is not None:
        _verb.callback = prints_aside()(_verb.callback)


def main() -> None:
    """Runs the command line and exits with the code that tells what happened."""
    watch()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that knows no umlauts is told their escapes.
            stream.reconfigure(errors="backslashreplace")
    # A last collection would walk over all that was imported and read, to free it at the end.
    atexit.register(gc.freeze)
    is_debug = "--debug" in sys.argv
    try:
        # Typer answers Ctrl-C by returning the code that it would have exited with.
        if app(standalone_mode=False, prog_name="gbp-ray") == STOPPED:
            raise KeyboardInterrupt
    except TrialError as error:
        # It ends with the advice to run the job again, and this is how.
        command = shlex.join(["gbp-ray", *sys.argv[1:]])
        if SUBMITTED in os.environ:
            command = "the same gbp-ray submit"
        _fail(f"{error}: {command}", error.exit_code, is_debug)
    except GbpError as error:
        _fail(str(error), error.exit_code, is_debug)
    except KeyboardInterrupt:
        _fail(WORDS[STOPPED], STOPPED, is_debug)
    except Terminated as error:
        _fail(WORDS[error.exit_code], error.exit_code, is_debug)
    except Exception as error:  # noqa: BLE001 - a bug still deserves one line
        # Typer keeps the base of its usage errors private; this method is what marks them.
        if usage := getattr(error, "format_message", None):
            if not usage():
                # Called without a verb; the help has been shown.
                raise SystemExit(2) from None
            _fail(f"{usage()} (--help shows what is allowed)", 2, is_debug)
        _fail(f"{type(error).__name__}: {error} (--debug shows where)", 1, is_debug)


def _fail(message: str, code: int, is_debug: bool) -> None:
    if is_debug:
        traceback.print_exc()
    note(f"error: {clean_message(message)}")
    raise SystemExit(code)
