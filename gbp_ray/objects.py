"""Bytes by name, on a folder or on an object store: the few verbs that results need.

`Objects` is what the floors above know; `files.py` and `s3.py` make it true. On both a name holds
all of its bytes or does not exist. A *version* is whatever tells one content of a name from the
next; `put_if` writes only over the version that the caller has seen, which is how two writers find
out about each other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

__all__ = ["Entry", "Leftover", "Objects"]


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
    """What an interrupted write has left that no name refers to.

    Attributes:
        key: The name that was being written.
        num_bytes: Its size so far.
        age_s: Seconds since it was begun.
        token: What `Objects.discard` needs to know.
    """

    key: str
    num_bytes: int
    age_s: float
    token: str


class Objects(ABC):
    """Bytes by name below one root. Names are relative, with "/" between their parts."""

    num_reads = 1
    """How often damage is read again before it is believed: a network may garble, a disk not."""
    num_threads = 1
    """How many requests are worth making at a time."""

    @abstractmethod
    def uri_of(self, key: str = "") -> str:
        """Says where an object is, for people and for opening it again."""

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

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Tells whether there is such an object."""

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
    def delete(self, keys: Iterable[str]) -> None:
        """Removes objects; what is not there is no fault."""

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
