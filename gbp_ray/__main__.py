"""`python -m gbp_ray` and `gbp-ray`: the command line, under the watch of `stopping`."""

from __future__ import annotations

import contextlib
import os
import sys

from gbp_ray.runtime.signals import WORDS, settle, watch


def main() -> None:
    """Runs the command line in this process, and ends the process where it was stopped."""
    watch()
    from gbp_ray.cli.app import main as run

    try:
        run()
    except SystemExit as ending:
        if ending.code in WORDS:
            # What else is tidied up at an exit waits for threads that work on.
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(int(ending.code))
        raise
    finally:
        settle()


if __name__ == "__main__":
    main()
