"""The errors a caller may meet: one small tree, decided here for every other module.

Each error carries one line that names the field, says what is allowed and what to do, and plain
attributes beside it. Only strings and numbers go in, so an error crosses process borders by pickle
exactly as it was raised.

What people, files and other libraries put into a message may hold anything. Here it becomes one
line that does nothing to a terminal, repeats no credentials, and ends.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

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
    "clean_message",
    "in_one_line",
    "name_some",
    "printable",
]

_MOST_CHARACTERS = 1500
_MOST_AT_THE_END = 400
_LINE_BREAKS = re.compile(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")


# Control characters, what turns the direction of writing, what has no width, halves of characters.
_UNPRINTABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    r"\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)

_USER_IN_ADDRESS = re.compile(r"(\w://)(?:[^\s'\"/]*|[^\s'\"/]*:[^\s'\"]*)@")
_SECRET_OPTION = re.compile(r"((?:access_key|secret_key|session_token)=)[^\s'\"&]+")


def printable(text: str) -> str:
    """Writes characters that a terminal would obey, or not show, as their escapes."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def clean_message(text: str) -> str:
    """Makes a message one printable line without credentials, with its middle left out if long."""
    line = printable(_LINE_BREAKS.sub(" ", text.strip()))
    line = _SECRET_OPTION.sub(r"\1***", _USER_IN_ADDRESS.sub(r"\1***@", line))
    if len(line) <= _MOST_CHARACTERS:
        return line
    start = _MOST_CHARACTERS - _MOST_AT_THE_END - 60
    num_left_out = len(line) - start - _MOST_AT_THE_END
    note = f" [... {num_left_out:,} characters left out ...] "
    return line[:start] + note + line[-_MOST_AT_THE_END:]


class GbpError(Exception):
    """Any failure this package raises on purpose.

    Attributes:
        exit_code: What the command line exits with: 2 where the user can mend the input, else 1.
    """

    exit_code = 1

    def __init__(self, message: str, **attributes: object) -> None:
        super().__init__(clean_message(message))
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
        is_lasting: Whether it would fail again for the same reason.
    """

    trial_id: str
    rank: int | None
    cause: str
    is_lasting: bool = False


class ClusterError(GbpError):
    """A cluster elsewhere did not do as asked, or a job there did not succeed.

    Attributes:
        exit_code: Of the job where it is a job's.
    """


class ExportError(GbpError):
    """The exported network does not compute what the pruned one does."""


def in_one_line(error: BaseException) -> str:
    """Describes an exception for a message, without line breaks."""
    return clean_message(" ".join(f"{type(error).__name__}: {error}".split()))


def name_some(items: Sequence[str], most: int = 5) -> str:
    """Lists items for a message, of many only the first."""
    rest = len(items) - most
    return ", ".join(items[:most]) + (f" and {rest} more" if rest > 0 else "")
