"""Bytes by name, on a folder or on an object store: the few verbs that results need.

Other modules know only `Objects`; `folder.py` and `s3.py` implement it. On both a name holds
all of its bytes or does not exist. A *version* is whatever tells one content of a name from the
next; `put_if` writes only over the version that the caller has seen, which is how two writers find
out about each other.

A name is one relative path inside its own folder, whoever gives it: `check_key` holds that for the
names in records, addresses and listings, and both storages hold every name against it once more
before they touch anything.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from gbp_ray.errors import StoreError

__all__ = [
    "TEMPORARY",
    "Entry",
    "Leftover",
    "Objects",
    "check_key",
    "is_key",
]

TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}|\.seen\.[0-9a-f]{32}")
"""Names of files that are still being written; they are not objects."""

_DRIVE = re.compile(r"[A-Za-z]:")
_MOST_BYTES, _MOST_PART_BYTES = 900, 200


def check_key(key: str) -> str:
    """Returns a name if it is one relative path that stays inside its folder.

    Raises:
        StoreError: It is empty, absolute or too long, holds "..", ".", a backslash, a drive or what
            cannot be printed, or is a name that unfinished files have.
    """
    if fault := _find_fault(key):
        raise StoreError(
            f"storage: '{key}': {fault}; it must be a path inside the results, and nothing was "
            "read or written"
        )
    return key


def is_key(key: str) -> bool:
    """Check whether `check_key` accepts a name."""
    return not _find_fault(key)


def _find_fault(key: str) -> str:
    if not key.isprintable() or "\\" in key:
        return "the name holds a backslash or what cannot be printed"
    parts = key.split("/")
    if {"", ".", ".."} & set(parts):
        return "the name is absolute, or holds '.', '..' or an empty part"
    if any(_DRIVE.match(part) or TEMPORARY.fullmatch(part) for part in parts):
        return "the name is that of a drive or of an unfinished file"
    sizes = [len(part.encode()) for part in parts]
    if max(sizes) > _MOST_PART_BYTES or sum(sizes) + len(sizes) > _MOST_BYTES:
        return (
            f"the name is too long (allowed: {_MOST_PART_BYTES} bytes a part, {_MOST_BYTES} in all)"
        )
    return ""


@dataclass(frozen=True)
class Entry:
    """One object of a listing.

    Attributes:
        key: Its name.
        num_bytes: Its size.
        age_s: Seconds since it was written, by the storage's own clock where it tells.
    """

    key: str
    num_bytes: int
    age_s: float


@dataclass(frozen=True)
class Leftover:
    """Remains of an interrupted write that no name refers to.

    Attributes:
        key: The name that was being written.
        num_bytes: Its size so far.
        age_s: Seconds since it was begun.
        token: Identifies it for `Objects.discard`.
    """

    key: str
    num_bytes: int
    age_s: float
    token: str


class Objects(ABC):
    """Bytes by name below one root. Names are relative, with "/" between their parts."""

    num_reads = 1
    """Reads until damage is believed: a network may garble, a disk does not."""
    num_threads = 1
    """Number of requests worth making at a time."""

    @abstractmethod
    def uri_of(self, key: str = "") -> str:
        """Return the address of an object, for people and for opening it again."""

    @abstractmethod
    def child(self, name: str) -> Objects:
        """Opens what is below a name."""

    @abstractmethod
    def parent(self) -> tuple[Objects, str] | None:
        """Opens what is above, with the name of this there; None at the top."""

    @abstractmethod
    def get(self, key: str) -> bytes | None:
        """Reads an object whole, or None where there is none."""

    @abstractmethod
    def get_version(self, key: str) -> tuple[bytes, str, float] | None:
        """Reads an object with its version and its age in seconds, or None."""

    def measure(self, key: str) -> tuple[int, str] | None:
        """Reads an object for its size and SHA-256, or None."""
        data = self.get(key)
        return None if data is None else (len(data), hashlib.sha256(data).hexdigest())

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Check whether there is such an object."""

    @abstractmethod
    def put(self, key: str, data: bytes) -> None:
        """Writes an object, whole or not at all."""

    @abstractmethod
    def put_if(self, key: str, data: bytes, version: str | None) -> str | None:
        """Writes an object if it still has a version, or, for None, if there is none.

        Returns:
            The new version, or None where someone else was faster.
        """

    @abstractmethod
    def put_new(self, key: str, data: bytes, twin: str = "") -> bool:
        """Writes an object, never over other bytes; after `flush` it is there to stay.

        Args:
            twin: Name of an object of the same bytes, which may then be stored only once.

        Returns:
            Whether it is there with these bytes; else the name is taken.
        """

    @abstractmethod
    def flush(self, folders: Iterable[str]) -> None:
        """Makes sure that what `put_new` wrote directly into some folders outlives a power cut."""

    @abstractmethod
    def delete(self, keys: Iterable[str]) -> None:
        """Removes objects; missing ones are passed over."""

    @abstractmethod
    def entries(self, prefix: str = "") -> Iterator[Entry]:
        """Lists the objects whose name starts with a prefix, in name order within a folder."""

    @abstractmethod
    def list_folders(self, prefix: str = "") -> list[str]:
        """Lists the next part of the names that start with a prefix and go on, in name order.

        Args:
            prefix: "" or something that ends with "/".
        """

    @abstractmethod
    def find_leftovers(self, prefix: str = "") -> Iterator[Leftover]:
        """Finds what interrupted writes of this name or of those below have left."""

    @abstractmethod
    def discard(self, leftover: Leftover) -> None:
        """Removes a leftover."""

    @abstractmethod
    def preflight(self) -> None:
        """Makes sure, before any work, that objects can be written, read and removed.

        Raises:
            StoreError: They cannot; says what is missing.
        """
