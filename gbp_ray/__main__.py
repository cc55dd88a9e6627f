"""Entry point of `gbp-ray` and `python -m gbp_ray`; handles signals from the first import on."""

from __future__ import annotations

import contextlib
import os
import sys

from gbp_ray.runtime.signals import WORDS, settle, watch


def main() -> None:
    """Runs the command line; ends the process at once after a stop."""
    watch()
    from gbp_ray.cli.app import main as run

    try:
        run()
    except SystemExit as ending:
        if ending.code in WORDS:
            # A normal exit would wait for threads that are still at work.
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(int(ending.code))
        raise
    finally:
        settle()


if __name__ == "__main__":
    main()
