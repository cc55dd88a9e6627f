"""The errors a caller may meet: one small tree, decided here for every other module.

Each error carries one line that names the field, says what is allowed and what to do, and plain
attributes beside it. Only strings and numbers go in, so an error crosses process borders by pickle
exactly as it was raised.
"""

from __future__ import annotations

__all__ = [
    "BusyError",
    "ClusterError",
    "ConfigError",
    "ExportError",
    "GbpError",
    "PruneError",
    "StoreError",
    "TransientStoreError",
    "TrialError",
    "WorkloadError",
    "in_one_line",
]


class GbpError(Exception):
    """Any failure this package raises on purpose.

    Attributes:
        exit_code: What the command line exits with: 2 where the user can mend the input, else 1.
    """

    exit_code = 1

    def __init__(self, message: str, **attributes: object) -> None:
        super().__init__(message)
        # Exception pickling restores __dict__, so attributes kept there survive the trip.
        self.__dict__.update(attributes)


class ConfigError(GbpError, ValueError):
    """The job file, an override or a command-line argument is wrong."""

    exit_code = 2


class WorkloadError(GbpError):
    """The user's model, data or checkpoint cannot be used as given."""

    exit_code = 2


class PruneError(GbpError):
    """Scores, a selection, a mask or a loss is not usable."""

    exit_code = 2


class StoreError(GbpError):
    """The storage of results is missing, full, damaged, forbidden or another job's."""

    exit_code = 2


class TransientStoreError(StoreError):
    """A storage fault that may pass, but did not while it was retried; run the command again."""

    exit_code = 1


class BusyError(StoreError):
    """Another driver is at work on the trial."""


class TrialError(GbpError):
    """A trial failed for a reason that is not the user's input.

    Attributes:
        trial_id: The trial.
        rank: The worker that failed first, or None where no worker is to blame.
        cause: The worker's own error, one line.
    """

    trial_id: str
    rank: int | None
    cause: str


class ClusterError(GbpError):
    """A cluster elsewhere did not do as asked, or a job there did not succeed.

    Attributes:
        exit_code: Of the job where it is a job's.
    """


class ExportError(GbpError):
    """The exported network does not compute what the pruned one does."""


def in_one_line(error: BaseException) -> str:
    """Describes an exception for a message, without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split())
