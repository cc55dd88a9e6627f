"""The errors that this package raises, and the cleaning of their messages.

A message is one line that names the field, what is allowed and what to do. Attributes are strings
and numbers, so an error survives pickling between processes.

Text from users, files and other libraries may hold anything. `clean_message` makes it one line of
limited length without control characters or credentials.
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

# Control and bidirectional characters, characters without width, halves of surrogate pairs.
_UNPRINTABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    r"\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)

_USER_IN_ADDRESS = re.compile(r"(\w://)(?:[^\s'\"/]*|[^\s'\"/]*:[^\s'\"]*)@")
_SECRET_OPTION = re.compile(r"((?:access_key|secret_key|session_token)=)[^\s'\"&]+")


def printable(text: str) -> str:
    """Escapes characters that a terminal would obey or not show."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def clean_message(text: str) -> str:
    """Makes a message one printable line without credentials; cuts the middle of a long one."""
    line = printable(_LINE_BREAKS.sub(" ", text.strip()))
    line = _SECRET_OPTION.sub(r"\1***", _USER_IN_ADDRESS.sub(r"\1***@", line))
    if len(line) <= _MOST_CHARACTERS:
        return line
    start = _MOST_CHARACTERS - _MOST_AT_THE_END - 60
    num_left_out = len(line) - start - _MOST_AT_THE_END
    note = f" [... {num_left_out:,} characters left out ...] "
    return line[:start] + note + line[-_MOST_AT_THE_END:]


class GbpError(Exception):
    """Any failure that this package raises on purpose; exit code 2 if the input must change."""

    exit_code = 1

    def __init__(self, message: str, **attributes: object) -> None:
        super().__init__(clean_message(message))
        # Pickle restores an exception's __dict__.
        self.__dict__.update(attributes)


class ConfigError(GbpError, ValueError):
    """The job file, an override or a command-line argument is wrong."""

    exit_code = 2


class WorkloadError(GbpError):
    """The user's model, data or checkpoint cannot be used as given."""

    exit_code = 2


class PruneError(GbpError):
    """Scores, a selection, a mask or a loss cannot be used."""

    exit_code = 2


class StoreError(GbpError):
    """The storage is missing, full, damaged, forbidden or belongs to another job."""

    exit_code = 2


class TransientStoreError(StoreError):
    """A storage fault that may pass but outlasted the retries; run the command again."""

    exit_code = 1


class BusyError(StoreError):
    """Another driver holds the trial."""


class TrialError(GbpError):
    """A trial failed for another reason than the user's input.

    Attributes:
        trial_id: Empty if all trials failed together.
        rank: The worker that failed first; None if it was no worker.
        cause: The underlying error, one line.
        is_lasting: Whether it would fail again for the same reason.
    """

    trial_id: str = ""
    rank: int | None = None
    cause: str = ""
    is_lasting: bool = False


class ClusterError(GbpError):
    """A remote cluster refused a request, or a job there failed with this exit code."""


class ExportError(GbpError):
    """The exported network computes something else than the pruned one."""


def in_one_line(error: BaseException) -> str:
    """Describes an exception by type and message in one line."""
    return clean_message(" ".join(f"{type(error).__name__}: {error}".split()))


def name_some(items: Sequence[str], most: int = 5) -> str:
    """Lists the first items for a message, and the number of the rest."""
    rest = len(items) - most
    return ", ".join(items[:most]) + (f" and {rest} more" if rest > 0 else "")
